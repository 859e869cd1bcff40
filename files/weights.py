"""Weights in files: public ones are fetched once, every entry must fit, and what is saved is LlamaGen's layout."""

import argparse
import json
import zipfile
from pathlib import Path

import safetensors.torch
import torch
from huggingface_hub import hf_hub_download, snapshot_download

from files.disk import InputError, atomic_save, expect, reading
from files.options import option_name


def download(source):
    """The path of a public file, fetched once by the library that knows it; raises whatever that raises.

    `source`: "https://…/NAME#HASH", kept by torch.hub if its SHA-256 begins so; or a file, OWNER/REPO/NAME,
    or a whole repository, OWNER/REPO, of the Hugging Face hub.
    """
    if not source.startswith("http"):
        owner, repo, *name = source.split("/")
        if name:
            return hf_hub_download(f"{owner}/{repo}", "/".join(name))
        folder = snapshot_download(source, allow_patterns=["*.json", "*.model", "*.safetensors"])
        if not list(Path(folder).glob("*.safetensors")):  # where both are there, they hold the same weights
            snapshot_download(source, allow_patterns=["pytorch_model*.bin"])
        return folder
    url, sha256 = source.split("#")
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    return path


def read_checkpoint(path):
    """What torch.save or safetensors wrote, memory-mapped. Raises InputError, also for a pickle with code."""
    with reading(path, "an undamaged checkpoint of tensors"), torch.serialization.safe_globals([argparse.Namespace]):
        if Path(path).suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # Files from before 2020 (VGG's, LPIPS') are no zip archives and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def list_parts(path):
    """The files of a checkpoint: those of a folder that its index names, or without one all; or `path` itself."""
    for index in (path / "model.safetensors.index.json", path / "pytorch_model.bin.index.json"):
        if index.is_file():
            with reading(index, "a weight_map of entries and their files"):
                names = json.loads(index.read_text("utf-8-sig"))["weight_map"].values()
                parts = sorted({path / name for name in names})
            if any(part.exists() for part in parts):  # `download` fetches every index, but weights of one kind
                return parts
    return [*sorted(path.glob("*.safetensors")), *sorted(path.glob("pytorch_model*.bin"))] or [path]


def load_state_dict(path):
    """Tensors by name, from a checkpoint's file or folder: bare, or under model, module or state_dict.

    Wrappers' prefixes are cut off. Raises InputError for other things than tensors, and for an entry that two
    files hold: which is meant?
    """
    state_dict, origin = {}, {}
    for part in list_parts(Path(path)):
        content = read_checkpoint(part)
        for key in ("model", "module", "state_dict"):
            content = content.get(key, content) if isinstance(content, dict) else {}
        tensors = content and all(isinstance(n, str) and isinstance(x, torch.Tensor) for n, x in content.items())
        expect(tensors, f"{part}: holds other things than tensors by name")
        names = list(content)
        while all(name.startswith(("module.", "_orig_mod.")) for name in names):  # DDP's, torch.compile's
            names = [name.split(".", 1)[1] for name in names]
        for name, x in zip(names, content.values()):
            expect(name not in state_dict, f"{part}: holds {name}, and so does {origin.get(name)}; keep one of them")
            state_dict[name], origin[name] = x, part
    return state_dict


def load(path, loader, *args):
    """loader(the file's state dict, *args); one-line InputError for missing, surplus or misshapen entries."""
    state_dict = load_state_dict(path)
    refusals = (InputError, KeyError, RuntimeError, TypeError, ValueError)
    with reading(path, f"what {loader.__name__} reads", refusals, verb="loaded"):
        return loader(state_dict, *args)


def count_layers(state_dict, prefix):
    """How many layers PREFIX0., PREFIX1., … there are."""
    return len({name[len(prefix) :].split(".")[0] for name in state_dict if name.startswith(prefix)})


def build(make_module, state_dict):
    """make_module(), built without memory and given these weights in float32; every entry must fit."""
    with torch.device("meta"):
        module = make_module()
    for name, x in state_dict.items():
        counter = name.endswith(("num_batches_tracked", "codebook_used"))
        expect(x.is_floating_point() or counter, f"{name} holds {x.dtype}; expected floating-point numbers")
    module.load_state_dict(state_dict, assign=True)
    return module.float()


def save_networks(out, networks):
    """Saves each network's weights as OUT/NAME.pt, in LlamaGen's layout."""
    for name, network in networks.items():
        state_dict = {key: x.cpu() for key, x in network.state_dict().items()}
        atomic_save(out / f"{name}.pt", lambda file: torch.save({"model": state_dict}, file))


# Settings of a run that belong to its weights: the defaults of what is drawn or trained from them.
OF_WEIGHTS = "data image_size base t5 cfg_scale temperature top_k padding".split()


def run_settings(ckpt):
    """What --ckpt stands for: its policy; of a run also the tokenizer trained with it and `OF_WEIGHTS`."""
    path = Path(ckpt)
    for name in ("policy.pt", "policy"):  # of a run's folder; Janus-Pro's policy is a folder
        if (path / name).exists():
            path = path / name
            break
    settings, vq = {"ckpt": str(path)}, path.with_name(path.name.replace("policy", "vq"))
    if path.is_file() and vq != path and vq.exists():
        settings["vq"] = str(vq)
    run = next((folder for folder in path.parents[:2] if path.exists() and (folder / "ckpt.pt").is_file()), None)
    if run:
        saved = read_checkpoint(run / "ckpt.pt").get("config", {})
        settings |= {name: saved[name] for name in OF_WEIGHTS if name in saved}
        if path.is_dir():
            settings.pop("top_k", None)  # Janus-Pro is drawn at another top-k than it is trained at
        pair = f" with {vq.name}" if "vq" in settings else ""
        print(f"--ckpt {ckpt}: {path.name}{pair}, settings of {run}")
    return settings


def saved_settings(out, given, fields):
    """The settings of the run in `out`, by the names of `fields`; says which of them are `given` otherwise."""
    file = Path(out, "ckpt.pt")
    expect(file.exists(), f"--resume: there is no run in {out} (no ckpt.pt); name its folder with --out")
    settings = read_checkpoint(file).get("config", {})
    expect(
        settings.keys() == fields, f"{file}: not a run, or one of another version; go on with that one, or begin anew"
    )
    for name, value in given.items():
        if value != settings[name] and name != "resume":
            print(f"{option_name(name)}: {settings[name]} -> {value}")
    return settings
