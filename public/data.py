"""Captions and images in files: a run's batches, and what --sample draws.

--data is a folder of images with .txt captions of the same names, webdataset tars of these, or COCO's captions
.json. A location is (path, offset, size): a file (offset 0, size -1), or a member of a tar, which is not unpacked.
"""

import contextlib
import csv
import io
import json
import os
import signal
import sys
import tarfile
import zlib
from functools import lru_cache
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from files.disk import InputError, expect, list_files, read_bytes, reading
from files.images import IMAGE_SUFFIXES, available_cores, center_crop, to_pixels, try_image
from rankee import random_stream


def coco_captions(content):
    """(image's id, its file, caption) of each caption in COCO's captions_X.json. Other content raises anything."""
    files = {image["id"]: Path(image["file_name"]) for image in content["images"]}
    expect(len(files) == len(content["images"]), "two of its images have one id; whose captions are they?")
    captions = [(note["image_id"], note["caption"].strip()) for note in content["annotations"]]
    captions = [(image, text.encode("utf-8", "ignore").decode()) for image, text in captions]  # no half emoji
    return [(image, files[image], text) for image, text in captions if text]


def coco_pairs(file):
    """(location, caption) pairs of COCO's captions_X.json; images are in ../X or, without that, beside it."""
    with reading(file, "a captions .json of COCO's"):
        captions = coco_captions(json.loads(file.read_text("utf-8-sig")))
    folder = file.absolute().parent.parent / file.stem.removeprefix("captions_")
    if not folder.is_dir():
        folder = file.parent
    return [((folder / name, 0, -1), caption) for _, name, caption in captions]


def list_locations(source):
    """Locations by name: of the files in a folder and the members of its tars, or of one tar."""
    locations = {}
    for path in list_files(source) if source.is_dir() else [source]:
        if path.suffix.lower() != ".tar":
            locations[str(path)] = (path, 0, -1)
            continue
        with reading(path, "one tar, whole and not compressed"), tarfile.open(path, "r:") as tar:
            for member in tar:
                name = f"{path}/{member.name}"
                expect(name not in locations, f"two members are named {member.name}; whose caption is which?")
                if not member.isdir():
                    locations[name] = (path, member.offset_data, member.size)
            expect(not any(read_bytes(path, tar.offset, 20480)), "damaged, or several in one")
    return locations


def list_pairs(source):
    """(location, caption) of each image in --data; names images without one, and counts what else is there.

    Raises InputError for no pairs, and for a tar that is damaged or has a name twice.
    """
    is_coco = source.suffix.lower() == ".json"
    pairs = coco_pairs(source) if is_coco else []
    locations = {} if is_coco else list_locations(source)
    images = [name for name in locations if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
    texts = [f"{os.path.splitext(name)[0]}.txt" for name in images]
    for image, text in zip(images, texts):
        caption = ""
        with contextlib.suppress(KeyError, OSError):  # there is none, or it may not be read
            caption = read_bytes(*locations[text]).decode("utf-8-sig", "replace").strip()
        if caption and "\ufffd" not in caption:
            pairs.append((locations[image], caption))
        else:
            print(f"left out {image}: no caption, or not in UTF-8, or not to be read", file=sys.stderr)
    expect(pairs, f"{source}: no image with a caption; expected images with .txt of their names, tars, or COCO's .json")
    others = locations.keys() - set(images) - set(texts)
    suffixes = sorted({os.path.splitext(name)[1] for name in others})
    print(f"{source}: {len(pairs)} pairs of image and caption; left out, other files: {len(others)}", *suffixes[:20])
    return pairs


def describe_pairs(pairs):
    """How many pairs there are, and a hash of their names and captions in order, as text.

    Names begin at the folder that holds all: a folder that was moved is the same data.
    """
    folder = os.path.dirname(os.path.commonprefix([str(path) for (path, _, _), _ in pairs]))
    lines = [f"{str(path).removeprefix(folder)} {offset} {caption}\n" for (path, offset, _), caption in pairs]
    return f"{len(pairs)} pairs, hash {zlib.crc32(''.join(lines).encode('utf-8', 'surrogateescape')):08x}"


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
    """Yields `size` indices into n pairs a step: each epoch in an order of its own, divided among the processes."""

    @lru_cache(1)
    def order(epoch):
        return random_stream(seed, "epoch", epoch).permutation(n)

    for step in steps:
        first = (step * world_size + rank) * size
        yield [int(order(i // n)[i % n]) for i in range(first, first + size)]


def ignore_signals(worker):
    """Ctrl-C and SIGTERM reach a whole process group; the loader's workers must outlive the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def data_batches(dataset, cfg, start, rank, world_size):
    """Yields captions and images (B', 3, H, W) in [-1, 1] for each step; no images for standard RL."""
    size, steps = max(cfg.batch_size, cfg.real_batch_size), range(start, cfg.max_steps)
    batches = batch_indices(len(dataset), size, cfg.seed, steps, rank, world_size)
    if cfg.method == "rl":
        yield from (([dataset.pairs[i][1] for i in batch], torch.empty(0)) for batch in batches)
        return
    # Lists of arrays travel through pipes; tensors would need /dev/shm, of which a container has 64 MB.
    options = {"num_workers": min(cfg.workers, available_cores()), "collate_fn": list, "worker_init_fn": ignore_signals}
    for items in DataLoader(dataset, batch_sampler=batches, **options):
        captions, images = zip(*items)
        yield list(captions), to_pixels(images)


PROMPT_FILES = (".txt", ".jsonl", ".json", ".csv")


def file_prompts(file):
    """A dict for each prompt in a file. Raises, anything, where the content is not as its suffix says."""
    suffix, text = file.suffix.lower(), file.read_text("utf-8-sig")
    if suffix == ".json":
        content = json.loads(text)
        if isinstance(content, list):  # HPDv2's
            return [entry if isinstance(entry, dict) else {"prompt": entry} for entry in content]
        first = {image: caption for image, _, caption in reversed(coco_captions(content))}  # an image's first stays
        return [{"prompt": caption} for caption in reversed(first.values())]
    if suffix == ".csv":  # LlamaGen's: tabs between columns, so that a caption keeps its commas
        return [{"prompt": row["Prompt"].strip()} for row in csv.DictReader(io.StringIO(text), delimiter="\t")]
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return [json.loads(line) if suffix == ".jsonl" else {"prompt": line} for line in lines]


def read_prompts(sample, num_images):
    """A dict for each prompt of --sample, as its metadata.jsonl has it: captions as they are, or a file's.

    One caption is a file's name if it is a word that ends like one, or if there is such a file or folder.
    """
    name, suffix = sample[0], os.path.splitext(sample[0])[1].lower()
    ends_like_one = suffix in PROMPT_FILES and len(name.split()) == 1
    is_file = len(sample) == 1 and (ends_like_one or os.path.exists(name))
    usable = suffix in PROMPT_FILES and os.path.isfile(name)
    kinds = ", ".join(PROMPT_FILES)
    expect(usable or not is_file, f"--sample {name}: expected captions, or one file that is there, of {kinds}")
    with reading(name if is_file else "--sample", "captions in UTF-8; a .csv has a column Prompt"):
        prompts = file_prompts(Path(name)) if is_file else [{"prompt": caption} for caption in sample]
        expect(all(prompt["prompt"].encode() for prompt in prompts), "a caption is empty")
    expect(prompts, f"--sample {name}: holds no caption")
    return prompts[: num_images or None]
