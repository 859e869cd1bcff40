"""Post-training with RankE: settings, data, the loop, checkpoints, images.

    python train.py                                         the whole job on the embedded world, minutes on a CPU
    python train.py --method rl --out runs/rl               standard RL: the decoder stays frozen
    python train.py --ckpt t2i_XL_stage1_256.pt --data DIR  LlamaGen-XL; what is not named is fetched once
    python train.py --ckpt deepseek-ai/Janus-Pro-1B --data DIR        the other public policy
    python train.py --ckpt CKPT --sample "a red bus" --out DIR        images, in GenEval's layout; for a run on
                                                            the embedded world with --data scenes
    python train.py --resume --out DIR                      go on where a run was stopped
    torchrun --nproc_per_node=8 --shutdown-timeout=600 train.py …     on several GPUs

--data is a folder of images with .txt captions of the same names, webdataset tars of these, or a COCO
captions .json. Every option of the method is a field of `rankee.Config`, whose defaults are the authors' for
LlamaGen; each world's `preset` holds what differs. A run leaves in --out: log.jsonl (a line a step),
preview-….png, policy.pt, policy_ema.pt and vq.pt (with the decoder's EMA) in LlamaGen's layout, or folders in
Janus-Pro's; on the embedded world results.json; and ckpt.pt, one dict of settings, step, weights and
optimizers. No random state: what a step draws is a function of seed, step and process.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

import public.world
import scenes.world
from files.disk import InputError, atomic_save, expect, make_folder, reading
from files.images import save_preview, to_pil
from files.weights import read_checkpoint
from public.data import read_prompts
from rankee import Config, Models, in_batches, random_stream, sample_tokens, train_step, uniform

# ---- settings --------------------------------------------------------------------------------------------------------

LPIPS = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1"


@dataclasses.dataclass(frozen=True)
class TrainConfig(Config):
    """The method's settings and a run's. Networks are public files by default (`files.weights.download`), else paths."""

    out: Annotated[str, "folder of the run, or of --sample's images"] = "runs/llamagen"
    seed: Annotated[int, "seed of everything that is drawn"] = 0
    ckpt: Annotated[str, "policy: LlamaGen's file, Janus-Pro's folder, a run's, or a public name"] = (
        "t2i_XL_stage1_256.pt"
    )
    vq: Annotated[str, "VQ tokenizer in LlamaGen's layout; Janus-Pro has its own"] = (
        "peizesun/llamagen_t2i/vq_ds16_t2i.pt"
    )
    image_size: Annotated[int, "pixels a side; over the tokenizer's factor: the token grid"] = 256
    data: Annotated[str, "images with captions, see above; or the word scenes"] = ""
    t5: Annotated[str, "LlamaGen's text encoder"] = "google/flan-t5-xl"
    t5_device: Annotated[Literal["", "cpu", "cuda"], "where the text encoder is, if not on --device"] = ""
    reward: Annotated[Literal["clip", "hpsv2"], "the scorer: CLIP ViT-L/14 or HPSv2.1"] = "clip"
    reward_weights: Annotated[str, "the scorer's file, if not the published one"] = ""
    vgg: Annotated[str, "VGG16, for LPIPS"] = "https://download.pytorch.org/models/vgg16-397923af.pth#397923af"
    lpips: Annotated[str, "LPIPS' linear layers"] = f"{LPIPS}/vgg.pth#a78928a0"
    workers: Annotated[int, "processes that read images; 0: none, the run reads them itself"] = 4
    sample: Annotated[list[str], "draw these captions, or those of a .txt, GenEval's .jsonl, COCO's .json"] = ()
    num_images: Annotated[int, "how many captions of --sample's file; 0 is all"] = 0
    per_prompt: Annotated[int, "images a caption of --sample"] = 1
    device: Annotated[Literal["cpu", "cuda"], "where it runs"] = "cuda" if torch.cuda.is_available() else "cpu"
    precision: Annotated[Literal["auto", "float32", "bf16"], "of the policy's layers; auto: bf16 on cuda"] = "auto"
    base: Annotated[str, "folder of the embedded world's base"] = str(Path(__file__).with_name("scenes"))
    eval_samples: Annotated[int, "images in an evaluation on the embedded world"] = 2048
    eval_every: Annotated[int, "steps between evaluations on the embedded world; 0: the last step alone"] = 0
    save_every: Annotated[int, "steps between checkpoints and previews; the last step always makes them"] = 500
    resume: Annotated[bool, "go on from --out's checkpoint with its settings, but for those given"] = False


# Options that cannot be 0, since something is counted or divided by them.
POSITIVE = """max_steps batch_size rollout_batch_size micro_batch_size temperature tau_start tau_end policy_ema_every
clip_eps max_grad_norm image_size per_prompt eval_samples save_every"""


def world_of(data):
    """The module of a world: `preset`, `resolve_files`, `load_pretrained` and `load_world` (a `rankee.World`)."""
    return scenes.world if data == "scenes" else public.world


def option_parser():
    raw, usage = argparse.RawDescriptionHelpFormatter, "train.py [options]   (--help lists them)"
    parser = argparse.ArgumentParser("train.py", usage, __doc__, formatter_class=raw, allow_abbrev=False)
    for field in dataclasses.fields(TrainConfig):
        kind, text = field.type.__origin__, field.type.__metadata__[0]
        option = {"help": f"{text} [{field.default}]", "default": argparse.SUPPRESS}
        if kind is bool:
            option["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            option["choices"] = get_args(kind)
        elif get_origin(kind) is list:
            option["nargs"] = "+"
        else:
            option["type"] = kind
        parser.add_argument("--" + field.name.replace("_", "-"), **option)
    return parser


def parse_config(argv):
    """A command line's `TrainConfig`. Defaults are the authors' for the policy that is named, or the scenes'.

    With --resume they are the saved run's. Raises InputError for values that cannot be meant.
    """
    parser = option_parser()
    given = vars(parser.parse_args(argv))
    if given.get("ckpt") and Path(given["ckpt"]).exists():  # perhaps a run's, whose tokenizer was trained with it
        run = Path(given["ckpt"])
        policy = next((path for path in (run / "policy.pt", run / "policy") if path.exists()), run)
        own = {"vq": str(policy.parent / "vq.pt")} if (policy.parent / "vq.pt").exists() else {}
        given = own | given | {"ckpt": str(policy)}
    data = given.get("data", "" if "ckpt" in given else "scenes")
    settings = vars(parser.parse_args(world_of(data).preset(given)))
    if given.get("resume"):
        file = Path(given.get("out", settings.get("out", TrainConfig.out)), "ckpt.pt")
        settings = read_checkpoint(file).get("config", {})
        same_version = settings.keys() == vars(TrainConfig()).keys()
        expect(same_version, f"{file}: not a run, or one of another version; go on with that one, or begin anew")
        for name in given:
            if given[name] != settings[name] and name != "resume":
                print(f"--{name.replace('_', '-')}: {settings[name]} -> {given[name]}")
    cfg = TrainConfig(**(settings | given))
    for name, value in dataclasses.asdict(cfg).items():
        least = "more than 0" if name in POSITIVE.split() else "0 or more"
        fits = not isinstance(value, (int, float)) or 0 < value < math.inf or (value == 0 and least == "0 or more")
        expect(fits, f"--{name.replace('_', '-')} {value}: expected {least}, and finite")
    expect(cfg.group_size >= max(2, cfg.rank_k), "--group-size: expected 2 or more, and at least --rank-k")
    overwrites = Path(cfg.out).resolve() in (Path(cfg.ckpt).resolve().parent, Path(cfg.vq).resolve().parent)
    expect(cfg.sample or not overwrites, f"--out {cfg.out}: holds --ckpt or --vq; name another folder")
    expect(max(cfg.policy_ema, cfg.decoder_ema) <= 1, "--policy-ema, --decoder-ema: expected 0 or more, 1 at most")
    cuda = "cuda" in (cfg.device, cfg.t5_device)
    expect(not cuda or torch.cuda.is_available(), "--device or --t5-device cuda: there is none; give cpu")
    return cfg


# ---- checkpoints ----------------------------------------------------------------------------------------------------

# What a checkpoint holds of `Models`; the frozen networks come from their own files again.
CHECKPOINTED = "policy policy_ema vq vq_ema discriminator policy_optimizer decoder_optimizer disc_optimizer".split()


def save_checkpoint(out, models, cfg, step, rows, world_size):
    state = {"step": step, "config": dataclasses.asdict(cfg), "rows": rows, "world_size": world_size}
    state |= {name: getattr(models, name).state_dict() for name in CHECKPOINTED}
    atomic_save(out / "ckpt.pt", lambda file: torch.save(state, file))


def load_checkpoint(state, models, world_size):
    """Fills `models` with what `save_checkpoint` kept, and frees it: `train` holds `state` to the end."""
    if state["world_size"] != world_size:
        print(f"processes: {state['world_size']} -> {world_size}; from here on other numbers are drawn")
    for name in CHECKPOINTED:
        part, saved = getattr(models, name), state.pop(name)
        if "param_groups" in saved:  # an optimizer's: moments alone, since rates are settings
            saved = part.state_dict() | {"state": saved["state"]}
        with reading("ckpt.pt", "the networks that --ckpt and --data name", (RuntimeError, ValueError), verb="loaded"):
            part.load_state_dict(saved)


# ---- images ----------------------------------------------------------------------------------------------------------


def make_autocast(cfg):
    bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and cfg.device == "cuda")
    return torch.autocast(cfg.device, torch.bfloat16, enabled=bf16)


@torch.no_grad()
def sample_images(policy, decoders, text_encoder, captions, u, cfg):
    """Tokens (n, N) of n captions, drawn from u (n, N) like rollouts; each decoder's images (n, 3, H, W)."""
    cond, cond_mask = text_encoder(captions)
    with make_autocast(cfg):
        tokens, _ = sample_tokens(policy, cond, cond_mask, u[:, None], cfg)  # (n, 1, N)
    tokens = tokens[:, 0]
    return tokens, *(in_batches(vq.decode, tokens, size=cfg.micro_batch_size) for vq in decoders)


def sample(cfg):
    """Draws the captions of --sample in GenEval's layout; what is there already is not drawn again.

    A caption is in OUT/00000/metadata.jsonl, an image in OUT/00000/samples/0000.png, its tokens in 0000.npy.
    An image depends only on the files, the settings, and which caption and which of its images it is.
    """
    prompts, todo = read_prompts(cfg.sample, cfg.num_images), []
    expect("RANK" not in os.environ, "--sample runs as one process; start it without torchrun")
    for i, prompt in enumerate(prompts):
        folder = Path(cfg.out, f"{i:05d}")
        make_folder(folder / "samples")
        metadata, line = folder / "metadata.jsonl", json.dumps(prompt).encode()
        if not metadata.exists():
            atomic_save(metadata, lambda file: file.write(line))
        expect(metadata.read_bytes() == line, f"{metadata} is of another caption; name another folder with --out")
        paths = [folder / "samples" / f"{k:04d}.png" for k in range(cfg.per_prompt)]
        todo += [(i, k, path) for k, path in enumerate(paths) if not path.exists()]
    world = world_of(cfg.data)
    policy, vq, text_encoder = world.load_pretrained(world.resolve_files(cfg))
    N = policy.config.grid_size**2
    for batch in tqdm(DataLoader(todo, cfg.rollout_batch_size, collate_fn=list), unit=" batches"):
        u = torch.stack([uniform(random_stream(cfg.seed, "sample", i, k), N) for i, k, _ in batch])
        captions = [prompts[i]["prompt"] for i, _, _ in batch]
        tokens, images = sample_images(policy, [vq], text_encoder, captions, u.to(cfg.device), cfg)
        for (_, _, path), image_tokens, image in zip(batch, tokens.cpu(), images):
            atomic_save(path.with_suffix(".npy"), lambda file: np.save(file, image_tokens.numpy()))
            atomic_save(path, lambda file: to_pil(image).save(file, "PNG"))
    print(f"{len(todo)} of {len(prompts) * cfg.per_prompt} images drawn; the others were in {cfg.out} already")


# ---- the run ---------------------------------------------------------------------------------------------------------


def init_distributed(device):
    """This process' rank and how many torchrun started; (0, 1) without it."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # The others wait while the first evaluates.
        dist.init_process_group(dist.get_default_backend_for_device(device), timeout=timedelta(hours=12))
    return rank, world_size


def catch_signals():
    """The list to which Ctrl-C and SIGTERM are added, for the step's end; after the first, Ctrl-C kills."""
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)
    return received


def any_process(number, device):
    """The largest of all processes' numbers: all stop after the same step."""
    number = torch.tensor(number, device=device)
    if dist.is_initialized():
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


# What a step's line shows of its log.
PRINTED = "reward kl policy_grad_norm decoder_loss disc_loss decoder_grad_norm seconds".split()


def log_step(path, step, max_steps, logs):
    """A line for people and one of JSON for machines, where numbers that are not finite are null."""
    bad = [name for name, value in logs.items() if not math.isfinite(value)]
    line = "  ".join(f"{name} {logs[name]:.3g}" for name in PRINTED if name in logs)
    with contextlib.suppress(OSError):  # Ctrl-C ends a `| tee` at once; the step is saved all the same
        print(f"step {step}/{max_steps}  {line}", f"  NO UPDATE, not finite: {bad}" if bad else "", flush=True)
    with reading(path, "a disk with room", OSError, verb="written"), open(path, "a") as file:
        file.write(json.dumps({"step": step} | logs | dict.fromkeys(bad)) + "\n")


def read_log(path, steps):
    """The log's lines of the first `steps` steps."""
    with reading(path, "the run's log; an empty file will do"):
        return "".join(path.read_text().splitlines(keepends=True)[:steps])


def print_table(rows):
    print("\n" + "".join(f"{name:>16}" for name in rows[0]))
    for row in rows:
        print("".join(f"{value:16.3f}" if isinstance(value, float) else f"{value:>16}" for value in row.values()))


def train(cfg):
    """A whole run: load, post-train, evaluate, save."""
    # Processes, the folder, and where an earlier run stopped
    out = Path(cfg.out)
    rank, world_size = init_distributed(cfg.device)
    expect(cfg.resume or not (out / "ckpt.pt").exists(), f"--out {out}: holds a run; --resume it or name another one")
    make_folder(out)
    state = read_checkpoint(out / "ckpt.pt") if cfg.resume else {"step": 0}
    start = state["step"]

    # Networks and data
    cfg = world_of(cfg.data).resolve_files(cfg)
    world = world_of(cfg.data).load_world(cfg)
    base_vq = copy.deepcopy(world.vq)  # what the trained decoder is compared with
    models = Models(world, make_autocast(cfg), cfg)
    N = models.policy.config.grid_size**2

    # What is watched: the world's captions, drawn from the same numbers before, during and after
    captions, watched_u = world.captions, uniform(random_stream(cfg.seed, "watched"), len(world.captions), N)
    decoders = {"base": base_vq, "own": models.vq_ema} if cfg.trains_decoder else {"base": base_vq}

    def draw(n, *vqs):
        """Tokens of the first n of these captions, and their images by each of the tokenizers."""
        u = watched_u[:n].to(cfg.device)
        return sample_images(models.policy, vqs, models.text_encoder, captions[:n], u, cfg)

    tokens, base_images = draw(len(captions), base_vq)
    rows, log = [], ""
    if world.evaluate:
        rows.append({"method": "base", "decoder": "base", "step": 0} | world.evaluate(tokens, base_images))
    if cfg.resume:
        load_checkpoint(state, models, world_size)
        rows, log = state["rows"], read_log(out / "log.jsonl", start)
    if rank == 0:
        atomic_save(out / "log.jsonl", lambda file: file.write(log.encode()))

    # Post-train
    received, bad_steps = catch_signals(), 0
    batches = world.batches(start, rank, world_size)
    with contextlib.closing(batches):  # else an exception leaves its workers, for which the exit waits for ever
        for step, (step_captions, images) in zip(range(start, cfg.max_steps), batches):
            started = time.perf_counter()
            u = uniform(random_stream(cfg.seed, "rollouts", step, rank), cfg.batch_size, cfg.group_size, N)
            images = images[: cfg.real_batch_size or cfg.batch_size].to(cfg.device)
            logs = train_step(models, step_captions[: cfg.batch_size], images, u.to(cfg.device), step, cfg)
            logs["seconds"] = time.perf_counter() - started

            done, last = step + 1, step + 1 == cfg.max_steps
            stop = any_process(max(received, default=0), cfg.device)  # a signal's number, or 0
            if rank == 0:
                log_step(out / "log.jsonl", done, cfg.max_steps, logs)
            bad_steps = 0 if all(map(math.isfinite, logs.values())) else bad_steps + 1
            if bad_steps == 5:
                sys.exit(f"train.py: numbers were not finite 5 steps in a row; {out} keeps what was saved")

            if rank == 0 and world.evaluate and (last or (cfg.eval_every and done % cfg.eval_every == 0)):
                tokens, *drawn = draw(len(captions), *decoders.values())
                for name, x in zip(decoders, drawn):
                    rows.append({"method": cfg.method, "decoder": name, "step": done} | world.evaluate(tokens, x))
                atomic_save(out / "results.json", lambda file: file.write(json.dumps(rows, indent=1).encode()))
            if rank == 0 and (stop or last or done % cfg.save_every == 0):
                _, *drawn = draw(8, *decoders.values())
                columns = {"real": world.images, "base": base_images[:8]}
                columns |= {f"{cfg.method}, {name} decoder": x for name, x in zip(decoders, drawn)}
                save_preview(out / f"preview-{done:06d}.png", columns, captions[:8])
                networks = {"policy": models.policy, "policy_ema": models.policy_ema, "vq": models.vq_ema}
                world.save_networks(out, networks)
                save_checkpoint(out, models, cfg, done, rows, world_size)  # the last: with it a save is whole
            if stop:
                if world_size > 1:
                    dist.barrier()  # torchrun ends all when one has gone; the first may be saving
                sys.exit(128 + stop)
    if rank == 0 and rows:
        print_table(rows)
    if rank == 0 and cfg.device == "cuda":
        print(f"peak of GPU memory: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB on {torch.cuda.get_device_name()}")


def main(argv=None):
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")  # redirected output may be no UTF-8, and a λ must not end a run
    try:
        cfg = parse_config(argv)
        run = sample if cfg.sample else train
        run(cfg)
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
