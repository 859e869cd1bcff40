"""Captions and images in files: a run's batches, and what --sample draws.

--data is a folder of images with .txt captions of the same names, webdataset tars of these, or COCO's captions
.json. A location is (path, offset, size): a file (offset 0, size -1), or a member of a tar, which is not unpacked.
"""

import json
import math
import os
import signal
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from files.disk import InputError, expect, list_files, read_bytes, reading
from files.images import IMAGE_SUFFIXES, center_crop, to_pixels, try_image
from rankee import random_stream


def coco_pairs(file):
    """(location, caption) pairs of COCO's captions_X.json; images are in ../X or, without that, beside it."""
    with reading(file, "a captions .json of COCO's"):
        content = json.loads(file.read_text("utf-8-sig"))
        names = {image["id"]: image["file_name"] for image in content["images"]}
        pairs = [(names[note["image_id"]], note["caption"].strip()) for note in content["annotations"]]
        pairs = [(name, text.encode("utf-8", "ignore").decode()) for name, text in pairs]  # no half emoji
    expect(len(names) == len(content["images"]), f"{file}: two of its images have one id; whose captions are they?")
    folder = file.absolute().parent.parent / file.stem.removeprefix("captions_")
    return [((folder / name if folder.is_dir() else file.parent / name, 0, -1), text) for name, text in pairs if text]


def list_pairs(source):
    """(location, caption) of each image in --data; names images without one. Raises InputError for none."""
    locations, pairs = {}, coco_pairs(source) if source.suffix == ".json" else []
    for path in list_files(source) if source.is_dir() else [source]:
        locations[str(path)] = (path, 0, -1)
        if path.suffix == ".tar":
            with reading(path, "one tar, whole and not compressed"), tarfile.open(path, "r:") as tar:
                locations |= {f"{path}/{member.name}": (path, member.offset_data, member.size) for member in tar}
                expect(not any(read_bytes(path, tar.offset, 20480)), "damaged, or several in one")
    for name, location in locations.items():
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in IMAGE_SUFFIXES:
            text = read_bytes(*locations[f"{stem}.txt"]) if f"{stem}.txt" in locations else b""
            caption = text.decode("utf-8-sig", "replace").strip()
            if caption and "\ufffd" not in caption:
                pairs.append((location, caption))
            else:
                print(f"left out {name}: no caption, or not in UTF-8", file=sys.stderr)
    expect(pairs, f"{source}: no image with a caption; expected images with .txt of their names, tars, or COCO's .json")
    return pairs


class CaptionedImages(Dataset):
    """Captions and uint8 images (size, size, 3); what cannot be read is named, and the next pair taken."""

    def __init__(self, pairs, size):
        self.pairs, self.size = pairs, size

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        for k in range(i, i + len(self)):
            location, caption = self.pairs[k % len(self)]
            image = try_image(*location, upright=True)
            if image:
                return caption, center_crop(image, self.size)
        raise InputError(f"{self.pairs[i][0][0]}: no image of {len(self)} can be read")


def batch_indices(n, size, seed, steps, rank, world_size):
    """Indices (steps, size) into n pairs: each epoch in an order of its own, divided among the processes."""
    total = steps.stop * world_size * size
    epochs = [random_stream(seed, "epoch", epoch).permutation(n) for epoch in range(math.ceil(total / n))]
    return np.concatenate(epochs)[:total].reshape(-1, world_size, size)[steps.start :, rank].tolist()


def ignore_signals(worker):
    """Ctrl-C and SIGTERM reach a whole process group; the loader's workers must outlive the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def data_batches(dataset, cfg, start, rank, world_size):
    """Yields captions and images (B', 3, H, W) in [-1, 1] for each step; no images for standard RL."""
    size, steps = max(cfg.batch_size, cfg.real_batch_size), range(start, cfg.max_steps)
    batches = batch_indices(len(dataset), size, cfg.seed, steps, rank, world_size)
    if not cfg.trains_decoder:
        yield from (([dataset.pairs[i][1] for i in batch], torch.empty(0)) for batch in batches)
        return
    # Lists of arrays travel through pipes; tensors would need /dev/shm, of which a container has 64 MB.
    options = {"num_workers": cfg.workers, "collate_fn": list, "worker_init_fn": ignore_signals}
    for items in DataLoader(dataset, batch_sampler=batches, **options):
        captions, images = zip(*items)
        yield list(captions), to_pixels(images)


def read_prompts(sample, num_images):
    """A dict for each prompt of --sample, as its metadata.jsonl has it: captions as they are, or a file's."""
    file, prompts = Path(sample[0]), [{"prompt": caption} for caption in sample]
    if len(sample) == 1 and file.suffix == ".json":  # one caption an image, its first
        first = {location: caption for location, caption in reversed(coco_pairs(file))}
        prompts = [{"prompt": caption} for caption in reversed(first.values())]
    elif len(sample) == 1 and file.suffix in (".txt", ".jsonl"):
        with reading(file, "a caption a line, or GenEval's .jsonl"):
            lines = [line.strip() for line in file.read_text("utf-8-sig").split("\n") if line.strip()]
            prompts = [json.loads(line) if file.suffix == ".jsonl" else {"prompt": line} for line in lines]
            expect(all(prompt["prompt"].encode() for prompt in prompts), "a prompt is no text")
    elif os.path.isfile(file):
        raise InputError(f"--sample {file}: expected captions, or one file, a .txt, .jsonl or .json")
    expect(prompts, f"--sample {file}: holds no caption")
    return prompts[: num_images or None]
