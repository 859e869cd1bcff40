"""Post-training with RankE: settings, data, the loop, pictures, files.

    python train.py                                         the whole job on the embedded world, minutes on a laptop
    python train.py --arm policy --out runs/policy          standard RL: the decoder stays frozen
    python train.py --ckpt t2i_XL_stage1_256.pt --data DIR  a public checkpoint; lists what it lacks, and where to get it
    python train.py --ckpt Janus-Pro-1B/ --data DIR         the other public policy; its tokenizer is in the folder
    python train.py --ckpt CKPT --sample "a red bus"        pictures from any checkpoint in one of these layouts
    python train.py --evaluate FILE_OR_RUN --data DATA      what the paper reports of a checkpoint: CLIP, FID, token KL
    python train.py … --resume                              go on where the same command was interrupted
    torchrun --nproc_per_node=8 train.py …                  on several GPUs
    python train.py --pretrain --base DIR                   make the embedded world's base again, with --seed
    python train.py --compare --seed 1 --seeds 5            the embedded world: all arms beside each other, a table, two figures

Every option of the method is a field of `rankee.Method`, whose defaults are the authors' for LlamaGen; `SCENES` and `JANUS` below
hold what differs on the embedded world and for Janus-Pro. A run writes to --out: settings.json, log.jsonl (a line a round),
pictures, and policy.pt, vq.pt and their EMAs in LlamaGen's layout, or folders in Janus-Pro's; on the embedded world results.json
too; and the last two checkpoints, state-….pt, each one dict: settings, rounds done, weights, optimizers. No random state: what
round n draws is a function of the seed, n and the process.
"""

import argparse
import copy
import dataclasses
import difflib
import functools
import importlib.util
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import metrics
from metrics import BadInput, build, first_line, read_checkpoint, read_entries, reading, square
from policy import JanusPrompts, janus_entries, janus_from_entries, left_pad, policy_from_entries, t5_features
from rankee import Method, Players, draw, in_rows, one_round
from scenes import world
from vq import lpips_from_entries, patch_discriminator, vq_from_entries

# ---- settings ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings(Method):
    """A run's settings: the method's and these."""

    out: Annotated[str, "folder of the run; must not hold another run"] = "runs/llamagen"
    seed: Annotated[int, "seed of captions, scenes and noise", 0, 10**9] = 0
    ckpt: Annotated[str, "policy in LlamaGen's layout, or Janus-Pro's folder; default: the embedded world's"] = ""
    vq: Annotated[str, "VQ tokenizer in LlamaGen's layout; default: Janus-Pro's own, or beside the policy, as other files"] = ""
    image_size: Annotated[int, "pixels a side (PatchGAN needs 24); over the tokenizer's factor: the token grid", 24] = 256
    head_size: Annotated[int, "size of an attention head; 0: LlamaGen's for the policy's width"] = 0
    data: Annotated[str, "images and captions: a folder, COCO json, LlamaGen jsonl or webdataset tars; or the word scenes"] = ""
    t5: Annotated[str, "folder of the text encoder"] = ""
    t5_features: Annotated[str, "folder of LlamaGen's .npy text features, completed where it lacks some; default: DATA.t5"] = ""
    reward: Annotated[Literal["clip", "hpsv2"], "the scorer: CLIP ViT-L/14 or HPSv2"] = "clip"
    reward_weights: Annotated[str, "the scorer's file"] = ""
    vgg: Annotated[str, "VGG16's file, for LPIPS"] = ""
    lpips: Annotated[str, "file of LPIPS' linear layers"] = ""
    workers: Annotated[int, "processes that read images; 0: none, the run reads them itself"] = 4
    sample: Annotated[list[str], "captions: write a picture of each to --out and stop"] = ()
    prompts: Annotated[str, "a file of captions, a line each, for the same"] = ""
    layout: Annotated[Literal["plain", "geneval"], "geneval: its folders, for its evaluation_metadata.jsonl in --prompts"] = (
        "plain"
    )
    evaluate: Annotated[str, "a policy's file or a run's folder: draw for --count captions of --data, measure and stop"] = ""
    count: Annotated[int, "pictures that --evaluate draws", 2] = 30000
    clip_b32: Annotated[str, "CLIP ViT-B/32's file, for --evaluate"] = ""
    inception: Annotated[str, "Inception's file, for --evaluate"] = ""
    device: Annotated[Literal["auto", "cpu", "cuda"], "where it runs; auto: the GPU where there is one"] = "auto"
    precision: Annotated[Literal["auto", "float32", "bf16"], "of passes, weights are float32; auto: bf16 on a GPU"] = "auto"
    base: Annotated[str, "folder of the embedded world's base, which --pretrain writes; default: scenes/"] = ""
    samples: Annotated[int, "pictures in an evaluation of the embedded world", 2] = 2048
    measure_every: Annotated[int, "rounds between evaluations of the embedded world; 0: the last round alone"] = 0
    measure_base: Annotated[bool, "evaluate the embedded world's base too, before the first round"] = True
    save_every: Annotated[int, "rounds between checkpoints and pictures; the last round always makes them", 1] = 500
    resume: Annotated[bool, "go on from the newest checkpoint in --out"] = False
    changed: Annotated[bool, "with --resume: go on although the settings are not those of the checkpoint"] = False
    patience: Annotated[int, "rounds in a row without finite numbers, and so without an update, that end the run", 1] = 5
    pretrain: Annotated[bool, "make the embedded world's base and stop; with --compare: one for each seed"] = False
    compare: Annotated[bool, "run all arms on the embedded world and compare them; with --resume: go on with that"] = False
    seeds: Annotated[int, "how many seeds --compare takes, from --seed on", 1] = 1

    @property
    def base_folder(self):
        return Path(self.base or world.FOLDER)

    @property
    def janus(self):
        return is_janus(self.ckpt)


def is_janus(ckpt):
    """Whether a checkpoint is a folder in Janus-Pro's layout."""
    return bool(ckpt) and (Path(ckpt) / "config.json").is_file()


# The embedded world, found by measurement (scenes/ says what it is). Everything else is `Method`'s default.
SCENES = dict(
    out="runs/scenes", data="scenes", image_size=world.RESOLUTION, head_size=world.HEAD_SIZE,
    rounds=80, captions=8, guidance=2.0, top_k=0, sample_batch=64, micro_batch=64, recompute=False,
    lr_policy=2e-4, warmup=10, reference="initial", score_guided=True, ema_policy=0.9, ema_policy_every=1,
    lr_decoder=3e-4, lr_discriminator=2e-4, beta1_decoder=0.5, beta2_decoder=0.9, ema_decoder=0.95,
    weight_by="zscore", gan_start=0, lambda_d=0.05, lambda_c=2.0, real_images=32,
)  # fmt: skip

# The authors' for Janus-Pro-1B, where they differ from those for LlamaGen-XL. Two accumulated batches of 2 captions are our 4.
JANUS = dict(out="runs/janus", image_size=384, guidance=5.0, top_k=0, lr_policy=1e-4, lambda_d=0.05, lambda_c=5.0)


def parse_settings(arguments):
    """The command line to `Settings`. Options left out take the paper's values for a public checkpoint, else the embedded world's."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("train.py", None, __doc__, formatter_class=layout, allow_abbrev=False, exit_on_error=False)
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    for name, hint in get_type_hints(Settings, include_extras=True).items():
        kind, text = hint.__origin__, hint.__metadata__[0]
        others = [f"; {of} {preset[name]}" for of, preset in (("scenes", SCENES), ("Janus-Pro", JANUS)) if name in preset]
        shown = f"{text} [{defaults[name]}{''.join(others)}]"
        option = {"dest": name, "default": argparse.SUPPRESS, "help": shown.replace("%", "%%")}
        if kind is bool:
            option["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is list:
            option |= {"nargs": "+", "metavar": "TEXT"}
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
    given = vars(given)
    ckpt = named_checkpoint(given.get("evaluate", given.get("ckpt", "")))
    data = given["data"] if "data" in given else "scenes" if not ckpt or ran_on_scenes(ckpt) else ""
    preset = SCENES if data == "scenes" else JANUS if is_janus(ckpt) else {}
    if given.get("compare"):
        preset = preset | {"out": "runs/compare", "measure_every": 40}
    if "evaluate" in given and "ckpt" in given:
        raise BadInput("--evaluate and --ckpt both name a checkpoint; leave --ckpt out")
    if "evaluate" in given:
        preset = preset | {"out": "runs/evaluation"}
    s = Settings(**(defaults | preset | given | {"ckpt": ckpt}))
    check_settings(s)
    beside = str(Path(s.data)) + ".t5" if s.data not in ("", "scenes") else ""
    return s if s.janus else dataclasses.replace(s, t5_features=s.t5_features or beside)


def named_checkpoint(ckpt):
    """The checkpoint that `ckpt` means: itself, or the policy in a run's folder. Raises BadInput for a folder that is neither's."""
    path = Path(ckpt)
    if path.is_file() and path.name.startswith(("pytorch_model", "model.safetensors", "model-")) and is_janus(path.parent):
        raise BadInput(f"{ckpt}: is a part of a folder in Janus-Pro's layout; name the folder")
    if not ckpt or not path.is_dir() or is_janus(path):
        return ckpt
    if is_janus(path / "policy"):
        return str(path / "policy")
    if not (path / "policy.pt").exists():
        raise BadInput(f"{path / 'policy.pt'}: no such file, nor a config.json: neither a run's folder nor Janus-Pro's, whole")
    return str(path / "policy.pt")


def ran_on_scenes(ckpt):
    """Whether a checkpoint lies in the folder of a run on the embedded world."""
    settings = Path(ckpt).with_name("settings.json")
    with reading(settings, "a run's settings"):
        return settings.exists() and json.loads(settings.read_text("utf-8")).get("data") == "scenes"


def check_settings(s):
    """Raises BadInput for a value or a combination that cannot be meant."""
    for name, hint in get_type_hints(Settings, include_extras=True).items():
        value, (_, *bounds) = getattr(s, name), hint.__metadata__
        low, high = (*bounds, *(0, sys.float_info.max)[len(bounds) :])
        if isinstance(value, (int, float)) and not low <= value <= high:
            bounds = f"from {low} to {high}" if bounds[1:] else f"at least {low}"
            raise BadInput(f"--{name.replace('_', '-')} {value} is not possible; it must be {bounds}")
    if s.keep > s.rollouts:
        raise BadInput(f"--keep {s.keep} keeps more than the {s.rollouts} rollouts of a caption; give at most --rollouts")
    if s.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: this machine has no GPU that PyTorch can use; leave the option out")
    if s.vq and not s.ckpt:
        raise BadInput("--vq without --ckpt: the embedded world's codes mean nothing to another tokenizer; name both")
    if s.data == "scenes" and s.image_size != world.RESOLUTION:
        raise BadInput(
            f"--image-size {s.image_size}: the embedded world's pictures have {world.RESOLUTION} pixels a side; leave it out"
        )
    if s.data == "scenes" and s.janus:
        raise BadInput(f"--ckpt {s.ckpt}: the embedded world's captions are no prompts of Janus-Pro; name --data")
    for name in ("t5", "t5_features", "head_size") if s.janus else ():
        if getattr(s, name):
            raise BadInput(f"--{name.replace('_', '-')}: is LlamaGen's; Janus-Pro's folder has its own; leave it out")
    for name in ("t5", "t5_features", "reward", "reward_weights", "vgg", "lpips"):
        if s.data == "scenes" and getattr(s, name) != getattr(Settings, name):
            raise BadInput(f"--{name.replace('_', '-')}: the embedded world has its own; leave it out, or name --ckpt and --data")


# ---- files -------------------------------------------------------------------------------------------------------------


def write_whole(path, write):
    """`write(temporary path)`, then a rename: a reader, or a kill, finds the old file or the new one, never a part.

    Where it cannot be written the program ends, with one line and status 1.
    """
    temporary = path.with_name("." + path.name)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # a full disk is an OSError, but from torch.save a RuntimeError
        temporary.unlink(missing_ok=True)
        raise SystemExit(
            f"train.py: {path}: cannot be written ({first_line(error)}); what was there before is untouched"
        ) from error


# What a checkpoint holds of `Players`; the frozen networks come from their own files again.
NETWORKS = ["policy", "policy_ema", "vq", "vq_ema"]
STATE = [*NETWORKS, "discriminator", "policy_optimizer", "decoder_optimizer", "discriminator_optimizer"]


def save_state(out, p, s, done):
    """A checkpoint after `done` rounds; the last two are kept."""
    state = {"round": done, "settings": dataclasses.asdict(s)} | {name: getattr(p, name).state_dict() for name in STATE}
    write_whole(out / f"state-{done:06d}.pt", lambda path: torch.save(state, path))
    for old in sorted(out.glob("state-*.pt"))[:-2]:
        old.unlink()


def load_state(p, state):
    """Back from a checkpoint. Of an optimizer the moments alone: its rates are the settings', and --changed may have changed them."""
    for name in STATE:
        part, saved = getattr(p, name), state[name]
        part.load_state_dict(part.state_dict() | {"state": saved["state"]} if "param_groups" in saved else saved)


def save_networks(out, p, s):
    """The networks for other programs, in their own layout."""
    networks = {name: getattr(p, name).state_dict() for name in NETWORKS}
    if s.janus:
        return save_janus(out, Path(s.ckpt), networks, p.policy.config.head_size)
    for name, entries in networks.items():
        write_whole(out / f"{name}.pt", lambda path: torch.save({"model": entries}, path))


def save_janus(out, source, networks, head_size):
    """Folders like `source` with the policy and with its EMA, each with the decoder's EMA. What did not change stays as it is there."""
    entries = read_entries(source)
    on_cpu = lambda name: {key: value.cpu() for key, value in networks[name].items()}  # reordering rows there spares the GPU
    tokenizer = {f"gen_vision_model.{name}": value for name, value in on_cpu("vq_ema").items()}
    for name in ("policy", "policy_ema"):
        ours = janus_entries(on_cpu(name), head_size) | tokenizer
        changed = {key: ours[key] for key in entries.keys() & ours.keys() if not torch.equal(entries[key].float(), ours[key])}
        make_folder(out / name)
        write_whole(out / name / "pytorch_model.bin", lambda path: torch.save(entries | changed, path))
        for file in source.glob("*.json"):  # config.json, the tokenizer's, the processor's
            if not file.name.endswith(".index.json"):
                write_whole(out / name / file.name, lambda path: path.write_bytes(file.read_bytes()))


def differences(was, now):
    """The options of settings `was` that are not those of `now`; but for the text encoder, which is looked for only where features lack."""
    names = [name for name in now if was.get(name) != now[name] and name != "t5"]
    return ", ".join(f"--{name.replace('_', '-')} {was.get(name)}" for name in names)


def newest_checkpoint(out, s, changed):
    """The newest checkpoint in `out` that can be read; round 0 where none was written.

    Raises BadInput where all are damaged, or the settings are not `s`, unless `changed`.
    """
    paths = sorted(out.glob("state-*.pt"))
    while paths:
        path = paths.pop()
        try:
            state = read_checkpoint(path)
        except BadInput as error:
            if not paths:
                raise BadInput(f"--resume: {error}; there is no other in {out}: begin again with another --out") from error
            print(f"train.py: {error}; the one before it is used", file=sys.stderr)
            continue
        other = differences(state["settings"], dataclasses.asdict(s))
        if other and not changed:
            raise BadInput(f"--resume: {path} was made with {other}; give that again, or --changed to go on without")
        return state
    return {"round": 0}


def to_picture(image):
    """An image (3, H, W) in [-1, 1] as a PIL picture."""
    return Image.fromarray(((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


def save_grid(path, columns, captions):
    """A row a caption, a column a label; columns: label → images (n, 3, H, W) in [-1, 1]."""
    font = ImageFont.load_default(13)
    cell, gap, margin, head = max(96, next(iter(columns.values())).shape[-1]), 4, 190, 24
    sheet = Image.new("RGB", (margin + len(columns) * (cell + gap), head + len(captions) * (cell + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for y, text in enumerate(captions):
        lines = textwrap.wrap(text, 26, max_lines=cell // 17, placeholder=" …")
        pen.text((6, head + y * (cell + gap) + 4), "\n".join(lines), "black", font)
    for x, (label, images) in enumerate(columns.items()):
        pen.text((margin + x * (cell + gap), 4), label, "black", font)
        for y, image in enumerate(images):
            tile = to_picture(image).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(tile, (margin + x * (cell + gap), head + y * (cell + gap)))
    write_whole(path, lambda temporary: sheet.save(temporary, "PNG"))


# ---- public files ------------------------------------------------------------------------------------------------------

HUB = "https://huggingface.co"
# What a run on a public policy needs: option → names it goes by, and where it is published.
PUBLIC = {
    "ckpt": (("t2i_XL_stage1_256.pt",), f"{HUB}/peizesun/llamagen_t2i, or the folder Janus-Pro-1B of {HUB}/deepseek-ai"),
    "vq": (("vq_ds16_t2i.pt", "vq_ema.pt", "vq.pt"), f"{HUB}/peizesun/llamagen_t2i"),  # the other two: what a run leaves
    "t5": (("flan-t5-xl",), f"{HUB}/google/flan-t5-xl"),
    "clip": (("open_clip_model.safetensors",), f"{HUB}/timm/vit_large_patch14_clip_224.openai"),
    "hpsv2": (("HPS_v2.1_compressed.pt",), f"{HUB}/xswu/HPSv2"),
    "clip_b32": (("ViT-B-32.safetensors",), f"{HUB}/timm/vit_base_patch32_clip_224.openai, open_clip_model.safetensors there"),
    "inception": (("pt_inception-2015-12-05-6726825d.pth",), "https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights"),
    "vgg": (("vgg16-397923af.pth",), "https://download.pytorch.org/models/vgg16-397923af.pth"),
    "lpips": (("vgg.pth",), "https://github.com/richzhang/PerceptualSimilarity/tree/master/lpips/weights/v0.1"),
    "data": (("images with captions",), "your disk; --help and the README say in which layouts"),
}
REWARDS = {"clip": (True, 64), "hpsv2": (False, 80)}  # what the shapes do not say: QuickGELU, width of a vision head


def find_files(s, *needed, captions=True):
    """`s` with the path of the policy's files and every file `needed`: as named, beside the policy, or where torchvision keeps
    its downloads. Without `captions` no text is to be read.

    Raises BadInput that lists all that is missing at once.
    """
    needed = ["ckpt", *([] if s.janus else ["vq"]), *needed]
    if captions and not s.janus and not Path(s.t5_features or "?").exists():
        needed.insert(2, "t5")
    folders, found, missing = [Path(s.ckpt).parent, Path(torch.hub.get_dir()) / "checkpoints"], {}, []
    for option in needed:
        names, source = PUBLIC[s.reward if option == "reward_weights" else option]
        named = getattr(s, option)
        paths = [Path(named)] if named else [folder / name for folder in folders for name in names]
        found[option] = str(next((path for path in paths if path.exists()), ""))
        if not found[option]:
            wrong = named and f"{named}: no such file; "
            missing.append(f"--{option.replace('_', '-'):16} {wrong}{names[0]} from {source}")
    if ("t5" in needed or s.janus) and not importlib.util.find_spec("transformers"):
        instead = "reads Janus-Pro's tokenizer" if s.janus else "runs T5; or --t5-features, made elsewhere"
        missing.append(f"pip install transformers, which {instead}")
    if missing:
        raise BadInput(("\n  " if missing[1:] else " ").join(["this run still needs", *missing]))
    return dataclasses.replace(s, **found)


# ---- data --------------------------------------------------------------------------------------------------------------


# A pair is (name, image, caption): the name of its text features; the image's path or, in a tar, (path, offset, size), read
# where it lies and never unpacked.


def read_place(place):
    """The bytes of a file or of a member of a tar."""
    path, offset, size = place if isinstance(place, tuple) else (place, 0, -1)
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def same_name_pairs(source):
    """(name, image, caption's bytes) of a folder's or a tar's images, with .txt files of the same names."""
    if source.is_dir():
        files = [(str(path.relative_to(source)), path) for path in sorted(source.rglob("*"))]
    else:
        with tarfile.open(source, "r:") as tar:  # reads headers and skips over what they head
            files = [
                (os.path.normpath(f"{source.stem}/{member.name}"), (source, member.offset_data, member.size)) for member in tar
            ]
    texts = {name.removesuffix(".txt"): place for name, place in files if name.endswith(".txt")}
    for name, place in files:
        name, suffix = os.path.splitext(name)
        if suffix.lower() in metrics.SUFFIXES:
            yield name, place, read_place(texts[name]) if name in texts else b""


def coco_pairs(file):
    """The same of a COCO captions file with its images beside it, or as COCO lays them out: annotations/captions_X.json and X/."""
    content = json.loads(file.read_text("utf-8"))
    images = {image["id"]: image["file_name"] for image in content["images"]}
    folder = file.parent.parent / file.stem.removeprefix("captions_")
    for note in content["annotations"]:
        name = images[note["image_id"]]
        yield str(note["id"]), file.parent / name if (file.parent / name).exists() else folder / name, note["caption"].encode()


def jsonl_pairs(file):
    """The same of LlamaGen's own lists, whose extraction tool names a line's features LIST/LINE.npy."""
    for number, line in enumerate(file.read_text("utf-8").split("\n")):  # captions may hold what splitlines() splits at
        if not line.strip():
            continue
        entry = json.loads(line)
        text = entry["text"] if isinstance(entry["text"], str) else entry["text"][0]
        yield f"{file.stem}/{number}", file.parent / entry["image_path"], text.encode()


def list_pairs(source):
    """Every pair of a folder, a .json, a .jsonl, a .tar or a folder of .tar, and a line on each without a caption. Raises BadInput."""
    source, pairs, skipped = Path(source), [], []
    readers = {".json": coco_pairs, ".jsonl": jsonl_pairs, ".tar": same_name_pairs}
    if source.is_file() and source.suffix not in readers:
        raise BadInput(f"{source}: not a data source; expected a folder, .json, .jsonl or .tar")
    for file in sorted(source.glob("*.tar")) or [source]:
        with reading(file, "a file that is whole, in one of the layouts that --help names"):
            for name, image, text in readers.get(file.suffix, same_name_pairs)(file):
                caption = text.decode("utf-8", "replace").strip()
                if caption and "\ufffd" not in caption:
                    pairs.append((name, image, caption))
                else:
                    skipped.append(f"{name}: no caption, or not in UTF-8")
    if not pairs:
        raise BadInput(f"{source}: holds no image with a caption; --help says in which layouts they may lie")
    return pairs, skipped


class Pairs(Dataset):
    """An endless stream of pairs, epoch after epoch, each in an order of its own; item `position` depends on nothing before it."""

    def __init__(self, pairs, features_of, image_size, seed):
        self.pairs, self.features_of, self.image_size, self.seed = pairs, features_of, image_size, seed

    def read(self, name, image, caption):
        """Caption, its `features_of(caption, name)` (n, …) and image (3, H, W) in [-1, 1], its middle square."""
        features = self.features_of(caption, name)
        with Image.open(io.BytesIO(read_place(image))) as picture:
            return caption, features, square(self.image_size, picture.convert("RGB"))

    def __getitem__(self, position):
        """What `read` gives, and a line on each pair skipped before it: an unreadable one leaves its place to the next."""
        epoch, place = divmod(position, len(self.pairs))
        generator = torch.Generator().manual_seed(self.seed * 10**7 + epoch)
        skipped = []
        for i in torch.randperm(len(self.pairs), generator=generator).roll(-place).tolist():
            try:
                return self.read(*self.pairs[i]), skipped
            except metrics.UNREADABLE as error:
                skipped.append(f"{self.pairs[i][0]}: {first_line(error)}")
        return None, skipped


def saved_features(folder, prefix, caption, name):
    """Text features (n, C) of a pair from LlamaGen's .npy."""
    return torch.from_numpy(np.load(folder / f"{name}.npy"))[0, :prefix]


def pairs_features(s, pairs, config, device, autocast):
    """What gives the text features of a pair, by caption and name, as `Pairs` asks: Janus' words, or the files made of T5's features."""
    if s.janus:
        return JanusPrompts(s.ckpt)
    return functools.partial(saved_features, complete_features(s, pairs, config, device, autocast), config.prefix)


def complete_features(s, pairs, config, device, autocast):
    """Computes the text features that the folder --t5-features lacks, in LlamaGen's layout: NAME.npy, (1, n, C) float32.

    captions.json beside them says what they are of. Raises BadInput where that, or their width, is not what is asked for.
    Returns the folder.
    """
    folder = Path(s.t5_features)
    notes = folder / "captions.json"
    known = json.loads(notes.read_text("utf-8")) if notes.exists() else {}
    for name, _, caption in pairs:
        if known.get(name, caption) != caption:
            raise BadInput(f"{folder}: the features of {name} are of another caption; name another folder with --t5-features")
    lacking = {name: caption for name, _, caption in pairs if not (folder / f"{name}.npy").exists()}
    if lacking:
        t5 = find_files(dataclasses.replace(s, t5_features="")).t5
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(notes, lambda path: path.write_text(json.dumps(known | lacking), "utf-8"))
        computed = t5_features(t5, list(lacking.values()), config.prefix, device, autocast)
        for name, features in zip(lacking, tqdm(computed, "text features", len(lacking), file=sys.stderr)):
            path = folder / f"{name}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda temporary: np.save(temporary, features[None].numpy()))
    width = np.load(folder / f"{pairs[0][0]}.npy", mmap_mode="r").shape[-1]
    if width != config.caption_dim:
        raise BadInput(f"{folder}: text features {width} wide; the policy takes {config.caption_dim}: another encoder's")
    return folder


class PublicWorld:
    """Images with captions from --data, with the public networks as judges: to the loop, what `world.Scenes` is."""

    def __init__(self, s, config, device, autocast, start, rank, processes):
        self.s, self.config, self.device = s, config, device
        pairs, skipped = list_pairs(s.data)
        scorer = build(s.reward_weights, f"the scorer {s.reward}", metrics.clip_from_entries, *REWARDS[s.reward])
        self.scorer, self.perceptual = scorer.to(device), None
        if s.arm != "policy":
            linear = read_entries(s.lpips)
            self.perceptual = build(s.vgg, f"VGG16 with {s.lpips}", lpips_from_entries, linear).to(device)
        if rank > 0:  # the first process computes what lacks, the others find it
            dist.barrier()
        features_of = pairs_features(s, pairs, config, device, autocast)  # hours, so after all that may be refused
        if rank == 0 and processes > 1:
            dist.barrier()
        torch.manual_seed(s.seed)  # the discriminator starts from nothing
        self.discriminator = patch_discriminator().to(device)
        stream, size = Pairs(pairs, features_of, s.image_size, s.seed), max(s.captions, s.real_images)
        self.skipped = set()
        self.report(skipped)
        self.captions, self.features, self.text_mask, self.real = self.stack([stream[i] for i in range(8)])
        noise = torch.rand(8, 1, config.grid**2, generator=torch.Generator().manual_seed(10**6 + s.seed))
        self.noise = noise.to(device)
        own = range(start * processes + rank, s.rounds * processes, processes)  # batches, none of them another process'
        positions = [range(batch * size, (batch + 1) * size) for batch in own]
        loading = {"num_workers": s.workers, "collate_fn": list, "worker_init_fn": ignore_interrupt}
        self.batches = iter(DataLoader(stream, batch_sampler=positions, **loading))

    def report(self, skipped):
        for line in sorted(set(skipped) - self.skipped):
            self.skipped.add(line)
            tqdm.write(f"skipped {line} ({len(self.skipped)} so far)", file=sys.stderr)

    def stack(self, items):
        for item, skipped in items:
            self.report(skipped)
            if item is None:
                raise BadInput(f"{self.s.data}: none of its {len(self.skipped)} images can be read")
        captions, features, images = zip(*(item for item, _ in items))
        features, text_mask = left_pad(features, self.config.prefix)
        return list(captions), features.to(self.device), text_mask.to(self.device), torch.stack(images).to(self.device)

    def batch(self, generator):
        return self.stack(next(self.batches))


# ---- the run -----------------------------------------------------------------------------------------------------------

NAMES = {"both": "RankE", "policy": "standard RL", "decoder": "decoder only"}

# What a round's line shows of its log, and under which short name.
SHOWN = {"reward": "reward", "reward_spread": "±", "kl": "KL", "clip_fraction": "clipped", "decoder_reward": "−wr"}
SHOWN |= {"rank_gan": "GAN", "reconstruction": "rec", "consistency": "cons", "discriminator": "disc"}
SHOWN |= {"policy_grad": "|∇π|", "decoder_grad": "|∇D|", "discriminator_grad": "|∇disc|", "seconds": "s"}


def print_table(rows):
    print("\n" + "".join(f"{name:>15}" for name in rows[0]))
    for row in rows:
        print("".join(f"{value:15.3f}" if isinstance(value, float) else f"{value:>15}" for value in row.values()))


def load_pair(s):
    """Policy and tokenizer, on the CPU, with the device and the autocast of their passes. Raises BadInput where they do not fit."""
    device = s.device if s.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    bf16 = s.precision == "bf16" or (s.precision == "auto" and device == "cuda")
    vq_file, part = (s.ckpt, "gen_vision_model.") if s.janus and not s.vq else (s.vq or s.base_folder / "vq.pt", "")
    vq = build(vq_file, "a VQ tokenizer as LlamaGen's", lambda entries: vq_from_entries(under(part, entries)))
    grid, rest = divmod(s.image_size, factor := 2 ** (len(vq.config.multipliers) - 1))
    if rest:
        raise BadInput(f"--image-size {s.image_size} is no multiple of the tokenizer's factor {factor}")
    policy_file = s.ckpt or s.base_folder / "policy.pt"
    if s.janus:
        with reading(policy_file, "Janus-Pro's folder, with its config.json and tokenizer.json"):
            sizes = json.loads((Path(s.ckpt) / "config.json").read_text("utf-8"))
            pad = JanusPrompts(s.ckpt).pad
        policy = build(policy_file, "Janus-Pro", janus_from_entries, sizes, pad, grid)
    else:
        policy = build(policy_file, "LlamaGen's text-to-image policy", policy_from_entries, grid, s.head_size or None)
    if policy.config.codes != vq.config.codes:
        raise BadInput(f"{policy_file}: has {policy.config.codes} codes and the tokenizer {vq.config.codes}; give a pair")
    return policy, vq, device, torch.autocast(device, torch.bfloat16, enabled=bf16)


def under(prefix, entries):
    """The entries whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}


def listen():
    """The signals received from here on, a list: Ctrl-C and SIGTERM are noted once and wait for the round's end; a second one kills."""
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return received


def ignore_interrupt(worker):
    """Ctrl-C reaches a terminal's whole process group; a loader's worker must outlive the round."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def agreed(received, device):
    """The signal that any of the processes received, 0 for none: all stop after the same round."""
    stop = torch.tensor(max(received, default=0), device=device)
    if dist.is_initialized():
        dist.all_reduce(stop, dist.ReduceOp.MAX)
    return stop.item()


def join_processes(device):
    """This process' rank and how many torchrun started; (0, 1) without it."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=12))  # torchrun ends them sooner
    return rank, processes


def make_folder(path, *claims):
    """Makes the folder; with `claims`, names of files, makes these too, which must not be there yet. Raises BadInput."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        for name in claims:
            (path / name).touch(exist_ok=False)
    except OSError as error:
        raise BadInput(f"--out {path}: cannot be used ({error.strerror}); name another folder") from error


@torch.no_grad()
def paint(policy, decoders, s, autocast, prompts):
    """Codes (n, N) drawn as rollouts are, for features (n, T, C), text_mask (n, T) and noise (n, 1, N), then what each of the
    `decoders` makes of them, images (n, 3, H, W)."""
    with autocast:
        codes = draw(policy, s, *prompts)[0][:, 0]
        return codes, *(in_rows(vq.decode, codes, size=s.micro_batch) for vq in decoders)


def run(s):
    """A whole run: load, draw from the base, post-train, draw, write."""
    out = Path(s.out)
    if (out / "log.jsonl").exists() and not s.resume:
        raise BadInput(f"{out} holds a run already; go on with --resume, name another folder with --out, or remove it")

    # Load
    if s.ckpt or s.data != "scenes":
        judges = ["reward_weights"] if s.arm == "policy" else ["reward_weights", "vgg", "lpips"]
        s = find_files(s, captions=False) if s.data == "scenes" else find_files(s, *judges, "data")
    resume, changed, s = s.resume, s.changed, dataclasses.replace(s, resume=False, changed=False)  # a checkpoint's settings
    state = newest_checkpoint(out, s, changed) if resume else {"round": 0}
    results = out / "results.json"
    rows = json.loads(results.read_text()) if resume and results.exists() else []
    pictures = lambda done: out / f"pictures-{done:06d}.png"  # the last file of a save
    if rows and rows[-1]["round"] == s.rounds == state["round"] and pictures(s.rounds).exists():
        return print_table(rows)  # all done before
    policy, vq, device, autocast = load_pair(s)
    if s.data == "scenes" and policy.config.prefix <= len(world.ATTRIBUTES):
        raise BadInput(f"{s.ckpt}: takes captions of {policy.config.prefix} words; a scene's has more")
    rank, processes = join_processes(device)
    if s.data == "scenes":
        w = world.Scenes(read_checkpoint(s.base_folder / "judges.pt"), s, policy.config, vq.to(device), device)
    else:
        w = PublicWorld(s, policy.config, device, autocast, state["round"], rank, processes)
    policy, vq = policy.to(device), vq.to(device)
    p = Players(policy, vq, w.discriminator, w.scorer, w.perceptual, s, autocast)

    # The base
    if rank == 0:
        make_folder(out)
    base_vq = copy.deepcopy(vq)  # for the picture of the same codes through both decoders
    prompts = w.features, w.text_mask, w.noise
    shown = [tensor[:8] for tensor in prompts]
    codes, before = paint(policy, [base_vq], s, autocast, prompts if s.measure_base else shown)
    rows = [row for row in rows if 0 < row["round"] <= state["round"]]
    if s.data == "scenes" and s.measure_base:
        rows.insert(0, {"arm": "base", "seed": s.seed, "round": 0, **w.measure(codes, before)})

    def show(done):
        """All of a save that a checkpoint can make again."""
        save_networks(out, p, s)
        _, frozen, ours = paint(policy, [base_vq, p.vq_ema], s, autocast, shown)
        columns = {"real": w.real[:8], "before": before[:8], "frozen decoder": frozen, NAMES[s.arm]: ours}
        save_grid(pictures(done), columns, w.captions[:8])

    # Where an earlier run stopped
    if state["round"]:
        load_state(p, state)
    if rank == 0:
        make_folder(out, *([] if resume else ["log.jsonl"]))
        if state["round"] and not pictures(state["round"]).exists():
            show(state["round"])
        log_path = out / "log.jsonl"
        lines = log_path.read_text().splitlines()[: state["round"]] if log_path.exists() else []
        write_whole(log_path, lambda path: path.write_text("".join(line + "\n" for line in lines)))
        write_whole(out / "settings.json", lambda path: path.write_text(json.dumps(dataclasses.asdict(s), indent=1)))

    # Post-train
    received, skipped = listen(), 0
    silent = {"disable": True} if rank > 0 else {}  # left out, TQDM_DISABLE decides
    with open(log_path if rank == 0 else os.devnull, "a") as log_file, tqdm(total=s.rounds, **silent) as bar:
        bar.update(state["round"])
        for step in range(state["round"], s.rounds):
            start = time.perf_counter()
            generator = torch.Generator().manual_seed((s.seed * 10**7 + step) * processes + rank)
            captions, features, text_mask, images = w.batch(generator)
            captions, features, text_mask = captions[: s.captions], features[: s.captions], text_mask[: s.captions]
            images = images[: s.real_images or s.captions]
            noise = torch.rand(s.captions, s.rollouts, policy.config.grid**2, generator=generator).to(device)
            log, _ = one_round(p, s, step, captions, features, text_mask, images, noise)
            log, stop = log | {"seconds": time.perf_counter() - start}, agreed(received, device)

            wrong = [name for name, value in log.items() if not math.isfinite(value)]
            skipped = skipped + 1 if wrong else 0
            if skipped == s.patience:
                where = f"round {step + 1}: {', '.join(wrong)} not finite, {skipped} times in a row"
                sys.exit(f"train.py: {where}; {out} keeps what was saved")
            if rank == 0:
                print(json.dumps({"round": step + 1} | log | dict.fromkeys(wrong)), file=log_file, flush=True)  # JSON has no NaN
                line = "  ".join(f"{short} {log[name]:7.3g}" for name, short in SHOWN.items() if name in log)
                bar.write(
                    f"round {step + 1:4d}/{s.rounds}  {line}"
                    + f"  NO UPDATE ({skipped} in a row): {', '.join(wrong)}" * bool(wrong)
                )
            bar.update()
            last = step + 1 == s.rounds
            if rank == 0 and s.data == "scenes" and (last or s.measure_every and (step + 1) % s.measure_every == 0):
                measured = w.measure(*paint(policy, [p.vq_ema], s, autocast, prompts))
                rows.append({"arm": NAMES[s.arm], "seed": s.seed, "round": step + 1, **measured})
                write_whole(results, lambda path: path.write_text(json.dumps(rows, indent=1)))
            if rank == 0 and (stop or (step + 1) % s.save_every == 0 or last):
                save_state(out, p, s, step + 1)
                show(step + 1)
            if stop:
                bar.write(f"stopped after round {step + 1}; --resume goes on")
                if processes > 1:
                    dist.barrier()  # torchrun ends the others when one has gone, and the first may still be saving
                sys.exit(128 + stop)
    if rank > 0:
        return

    # What came of it
    if s.data == "scenes":
        print_table(rows)
    if device == "cuda":
        print(f"\nPeak of GPU memory: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB on {torch.cuda.get_device_name()}")
    print(f"\nPictures, log and checkpoints are in {out}")


# ---- pictures from a checkpoint ----------------------------------------------------------------------------------------


# What decides a picture.
DRAWN_WITH = ["ckpt", "vq", "seed", "guidance", "temperature", "top_k", "image_size", "head_size", "precision"]
DRAWN_WITH += ["data", "count", "sample", "prompts", "layout"]


def claim_pictures(s):
    """Notes in --out what its pictures are drawn with, files by their contents. Raises BadInput where they are another command's."""
    note = Path(s.out) / "pictures.json"
    now = {name: getattr(s, name) for name in DRAWN_WITH} | {"sample": list(s.sample)}  # JSON has no tuples
    now |= {
        name: metrics.file_hash(now[name])
        for name in ("ckpt", "vq", "prompts", "data")
        if Path(now[name]).is_file() or name == "ckpt" and is_janus(now[name])
    }
    was = json.loads(note.read_text()) if note.exists() else now
    if was["count"] < s.count:  # more are drawn beside those
        was["count"] = s.count
    if other := differences(was, now):
        raise BadInput(f"--out {s.out} holds pictures drawn with {other}; give that again, or name another folder")
    make_folder(Path(s.out))
    write_whole(note, lambda path: path.write_text(json.dumps(now)))


def write_picture(path, image, codes):
    make_folder(path.parent)
    write_whole(path.with_suffix(".npy"), lambda temporary: np.save(temporary, codes.cpu().numpy()))
    write_whole(path, lambda temporary: to_picture(image).save(temporary, "PNG"))


def write_pictures(s, pair, paths, features_of):
    """A picture at each path that is not there yet, from text features `features_of(i)` (n, C), and its codes (N,) beside it as .npy.

    Picture i is a function of the files, the settings and i alone (but for rounding), whatever else is drawn and in how many goes.
    """
    policy, vq, device, autocast = pair
    policy, vq, N = policy.to(device), vq.to(device), policy.config.grid**2
    lacking = [i for i, path in enumerate(paths) if not path.exists()]
    for chunk in tqdm([lacking[i : i + s.sample_batch] for i in range(0, len(lacking), s.sample_batch)], "pictures"):
        features, text_mask = left_pad([features_of(i) for i in chunk], policy.config.prefix)
        noise = [torch.rand(1, N, generator=torch.Generator().manual_seed(s.seed * 10**7 + i)) for i in chunk]
        prompts = [tensor.to(device) for tensor in (features, text_mask, torch.stack(noise))]
        codes, images = paint(policy, [vq], s, autocast, prompts)
        for path, code, image in zip([paths[i] for i in chunk], codes, images):
            write_picture(path, image, code)


def read_prompts(s):
    """The captions of --sample and --prompts, and GenEval's own line for each of its captions."""
    with reading(f"--prompts {s.prompts}", "a caption a line, or GenEval's .jsonl for its layout"):
        lines = [line for line in Path(s.prompts).read_text("utf-8").split("\n") if line.strip()] if s.prompts else []
        captions = [json.loads(line)["prompt"] for line in lines] if s.layout == "geneval" else lines
    if not captions and not s.sample:
        raise BadInput(f"--prompts {s.prompts}: holds no caption; expected one a line")
    return [*s.sample, *captions], [json.dumps({"prompt": text}) for text in s.sample] + lines


def write_samples(s):
    """Pictures of each caption in --sample and --prompts, in --out: one, or four in GenEval's layout."""
    s = find_files(dataclasses.replace(s, t5_features=""), captions=s.data != "scenes") if s.ckpt or s.data != "scenes" else s
    captions, lines = read_prompts(s)
    pair = load_pair(s)
    policy, _, device, autocast = pair
    c, out = policy.config, Path(s.out)
    if s.data == "scenes":
        for text in captions:
            if not 0 < len(text.split()) <= c.prefix or not set(text.split()) <= set(world.VOCABULARY):
                known = ", ".join(world.VOCABULARY[1:-1])
                raise BadInput(f"--sample {text!r}: the embedded world reads 1 to {c.prefix} of the words {known}")
        features = world.word_features(captions, c.caption_dim)
    else:
        some = map(JanusPrompts(s.ckpt), captions) if s.janus else t5_features(s.t5, captions, c.prefix, device, autocast)
        features = list(some)
    if s.layout == "geneval":
        claim_pictures(s)
        for i, line in enumerate(lines):
            make_folder(out / f"{i:05d}")
            write_whole(out / f"{i:05d}" / "metadata.jsonl", lambda path: path.write_text(line, "utf-8"))
        paths = [out / f"{i:05d}" / "samples" / f"{k:04d}.png" for i in range(len(captions)) for k in range(4)]
    else:
        plain = [re.sub("[^a-z0-9]+", " ", text.lower())[:60].strip() for text in captions]
        paths = [out / f"{i:05d} {text}.png" for i, text in enumerate(plain)]
        for path in paths:
            path.unlink(missing_ok=True)  # a few pictures: what another seed or checkpoint made is made again
    write_pictures(s, pair, paths, lambda i: features[i * len(captions) // len(paths)])
    print(*paths, sep="\n")


def drawing_protocol(s):
    """Lines that say how pictures were drawn, and from which files."""
    yield f"seed {s.seed}, guidance {s.guidance}, top-k {s.top_k}, temperature {s.temperature}"
    yield f"{s.image_size} px; real pictures: middle squares, resized with Lanczos"
    yield from (metrics.file_hash(file) for file in (s.ckpt, s.vq) if file)


# The paper's row of a public file: MS-COCO, 30,000 pictures.
PAPER = {
    "t2i_XL_stage1_256.pt": {"CLIP": 31.54, "FID": 15.24, "token KL": 0.091},
    "Janus-Pro-1B": {"CLIP": 33.20, "FID": 18.95},
}


def evaluate(s):
    """What the paper reports of a checkpoint: draws a picture for --count captions, each of another image, and measures them."""
    if s.data == "scenes":
        policy, vq, device, autocast = load_pair(s := find_files(s, captions=False))
        w = world.Scenes(read_checkpoint(s.base_folder / "judges.pt"), s, policy.config, vq.to(device), device)
        codes, images = paint(policy.to(device), [vq], s, autocast, (w.features, w.text_mask, w.noise))
        print_table([{"checkpoint": Path(s.ckpt).parent.name[:14], **w.measure(codes, images)}])
        print(f"\n{s.samples} scenes; Fréchet distances by the embedded world's own feature net, not Inception")
        return print(*drawing_protocol(s), sep="\n")
    s, out = find_files(s, "clip_b32", "inception", "data"), Path(s.out)
    pair = load_pair(s)
    build(s.clip_b32, "the scorer CLIP", metrics.clip_from_entries, *REWARDS["clip"])  # refused now, not after a day
    metrics.inception(s.inception)
    pairs, skipped = list_pairs(s.data)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(s.seed)).tolist()
    chosen = list({pairs[i][1]: pairs[i] for i in order}.values())[: s.count]  # one caption an image
    policy, vq, device, autocast = pair
    claim_pictures(s)
    stream, names = Pairs(chosen, pairs_features(s, chosen, policy.config, device, autocast), s.image_size, s.seed), {}
    for name, image, caption in tqdm(chosen, "real pictures"):
        path = out / "real" / f"{name}.png"
        try:
            if not path.exists():
                real = stream.read(name, image, caption)[2].to(device)
                write_picture(path, real, vq.to(device).encode(real[None])[0])
            names[name] = caption
        except metrics.UNREADABLE as error:
            skipped.append(f"{name}: {first_line(error)}")
    for i, line in enumerate(skipped, 1):
        print(f"skipped {line} ({i} so far)", file=sys.stderr)
    write_whole(out / "captions.json", lambda path: path.write_text(json.dumps(names), "utf-8"))
    paths = [out / "samples" / f"{name}.png" for name in names]
    drawn_for = [(caption, name) for name, caption in names.items()]
    write_pictures(s, pair, paths, lambda i: stream.features_of(*drawn_for[i]))

    drawn, real, common = out / "samples", out / "real", {"workers": s.workers, "device": device}
    results = [
        metrics.clip(drawn, captions=out / "captions.json", weights=s.clip_b32, **common),
        metrics.fid(drawn, real, weights=s.inception, image_size=min(s.image_size, 256), **common),  # published at 256 px
        metrics.shift(drawn, real, codes=policy.config.codes, **common),
    ]
    row = {"checkpoint": Path(s.ckpt).name[:14], **{name: value for numbers, _ in results for name, value in numbers.items()}}
    paper = PAPER.get(Path(s.ckpt).name, {})
    print_table([row] + [{name: paper.get(name, "") for name in row} | {"checkpoint": "paper"}] * bool(paper))
    print(f"\nDrawn for {len(names)} captions of {s.data}, one an image", *drawing_protocol(s), sep="\n")
    print(*(line for _, protocol in results for line in protocol), sep="\n")


# ---- all arms beside each other ----------------------------------------------------------------------------------------

# Name → the options that make it of RankE. All have the same base, seeds and number of rollouts.
ARMS = {
    "real images": "--arm decoder --lambda-d 0 --lambda-c 0 --gan none --fakes reconstruction",  # a decoder trained longer
    "standard RL": "--arm policy",
    "decoder only": "--arm decoder --gan rank",
    "uniform GAN": "--arm both --gan uniform",
    "RankE": "--arm both --gan rank",
}


def side_by_side(commands, at_once):
    """Runs this program with each list of options, `at_once` at a time with a core each. Where one fails, or this process is
    told to stop, all end after their round and a save, and this one with the same status."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    received, waiting, running, status = listen(), list(commands), [], 0
    with tqdm(total=len(commands), unit="run") as bar:
        while not status and (running or waiting):
            while waiting and len(running) < at_once:
                command = [sys.executable, __file__, *map(str, waiting.pop(0))]
                # A session of its own: what a child has started ends with it, and Ctrl-C reaches it through this process alone.
                running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment, start_new_session=True))
            time.sleep(0.2)
            status = 128 + received[0] if received else max(abs(child.poll() or 0) for child in running)
            still = [child for child in running if child.poll() is None]
            if len(still) < len(running):
                bar.update(len(running) - len(still))
            running = still
    for child in running:
        os.killpg(child.pid, signal.SIGTERM)
    for child in running:
        child.wait()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if status:
        sys.exit(status)


def compare(s, arguments):
    """Every arm with every seed, each an ordinary run in a folder of its own; then the table and the figures."""
    if s.data != "scenes":
        raise BadInput("--compare: the arms are compared on the embedded world; leave --data out")
    if not importlib.util.find_spec("matplotlib"):
        raise BadInput("--compare draws figures: pip install matplotlib")
    out, seeds = Path(s.out), range(s.seed, s.seed + s.seeds)
    make_folder(out, *([] if s.resume else ["results.json"]))
    folders = {seed: {arm: out / f"seed-{seed}" / arm.replace(" ", "-") for arm in ARMS} for seed in seeds}
    bases = {seed: out / f"seed-{seed}" / "base" if s.pretrain else s.base_folder for seed in seeds}
    command = lambda seed: [*arguments, "--no-compare", "--no-pretrain", "--seeds", 1, "--seed", seed, "--base", bases[seed]]
    lacking = [seed for seed in seeds if s.pretrain and not (bases[seed] / "judges.pt").exists()]
    side_by_side([[*command(seed), "--pretrain"] for seed in lacking], 1)  # each has two processes of its own
    # A seed's arms have the same base; one of them measures it.
    measured = lambda arm: ["--measure-every", s.measure_every, "--measure-base" if arm == "RankE" else "--no-measure-base"]
    own = lambda seed, arm: ["--resume", *measured(arm), "--out", folders[seed][arm], *ARMS[arm].split()]
    side_by_side([command(seed) + own(seed, arm) for seed in seeds for arm in ARMS], os.cpu_count())

    rows, swaps = [], []
    for seed in seeds:
        found = {arm: json.loads((folder / "results.json").read_text()) for arm, folder in folders[seed].items()}
        rows += [found["RankE"][0], *(row | {"arm": arm} for arm in ARMS for row in found[arm] if row["round"])]
        swaps += swap(dataclasses.replace(s, seed=seed, base=str(bases[seed])), folders[seed])
    write_whole(out / "results.json", lambda path: path.write_text(json.dumps(rows + swaps, indent=1)))
    print_comparison(rows)
    draw_pareto(out / "pareto.png", rows)
    draw_swap(out / "swap.png", swaps)
    print(f"\nTable, figures and all runs are in {out}")


def swap(s, folders):
    """Measurements of every policy of one seed through every decoder, a row each; `folders`: arm → that of its run."""
    pairs = {"base": load_pair(s)}
    for arm, folder in folders.items():
        pairs[arm] = load_pair(dataclasses.replace(s, ckpt=str(folder / "policy.pt"), vq=str(folder / "vq_ema.pt")))
    policy, vq, device, autocast = pairs["base"]
    w = world.Scenes(read_checkpoint(s.base_folder / "judges.pt"), s, policy.config, vq.to(device), device)
    decoders = {arm: pair[1].to(device) for arm, pair in pairs.items() if arm != "standard RL"}  # which has the base's
    rows = []
    for arm, (policy, *_) in pairs.items():
        if "--arm decoder" not in ARMS.get(arm, ""):  # these have the base's policy
            codes, *painted = paint(policy.to(device), decoders.values(), s, autocast, (w.features, w.text_mask, w.noise))
            measured = [w.measure(codes, images) for images in painted]
            rows += [{"policy": arm, "decoder": other, "seed": s.seed} | row for other, row in zip(decoders, measured)]
    return rows


def print_comparison(rows):
    """Means ± standard deviations over the seeds after the last round, then differences within a seed ± standard errors."""
    last = {(row["arm"], row["seed"]): row for row in rows}  # a later round's row replaces an earlier one's
    names, seeds = list(rows[0])[3:], sorted({row["seed"] for row in rows})
    for title, reference in {"": "", "minus base": "base", "minus standard RL": "standard RL"}.items():
        spread = lambda cell: np.std(cell, ddof=len(seeds) > 1) / (len(seeds) ** 0.5 if reference else 1)
        print("\n" + f"{title:18}" + "".join(f"{name:>19}" for name in names))
        for arm in ["base", *ARMS]:
            cells = [[last[arm, n][name] - (last[reference, n][name] if reference else 0) for n in seeds] for name in names]
            print(f"{arm:18}" + "".join(f"{np.mean(cell):10.3f} ± {spread(cell):6.3f}" for cell in cells))


def mean_over_seeds(rows, name, **match):
    return np.mean([row[name] for row in rows if all(row[key] == value for key, value in match.items())])


def draw_pareto(path, rows):
    """The paper's Pareto picture: reward against distance, a line an arm from the base over its rounds."""
    from matplotlib.figure import Figure

    figure = Figure((6, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="CLIP ×100 (higher is better)", ylabel="Fréchet distance (lower is better)")
    rounds = sorted({row["round"] for row in rows} - {0})
    for arm in ARMS:
        points = [("base", 0), *((arm, n) for n in rounds)]
        line = [[mean_over_seeds(rows, name, arm=a, round=n) for a, n in points] for name in ("clip", "frechet")]
        axes.plot(*line, "o-", markersize=3, label=arm)
    axes.legend()
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def draw_swap(path, rows):
    """The swap matrix: the distance, and CLIP, of each policy through each decoder."""
    from matplotlib.figure import Figure

    policies, decoders = (list(dict.fromkeys(row[side] for row in rows)) for side in ("policy", "decoder"))
    clip, distance = (
        np.array([[mean_over_seeds(rows, name, policy=p, decoder=d) for d in decoders] for p in policies])
        for name in ("clip", "frechet")
    )
    figure = Figure((7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="decoder", ylabel="policy", title="Fréchet distance (CLIP ×100)")
    axes.set_xticks(range(len(decoders)), decoders)
    axes.set_yticks(range(len(policies)), policies)
    axes.imshow(distance, cmap="RdYlGn_r", aspect="auto")
    for y, x in np.ndindex(distance.shape):
        axes.text(x, y, f"{distance[y, x]:.1f}\n({clip[y, x]:.1f})", ha="center", va="center")
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def main():
    try:
        settings = parse_settings(sys.argv[1:])
        if settings.compare:
            compare(settings, sys.argv[1:])
        elif settings.pretrain:
            make_folder(settings.base_folder)
            for name, content in world.pretrain(settings.seed).items():  # judges.pt is the last: with it the base is whole
                write_whole(settings.base_folder / name, lambda path: torch.save(content, path))
        elif settings.evaluate:
            evaluate(settings)
        elif settings.sample or settings.prompts:
            write_samples(settings)
        else:
            run(settings)
    except BadInput as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # a run takes it otherwise, see `listen`
        print("train.py: stopped; the same command goes on where it writes pictures, and begins again elsewhere", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
