"""The world of public checkpoints: LlamaGen or Janus-Pro, the networks that judge them, images with captions."""

import dataclasses
import importlib.util
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from files.disk import expect
from files.images import to_pixels
from files.weights import download, load, load_state_dict
from metrics import open_clip_score
from public import janus, llamagen
from public.data import CaptionedImages, data_batches, describe_pairs, list_pairs
from rankee import World
from vq import load_lpips, patch_discriminator

# The authors' data, of which they used 15,000 pairs: tars of images with .txt captions.
DATA = "BLIP3o/BLIP3o-60k"
# The scorer's name in open_clip, and where its weights are published.
REWARDS = {
    "clip": ("ViT-L-14-quickgelu", "timm/vit_large_patch14_clip_224.openai/open_clip_model.safetensors"),
    "hpsv2": ("ViT-H-14", "xswu/HPSv2/HPS_v2.1_compressed.pt"),
}


def backbone(ckpt):
    """The module for a checkpoint: Janus-Pro's is a folder with a config.json, or the name of a repository."""
    return janus if (Path(ckpt) / "config.json").is_file() or janus.public_name(ckpt) else llamagen


def preset(given):
    """What differs from the defaults, as words of a command line; `given` are the user's options."""
    return backbone(given.get("ckpt", "")).preset(given.get("reward"), "sample" in given)


def public_files(cfg):
    """Where the files that a run needs are published, by option; "" for a --ckpt that is not."""
    module, defaults = backbone(cfg.ckpt), type(cfg)
    found = {"ckpt": module.public_name(cfg.ckpt)} | {option: getattr(defaults, option) for option in module.FILES}
    if cfg.method != "sft" and not cfg.sample:
        found["reward_weights"] = REWARDS[cfg.reward][1]
    if cfg.trains_decoder and not cfg.sample:
        found |= {"vgg": defaults.vgg, "lpips": defaults.lpips}
    return found


def resolve_files(cfg):
    """`cfg` with local paths for all files that the run needs; public ones are fetched once (`download`).

    What is local is looked for before anything is fetched. Raises InputError that lists all that is missing.
    """
    missing, wanted = [], {}
    for option, source in public_files(cfg).items():
        given = getattr(cfg, option) or source
        if Path(given).exists():
            cfg = dataclasses.replace(cfg, **{option: given})
        elif source and (option == "ckpt" or given in (source, source.split("/")[-1])):
            wanted[option] = source
            if not source.endswith(given):
                print(f"--{option} {given}: no such file here; it stands for the public {source}")
        else:
            missing.append(f"--{option.replace('_', '-')} {given}: no such file; public: {source or llamagen.PUBLIC}")
    if cfg.data and not cfg.sample and not Path(cfg.data).exists():
        missing.append(f"--data {cfg.data}: no such file; a folder, tar or .json of images with captions")
    if not importlib.util.find_spec("transformers"):
        missing.append("pip install transformers, which reads the captions")
    refuse(missing)

    if not cfg.data and not cfg.sample:
        wanted["data"] = DATA
    for option, source in wanted.items():
        try:
            path = str(download_data(source) if option == "data" else download(source))
            cfg = dataclasses.replace(cfg, **{option: path})
        except Exception as error:  # of the network, the hub, a wrong hash: each library has its own
            missing.append(f"--{option.replace('_', '-')} {source} ({error!r:.150})")
    refuse(missing)
    return cfg


def refuse(missing):
    expect(not missing, "\n  ".join(["this run still needs", *missing]))


def download_data(name):
    """The folder of a data set on the Hugging Face hub, fetched once; its size is said before."""
    try:
        files = HfApi().dataset_info(name, files_metadata=True).siblings
    except Exception as error:  # without a network what was fetched before will do; it raises if there is nothing
        folder = snapshot_download(name, repo_type="dataset", local_files_only=True)
        print(f"--data: {folder} as it is; what it lacks cannot be fetched ({error!r:.80})")
        return folder
    print(f"--data: {name} of the Hugging Face hub, {sum(file.size for file in files) / 1e9:.1f} GB, once", flush=True)
    return snapshot_download(name, repo_type="dataset")


def load_pretrained(cfg):
    """Policy, tokenizer and text encoder, on the device. Raises InputError, also where two do not fit."""
    return backbone(cfg.ckpt).load_pretrained(cfg)


def load_world(cfg):
    """The `World` of a run on --data."""
    pairs = list_pairs(Path(cfg.data))
    dataset = CaptionedImages(pairs, cfg.image_size)
    policy, vq, text_encoder = load_pretrained(cfg)
    lpips = load(cfg.vgg, load_lpips, load_state_dict(cfg.lpips)).to(cfg.device) if cfg.trains_decoder else None
    scorer = open_clip_score(REWARDS[cfg.reward][0], cfg.reward_weights).to(cfg.device) if cfg.method != "sft" else None
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
        data=describe_pairs(pairs),
        evaluate=None,
        save_networks=backbone(cfg.ckpt).saver(cfg),
    )
