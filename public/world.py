"""The world of public checkpoints: LlamaGen or Janus-Pro, the networks that judge them, images with captions."""

import dataclasses
import importlib.util
from functools import partial
from pathlib import Path

import torch

from files.disk import expect
from files.images import to_pixels
from files.weights import download, load, load_state_dict
from metrics import open_clip_score
from public import janus, llamagen
from public.data import CaptionedImages, data_batches, list_pairs
from rankee import World, random_stream
from vq import load_lpips, patch_discriminator

# The scorer's name in open_clip, and where its weights are published.
REWARDS = {
    "clip": ("ViT-L-14-quickgelu", "timm/vit_large_patch14_clip_224.openai/open_clip_model.safetensors"),
    "hpsv2": ("ViT-H-14", "xswu/HPSv2/HPS_v2.1_compressed.pt"),
}


def backbone(ckpt):
    """The module for a checkpoint: Janus-Pro's is a folder with a config.json, or the name of a repository."""
    path = Path(ckpt)
    is_janus = (path / "config.json").is_file() or (not path.exists() and len(path.parts) == 2 and not path.suffix)
    return janus if is_janus else llamagen


def preset(given):
    """What differs from the defaults, as words of a command line; `given` are the user's options."""
    return backbone(given.get("ckpt", "")).PRESET.split()


def resolve_files(cfg):
    """`cfg` with local paths for all files that the run needs; public ones are fetched once (`download`).

    Raises InputError that lists all that is missing.
    """
    module, missing = backbone(cfg.ckpt), []
    options = list(module.FILES)
    if not cfg.sample:
        options += ["reward_weights", "vgg", "lpips"] if cfg.trains_decoder else ["reward_weights"]
        if not cfg.data or not Path(cfg.data).exists():
            missing.append(f"--data {cfg.data or 'DIR'}: a folder, tar or .json of images with captions")
    if not importlib.util.find_spec("transformers"):
        missing.append("pip install transformers, which reads the captions")
    for option in options:
        source = getattr(type(cfg), option) or REWARDS[cfg.reward][1]
        path = getattr(cfg, option) or source
        if option == "ckpt":
            source = module.public_name(path)
        if not Path(path).exists():
            try:
                expect(path in (source, source.split("/")[-1]), "no such file")
                path = str(download(source))
            except Exception as error:  # of the network, the hub, a wrong hash: each library has its own
                missing.append(f"--{option.replace('_', '-')} {path} ({error!r:.150})")
        cfg = dataclasses.replace(cfg, **{option: path})
    expect(not missing, "\n  ".join(["this run still needs", *missing]))
    return cfg


def load_pretrained(cfg):
    """Policy, tokenizer and text encoder, on the device. Raises InputError, also where two do not fit."""
    return backbone(cfg.ckpt).load_pretrained(cfg)


def load_world(cfg):
    """The `World` of a run on --data."""
    dataset = CaptionedImages(list_pairs(Path(cfg.data)), cfg.image_size)
    policy, vq, text_encoder = load_pretrained(cfg)
    lpips = load(cfg.vgg, load_lpips, load_state_dict(cfg.lpips)).to(cfg.device) if cfg.trains_decoder else None
    scorer = open_clip_score(REWARDS[cfg.reward][0], cfg.reward_weights).to(cfg.device)
    torch.manual_seed(int(random_stream(cfg.seed, "discriminator").integers(2**63)))
    watched = [dataset[i % len(dataset)] for i in range(8)]
    return World(
        policy=policy,
        vq=vq,
        text_encoder=text_encoder,
        scorer=scorer,
        lpips=lpips,
        discriminator=patch_discriminator().to(cfg.device),
        batches=lambda *where: data_batches(dataset, cfg, *where),
        captions=[caption for caption, _ in watched],
        images=to_pixels([image for _, image in watched]),
        evaluate=None,
        save_networks=partial(backbone(cfg.ckpt).save_networks, cfg.ckpt),
    )
