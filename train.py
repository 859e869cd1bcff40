"""Post-training with RankE: settings, the loop, checkpoints.

    python train.py                         the embedded world, minutes on a CPU
    python train.py --method rl --out runs/rl           standard RL, no stage 2
    python train.py --ckpt llamagen_xl.pt   what is missing is fetched once
    python train.py --ckpt deepseek-ai/Janus-Pro-1B
    python train.py --ckpt RUN --sample "a red bus" --out DIR
    python train.py --resume --out DIR      goes on where a run was stopped
    torchrun --nproc_per_node=8 train.py …  on several GPUs

Every option of the method is a field of rankee.Config, whose defaults are the
authors' for LlamaGen but for three; each world's preset holds what differs. In
brackets stands the default, and after "scenes" the embedded world's, which runs
where neither --ckpt nor --data is given.

A run leaves in --out: ckpt.pt, one dict of settings, step, weights and
optimizers; log.jsonl, a line a step; preview-….png; what was trained as
policy.pt and vq.pt, their EMAs as policy_ema.pt and vq_ema.pt, in LlamaGen's
layout, or as two folders in Janus-Pro's; discriminator.pt; on the embedded
world results.json, measured through vq_ema. ckpt.pt has no random state: what
a step draws follows from seed, step and process.
"""

import contextlib
import copy
import dataclasses
import functools
import importlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist

import scenes
from files import options
from files.disk import InputError, atomic_save, expect, make_folder, reading, tolerant_output
from files.log import log_step, print_table, read_log
from files.processes import alone_in, any_process, init_distributed, mean_over_processes, noted_signals
from files.weights import read_checkpoint, run_settings, saved_settings
from public.sample import Watched, make_autocast, sample, save_picture
from rankee import Config, Models, random_stream, train_step, uniform

# ---- settings --------------------------------------------------------------------------------------------------------

LPIPS_URL = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1"


@dataclasses.dataclass(frozen=True)
class TrainConfig(Config):
    """The method's settings and a run's. Networks are public files by default (`files.weights.download`)."""

    # Sampling, with `Config`'s
    padding: Annotated[Literal["left", "right"], "padded side of LlamaGen's captions; published: right"] = "left"
    sample: Annotated[list[str], "draw these captions, or a file's: .txt, .csv, GenEval's .jsonl, COCO's .json"] = ()
    num_images: Annotated[int, "how many captions of --sample's file; 0 is all"] = 0
    per_prompt: Annotated[int, "images a caption of --sample"] = 1
    # Files
    ckpt: Annotated[str, "policy: LlamaGen's file, Janus-Pro's folder, a run, or a public name"] = "llamagen_xl.pt"
    vq: Annotated[str, "VQ tokenizer; Janus-Pro has its own"] = "peizesun/llamagen_t2i/vq_ds16_t2i.pt"
    image_size: Annotated[int, "pixels a side; divided by the tokenizer's factor: the token grid's side"] = 256
    data: Annotated[str, "images with .txt, tars of these, COCO's .json, or scenes; none: BLIP3o-60k, fetched"] = ""
    t5: Annotated[str, "LlamaGen's text encoder"] = "google/flan-t5-xl"
    t5_device: Annotated[Literal["", "cpu", "cuda"], "where the text encoder is, if not on --device"] = ""
    reward: Annotated[Literal["clip", "hpsv2"], "the scorer: CLIP ViT-L/14 or HPSv2.1"] = "clip"
    reward_weights: Annotated[str, "the scorer's file, if not the published one"] = ""
    vgg: Annotated[str, "VGG16, for LPIPS"] = "https://download.pytorch.org/models/vgg16-397923af.pth#397923af"
    lpips: Annotated[str, "LPIPS' linear layers"] = f"{LPIPS_URL}/vgg.pth#a78928a0"
    base: Annotated[str, "folder of the embedded world's networks"] = str(Path(scenes.__file__).parent)
    # Run
    out: Annotated[str, "folder of the run, or of --sample's images"] = "runs/llamagen"
    seed: Annotated[int, "seed of everything that is drawn"] = 0
    workers: Annotated[int, "processes that read images, at most; 0: the run itself"] = 4
    device: Annotated[Literal["cpu", "cuda"], "where it runs"] = "cuda" if torch.cuda.is_available() else "cpu"
    precision: Annotated[Literal["auto", "float32", "bf16"], "of the policy's layers; auto: bf16 on cuda"] = "auto"
    eval_samples: Annotated[int, "images in an evaluation on the embedded world"] = 4096
    eval_every: Annotated[int, "steps between evaluations; 0: the last step alone"] = 0
    save_every: Annotated[int, "steps between checkpoints and previews; the last step makes them too"] = 500
    keep_exports: Annotated[bool, "keep the networks of each save, in OUT/STEP"] = False
    resume: Annotated[bool, "go on from --out's checkpoint with its settings, but for those given"] = False


# --help's groups: the option that begins each, in the order of the fields.
GROUPS = {
    "method": "method",
    "policy_lr": "stage 1",
    "decoder_lr": "stage 2",
    "policy_ema": "EMA",
    "cfg_scale": "sampling",
    "ckpt": "files",
    "out": "run",
}
# Options that cannot be 0, since something is counted or divided by them.
POSITIVE = """max_steps batch_size rollout_batch_size micro_batch_size temperature tau_start tau_end policy_ema_every
clip_eps max_grad_norm image_size per_prompt eval_samples save_every"""
# Words of --data that name a world; all else is the public one.
WORLDS = {"scenes": "scenes.world"}


def world_of(data):
    """The module of a world: `preset`, `resolve_files`, `load_pretrained` and `load_world` (a `rankee.World`)."""
    return importlib.import_module(WORLDS.get(data, "public.world"))


def option_parser():
    """The parser of the command line; --help shows the embedded world's settings beside the defaults."""
    plain = options.option_parser(TrainConfig, "train.py", __doc__, GROUPS)
    embedded = options.parse_options(plain, scenes.SETTINGS.split())
    return options.option_parser(TrainConfig, "train.py", __doc__, GROUPS, {"scenes": embedded})


def parse_config(argv=None):
    """A command line's `TrainConfig`. Raises InputError for values that cannot be meant.

    What is not given is, with --resume, the saved run's; else what belongs to the weights, where --ckpt is a
    run's; else the world's preset; else the default.
    """
    parser = option_parser()
    given = options.parse_options(parser, sys.argv[1:] if argv is None else argv)
    if given.get("resume"):
        settings = saved_settings(given.get("out", "runs/scenes"), given, vars(TrainConfig()).keys())
    else:
        of_run = run_settings(given.pop("ckpt")) if "ckpt" in given else {}
        known = of_run | given
        data = known.get("data", "" if "ckpt" in known else "scenes")
        settings = options.parse_options(parser, world_of(data).preset(known)) | of_run
        if "sample" in given:
            settings["out"] = "runs/samples"
    cfg = TrainConfig(**(settings | given))
    check_config(cfg)
    return cfg


def check_config(cfg):
    """Raises InputError for values that cannot be meant."""
    for name, value in dataclasses.asdict(cfg).items():
        if isinstance(value, (int, float)):
            positive = name in POSITIVE.split()
            fits = math.isfinite(value) and (value > 0 if positive else value >= 0)
            least = "more than 0" if positive else "0 or more"
            expect(fits, f"{options.option_name(name)} {value}: expected {least}, and finite")
    expect(cfg.group_size >= max(2, cfg.rank_k), "--group-size: expected 2 or more, and at least --rank-k")
    for name in ("policy_ema", "decoder_ema", "caption_dropout"):
        expect(getattr(cfg, name) <= 1, f"{options.option_name(name)}: expected 0 or more, 1 at most")
    expect(cfg.gan_beta2 < 1, "--gan-beta2: expected less than 1")
    overwrites = Path(cfg.out).resolve() in (Path(cfg.ckpt).resolve().parent, Path(cfg.vq).resolve().parent)
    expect(cfg.sample or not overwrites, f"--out {cfg.out}: holds --ckpt or --vq; name another folder")
    cuda = "cuda" in (cfg.device, cfg.t5_device)
    expect(not cuda or torch.cuda.is_available(), "--device or --t5-device cuda: there is none; give cpu")


# ---- checkpoints -----------------------------------------------------------------------------------------------------

# What a checkpoint holds of `Models`; the frozen networks come from their own files again.
CHECKPOINTED = "policy policy_ema vq vq_ema discriminator policy_optimizer decoder_optimizer disc_optimizer".split()
# What is written for other programs: a policy and the decoder that was trained with it, and their EMAs.
EXPORTED = ("policy", "vq", "policy_ema", "vq_ema", "discriminator")
# A folder that holds one of these holds a run.
RUN_FILES = ("ckpt.pt", "policy.pt", "policy", "vq.pt")


def save_checkpoint(out, models, cfg, step, rows, world_size, data):
    state = {"step": step, "config": dataclasses.asdict(cfg), "rows": rows, "world_size": world_size, "data": data}
    state |= {name: getattr(models, name).state_dict() for name in CHECKPOINTED}
    atomic_save(out / "ckpt.pt", lambda file: torch.save(state, file))


def load_checkpoint(state, models, world_size, data):
    """Fills `models` with what `save_checkpoint` kept, and frees it: `post_train` holds `state` to the end."""
    for name, before, now in (("processes", state["world_size"], world_size), ("data", state["data"], data)):
        if before != now:
            print(f"{name}: {before} -> {now}; from here on other numbers are drawn")
    for name in CHECKPOINTED:
        part = getattr(models, name)
        saved = state.pop(name)
        if "param_groups" in saved:  # an optimizer's: moments alone, since rates are settings
            saved = part.state_dict() | {"state": saved["state"]}
        with reading("ckpt.pt", "the networks that --ckpt and --data name", (RuntimeError, ValueError), verb="loaded"):
            part.load_state_dict(saved)


# ---- the run ---------------------------------------------------------------------------------------------------------


def train(cfg):
    """A whole run, alone in its folder."""
    rank, world_size = init_distributed(cfg.device)
    out = Path(cfg.out)
    holds = [name for name in RUN_FILES if (out / name).exists()]
    expect(cfg.resume or not holds, f"--out {out}: holds a run ({', '.join(holds)}); --resume it or name another one")
    with alone_in(out) if rank == 0 else contextlib.nullcontext():
        post_train(cfg, out, rank, world_size)
    if rank == 0 and cfg.device == "cuda":
        print(f"peak of GPU memory: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB on {torch.cuda.get_device_name()}")


def post_train(cfg, out, rank, world_size):
    """Loads, post-trains, evaluates, saves."""
    torch.manual_seed(cfg.seed)  # for what has no stream of its own: the random weights of new modules

    # Where an earlier run stopped
    state = read_checkpoint(out / "ckpt.pt") if cfg.resume else {"step": 0}
    start = state["step"]
    say = functools.partial(print, flush=True) if rank == 0 else lambda text: None

    # Networks and data
    say("loading networks and data")
    cfg = world_of(cfg.data).resolve_files(cfg)
    world = world_of(cfg.data).load_world(cfg)
    models = Models(world, make_autocast(cfg), cfg)
    N = models.policy.config.grid_size**2
    base_decoder = {"base": copy.deepcopy(world.vq)}
    # "own" is the EMA, which the rollouts were decoded by.
    decoders = base_decoder | {"own": models.vq_ema} if cfg.trains_decoder else base_decoder
    watched = Watched(world, cfg)

    rows, log = [], ""
    if rank == 0:
        say("drawing the base's images")
        _, base_images = watched.draw(models.policy, base_decoder, 64)  # before a checkpoint takes the base's place
        if world.evaluate and not cfg.resume:
            say(f"drawing and measuring {len(world.captions)} of them")
            rows = watched.measure_real(world.vq) + watched.measure(models.policy, base_decoder, "base", 0)
    if cfg.resume:
        load_checkpoint(state, models, world_size, world.data)
        rows, log = state["rows"], read_log(out / "log.jsonl", start)
    if rank == 0:
        atomic_save(out / "log.jsonl", lambda file: file.write(log.encode()))

    def save(step):
        """Writes what can be resumed, then what is for others and for the eye."""
        save_checkpoint(out, models, cfg, step, rows, world_size, world.data)
        for folder in [out, out / f"{step:06d}"] if cfg.keep_exports else [out]:
            make_folder(folder)
            world.save_networks(folder, {name: getattr(models, name) for name in EXPORTED})
        _, images = watched.draw(models.policy, decoders, 64)
        columns = base_images | {f"{cfg.method}, {name} decoder": x for name, x in images.items()}
        save_picture(out / f"preview-{step:06d}.png", world, columns)

    # Post-train
    bad_steps, batches = 0, world.batches(start, rank, world_size)
    if start >= cfg.max_steps and rank == 0:
        print(f"{out}: {start} steps are done already; --max-steps {cfg.max_steps} asks for no more")
        save(start)  # it may have been ended between its last checkpoint and what is for others
    # Closed: after an exception the exit would wait for the workers of `batches` for ever.
    with noted_signals() as received, contextlib.closing(batches):
        for step, (step_captions, images) in zip(range(start, cfg.max_steps), batches):
            started = time.perf_counter()
            u = uniform(random_stream(cfg.seed, "rollouts", step, rank), cfg.batch_size, cfg.group_size, N)
            images = images[: cfg.real_batch_size or cfg.batch_size].to(cfg.device)
            logs = train_step(models, step_captions[: cfg.batch_size], images, u.to(cfg.device), step, cfg)
            logs["seconds"] = time.perf_counter() - started

            done, last = step + 1, step + 1 == cfg.max_steps
            logs = mean_over_processes(logs, cfg.device)
            stop = any_process(max(received, default=0), cfg.device)  # a signal's number, or 0
            if rank == 0:
                log_step(out / "log.jsonl", done, cfg.max_steps, logs)
            bad_steps = 0 if all(map(math.isfinite, logs.values())) else bad_steps + 1
            if bad_steps == 5:
                sys.exit(f"train.py: numbers were not finite 5 steps in a row; {out} keeps what was saved")

            if rank == 0 and world.evaluate and (last or (cfg.eval_every and done % cfg.eval_every == 0)):
                say(f"drawing and measuring {len(world.captions)} images")
                rows += watched.measure(models.policy, decoders, cfg.method, done)
                atomic_save(out / "results.json", lambda file: file.write(json.dumps(rows, indent=1).encode()))
            if rank == 0 and (stop or last or done % cfg.save_every == 0):
                save(done)
            if stop:
                if world_size > 1:
                    dist.barrier()  # torchrun ends all when one has gone; the first may be saving
                sys.exit(128 + stop)
    if rank == 0 and rows:
        print_table(rows)


def main(argv=None):
    tolerant_output()  # a λ must not end a run
    try:
        cfg = parse_config(argv)
        if cfg.sample:
            sample(world_of(cfg.data), cfg)
        else:
            train(cfg)
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
