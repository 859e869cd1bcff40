"""Post-training with RankE: settings, the loop, pictures, files.

    python train.py                                    the whole job on the embedded world, minutes on a laptop
    python train.py --arm policy --out runs/policy     standard RL: the decoder stays frozen
    python train.py --ckpt policy.pt --vq vq.pt        another checkpoint in LlamaGen's layout
    python train.py --pretrain                         make the embedded world's base again

Every option of the method is a field of `rankee.Method`, whose defaults are the authors' for LlamaGen; `SCENES` below holds the
embedded world's. A run writes to --out: settings.json, log.jsonl (a line a round), results.json, pictures, and policy.pt, vq.pt and their EMAs
in LlamaGen's layout. All randomness of round n is drawn from (seed, n).
"""

import argparse
import copy
import dataclasses
import difflib
import json
import os
import pickle
import sys
import textwrap
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args, get_type_hints

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from metrics import token_entropy, token_histogram, token_kl
from policy import policy_from_entries, sample
from rankee import Method, Players, one_round
from scenes import world
from vq import PatchDiscriminator, vq_from_entries

# ---- settings ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings(Method):
    """A run's settings: the method's and these."""

    out: Annotated[str, "folder of the run; must not hold another run"] = "runs/llamagen"
    seed: Annotated[int, "seed of captions, scenes and noise"] = 0
    ckpt: Annotated[str, "policy in LlamaGen's layout; default: the embedded world's"] = ""
    vq: Annotated[str, "VQ tokenizer in LlamaGen's layout; default: the embedded world's"] = ""
    image_size: Annotated[int, "pixels a side; with the tokenizer's factor it gives the token grid"] = 256
    head_size: Annotated[int, "size of an attention head; 0: LlamaGen's for the policy's width"] = 0
    device: Annotated[Literal["auto", "cpu", "cuda"], "where it runs; auto: the GPU where there is one"] = "auto"
    precision: Annotated[Literal["auto", "float32", "bf16"], "of passes, weights are float32; auto: bf16 on a GPU"] = "auto"
    samples: Annotated[int, "pictures in an evaluation"] = 2048
    save_every: Annotated[int, "rounds between checkpoints; the last round is always saved"] = 500
    pretrain: Annotated[bool, "make the embedded world's base in scenes/ and stop"] = False


# The embedded world, found by measurement (scenes/ says what it is). Everything else is `Method`'s default.
SCENES = dict(
    out="runs/scenes", image_size=world.RESOLUTION, head_size=world.HEAD_SIZE,
    rounds=80, captions=8, guidance=2.0, top_k=0, micro_batch=64,
    lr_policy=2e-4, warmup=10, reference="initial", score_guided=True, ema_policy=0.9, ema_policy_every=1,
    lr_decoder=3e-4, lr_discriminator=2e-4, beta1_decoder=0.5, beta2_decoder=0.9, ema_decoder=0.95,
    weight_by="zscore", gan_start=0, lambda_d=0.6, lambda_g=0.5, lambda_c=2.0, real_images=32,
)  # fmt: skip


class BadInput(Exception):
    """Something the user gave does not fit; the message is one line: the thing, what was expected, what to do."""


def parse_settings(arguments):
    """The command line to `Settings`. Options left out take the embedded world's values, or with --ckpt the paper's."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    for name, hint in get_type_hints(Settings, include_extras=True).items():
        kind, text = hint.__origin__, hint.__metadata__[0]
        shown = f"{text} [{defaults[name]}" + (f"; scenes {SCENES[name]}]" if name in SCENES else "]")
        option = {"dest": name, "default": argparse.SUPPRESS, "help": shown.replace("%", "%%")}
        if kind is bool:
            option["action"] = argparse.BooleanOptionalAction
        else:
            option |= {"choices": get_args(kind)} if get_args(kind) else {"type": kind, "metavar": kind.__name__.upper()}
        parser.add_argument("--" + name.replace("_", "-"), **option)
    try:
        given, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise BadInput(str(error)) from error
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, 1, cutoff=0)
        raise BadInput(f"unknown option {unknown[0]}; the nearest is {near[0]}, and --help lists all")
    settings = Settings(**(defaults | ({} if "ckpt" in given else SCENES) | vars(given)))
    check_settings(settings)
    return settings


def check_settings(s):
    """Raises BadInput for a value or a combination that cannot be meant."""
    least = {"guidance": 1, "rollouts": 2, "temperature": 1e-6, "tau_start": 1e-6, "tau_end": 1e-6, "samples": 2}
    least |= {"image_size": 24}  # below, PatchGAN has no patch
    least |= dict.fromkeys(["rounds", "captions", "micro_batch", "inner_epochs", "ema_policy_every", "save_every"], 1)
    most = {"epsilon": 1, "tau_fraction": 1, "ema_policy": 1, "ema_decoder": 1, "beta1_decoder": 0.9999, "beta2_decoder": 0.9999}
    most |= {"seed": 10**11}  # the rounds' seeds are made from it and must fit 64 bits
    for name, value in dataclasses.asdict(s).items():
        low, high = least.get(name, 0), most.get(name, sys.float_info.max)
        if isinstance(value, (int, float)) and not low <= value <= high:
            bounds = f"from {low} to {high}" if name in most else f"at least {low}"
            raise BadInput(f"--{name.replace('_', '-')} {value} is not possible; it must be {bounds}")
    if s.keep > s.rollouts:
        raise BadInput(f"--keep {s.keep} keeps more than the {s.rollouts} rollouts of a caption; give at most --rollouts")
    if s.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: this machine has no GPU that PyTorch can use; leave the option out")
    if bool(s.ckpt) != bool(s.vq):
        raise BadInput("--ckpt and --vq go together: a policy's codes mean nothing to another tokenizer; name both")


# ---- files -------------------------------------------------------------------------------------------------------------


def read_checkpoint(path):
    """What a .pt file holds, with `weights_only`: a pickle that would run code is refused. Raises BadInput."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}; expected a PyTorch checkpoint")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle's protocol, just before it is refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BadInput(f"{path}: not a checkpoint of plain weights ({first_line(error)}); get it again") from error
    except Exception as error:  # a damaged file fails in many ways, none of them a reason to go on
        raise BadInput(f"{path}: truncated, damaged or unreadable ({first_line(error)}); get it again") from error


def read_entries(path):
    """The state dict in a checkpoint: under `model`, `module` or `state_dict` or bare, wrappers' prefixes taken off."""
    entries = read_checkpoint(path)
    for key in ("model", "module", "state_dict"):
        if isinstance(entries, dict) and isinstance(entries.get(key), dict):
            entries = entries[key]
            break
    tensors = isinstance(entries, dict) and all(isinstance(value, torch.Tensor) for value in entries.values())
    if not tensors or not entries or not all(isinstance(name, str) for name in entries):
        raise BadInput(f"{path}: holds no state dict; expected tensors by name, bare or under model, module or state_dict")
    for prefix in ("module.", "_orig_mod."):
        entries = {name.removeprefix(prefix): value for name, value in entries.items()}
    return entries


def build(path, what, from_entries, *sizes):
    """`from_entries` on a file; what does not fit becomes BadInput with the first offender's name."""
    try:
        return from_entries(read_entries(path), *sizes)
    except KeyError as error:
        raise BadInput(f"{path}: has no entry {error}; expected {what}") from error
    except (RuntimeError, ValueError) as error:
        problems = [line.strip() for line in str(error).splitlines()]
        problem = problems[1] if len(problems) > 1 else problems[0]
        raise BadInput(f"{path}: does not fit {what}: {problem[:300]}") from error


def first_line(error):
    return str(error).splitlines()[0][:150] if str(error) else type(error).__name__


def write_whole(path, write):
    """`write(temporary path)`, then a rename: a reader, or a kill, finds the old file or the new one, never a part."""
    temporary = path.with_name("." + path.name)
    write(temporary)
    os.replace(temporary, path)


def save_players(out, p):
    for name in ("policy", "policy_ema", "vq", "vq_ema"):
        entries = {"model": getattr(p, name).state_dict()}
        write_whole(out / f"{name}.pt", lambda path: torch.save(entries, path))


def save_grid(path, rows, captions, zoom):
    """Pictures side by side, a row a label, captions underneath; rows: label → images (n, 3, H, W) in [-1, 1]."""
    font = ImageFont.load_default(13)
    first = next(iter(rows.values()))
    cell, margin, gap = first.shape[-1] * zoom, 110, 4
    sheet = Image.new("RGB", (margin + len(captions) * (cell + gap), len(rows) * (cell + gap) + 90), "white")
    pen = ImageDraw.Draw(sheet)
    for y, (label, images) in enumerate(rows.items()):
        pen.text((6, y * (cell + gap) + cell // 2 - 16), label, "black", font)
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for x, picture in enumerate(pixels):
            tile = Image.fromarray(picture).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(tile, (margin + x * (cell + gap), y * (cell + gap)))
    for x, text in enumerate(captions):
        place = (margin + x * (cell + gap), len(rows) * (cell + gap) + 4)
        pen.text(place, textwrap.fill(text, cell // 7), "black", font)
    write_whole(path, lambda temporary: sheet.save(temporary, "PNG"))


# ---- evaluation --------------------------------------------------------------------------------------------------------


class Evaluation:
    """The same captions, noise and real scenes for every model of a run, so that rows differ by their models alone."""

    def __init__(self, scenes, policy, vq, s, autocast):
        generator = torch.Generator().manual_seed(10**6 + s.seed)
        self.s, self.scenes, self.autocast = s, scenes, autocast
        self.attributes, self.captions, self.real = scenes.pairs(s.samples, generator, s.image_size)
        c = policy.config
        self.features, self.text_mask = scenes.text_features(self.captions, c.prefix, c.caption_dim)
        self.noise = torch.rand(s.samples, 1, c.grid**2, generator=generator).to(scenes.device)
        real_codes = torch.cat([vq.encode(rows) for rows in self.real.split(s.micro_batch)])
        self.real_histogram = token_histogram(real_codes, c.codes)

    @torch.no_grad()
    def __call__(self, policy, vq, arm, step):
        """A row of results.json, the pictures (n, 3, H, W) it was measured on and their codes (n, N)."""
        s, codes, images = self.s, [], []
        for rows in torch.arange(s.samples).split(s.micro_batch):
            given = self.features[rows], self.text_mask[rows], self.noise[rows]
            with self.autocast:
                codes.append(sample(policy, *given, s.guidance, s.temperature, s.top_k)[0][:, 0])
                images.append(vq.decode(codes[-1]))
        codes, images = torch.cat(codes), torch.cat(images)
        histogram = token_histogram(codes, len(self.real_histogram))
        row = {"arm": arm, "seed": s.seed, "round": step, **self.scenes.measure(images, self.attributes, self.captions)}
        row |= {"token_kl": token_kl(histogram, self.real_histogram), "token_entropy": token_entropy(histogram)}
        return row, images, codes


MEASURES = ("clip", "frechet", "accuracy", "token_kl", "token_entropy")


def print_table(rows):
    print("\n" + " " * 14 + "".join(f"{name:>15}" for name in MEASURES))
    for row in rows:
        print(f"{row['arm']:14}" + "".join(f"{row[name]:15.3f}" for name in MEASURES))


# ---- the run -----------------------------------------------------------------------------------------------------------

NAMES = {"both": "RankE", "policy": "standard RL", "decoder": "decoder only"}


# What a round's line shows of its log, and under which short name.
SHOWN = {"reward": "reward", "reward_spread": "±", "kl": "KL", "clip_fraction": "clipped", "decoder_reward": "−wr"}
SHOWN |= {"rank_gan": "GAN", "reconstruction": "rec", "consistency": "cons", "discriminator": "disc"}
SHOWN |= {"policy_grad": "|∇π|", "decoder_grad": "|∇D|", "discriminator_grad": "|∇disc|", "seconds": "s"}


def run(s):
    """A whole run: load, evaluate the base, post-train, evaluate, write."""
    out = Path(s.out)
    if (out / "log.jsonl").exists():
        raise BadInput(f"{out} holds a run already; name another folder with --out, or remove it")
    device = s.device if s.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    bf16 = s.precision == "bf16" or (s.precision == "auto" and device == "cuda")
    autocast = torch.autocast(device, torch.bfloat16, enabled=bf16)

    # Load
    vq = build(s.vq or world.FOLDER / "vq.pt", "LlamaGen's VQ tokenizer", vq_from_entries).to(device)
    grid, rest = divmod(s.image_size, vq.config.factor)
    if rest:
        raise BadInput(f"--image-size {s.image_size} is no multiple of the tokenizer's factor {vq.config.factor}")
    policy_file, sizes = s.ckpt or world.FOLDER / "policy.pt", (grid, s.head_size or None)
    policy = build(policy_file, "LlamaGen's text-to-image policy", policy_from_entries, *sizes).to(device)
    if policy.config.codes != vq.config.codes:
        raise BadInput(f"{policy_file}: has {policy.config.codes} codes and the tokenizer {vq.config.codes}; give a pair")
    if policy.config.prefix < world.WORDS:
        raise BadInput(f"{policy_file}: takes captions of {policy.config.prefix} words; a scene's has {world.WORDS}")
    scenes = world.Scenes(read_checkpoint(world.FOLDER / "judges.pt"), device)
    torch.manual_seed(s.seed)  # only a discriminator that starts from nothing needs it
    discriminator = PatchDiscriminator().to(device) if s.ckpt else scenes.discriminator
    p = Players(policy, vq, discriminator, scenes.scorer, scenes.perceptual, s, autocast)

    # The base
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be made a folder ({error.strerror}); name another") from error
    write_whole(out / "settings.json", lambda path: path.write_text(json.dumps(dataclasses.asdict(s), indent=1)))
    base_vq = copy.deepcopy(vq)  # for the picture of the same codes through both decoders
    evaluation = Evaluation(scenes, policy, vq, s, autocast)
    base, base_images, _ = evaluation(policy, vq, "base", 0)

    # Post-train
    text_shape = (policy.config.prefix, policy.config.caption_dim)
    with open(out / "log.jsonl", "w") as log_file, tqdm(total=s.rounds, unit="round", file=sys.stderr) as bar:
        for step in range(s.rounds):
            start = time.perf_counter()
            generator = torch.Generator().manual_seed(s.seed * 10**7 + step)
            _, captions, images = scenes.pairs(max(s.captions, s.real_images), generator, s.image_size)
            features, text_mask = scenes.text_features(captions[: s.captions], *text_shape)
            noise = torch.rand(s.captions, s.rollouts, grid**2, generator=generator).to(device)
            images = images[: s.real_images or s.captions]
            log, _ = one_round(p, s, step, captions[: s.captions], features, text_mask, images, noise)
            log = {"round": step + 1, **log, "seconds": time.perf_counter() - start}
            log_file.write(json.dumps(log) + "\n")
            log_file.flush()
            line = "  ".join(f"{short} {log[name]:7.3g}" for name, short in SHOWN.items() if name in log)
            bar.write(f"round {step + 1:4d}/{s.rounds}  {line}")
            bar.update()
            if (step + 1) % s.save_every == 0 or step + 1 == s.rounds:
                save_players(out, p)

    # What came of it
    name = NAMES[s.arm]
    row, images, codes = evaluation(policy, p.vq_ema, name, s.rounds)
    write_whole(out / "results.json", lambda path: path.write_text(json.dumps([base, row], indent=1)))
    shown, zoom = slice(0, 10), max(1, 96 // s.image_size)
    pictures = {"real": evaluation.real[shown], "base": base_images[shown], name: images[shown]}
    save_grid(out / "samples.png", pictures, evaluation.captions[shown], zoom)
    with torch.no_grad():
        swapped = {f"{name}'s codes,\nbase decoder": base_vq.decode(codes[shown]), f"{name}'s codes,\nits decoder": images[shown]}
    save_grid(out / "decoders.png", swapped, evaluation.captions[shown], zoom)
    print_table([base, row])
    print(f"\nPictures, log, results and checkpoints are in {out}")


def main():
    try:
        settings = parse_settings(sys.argv[1:])
        if settings.pretrain:
            world.pretrain(world.FOLDER, settings.seed)
        else:
            run(settings)
    except BadInput as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
