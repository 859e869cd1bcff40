"""Images in files, as others leave them: any mode, range and orientation; and pictures of our own."""

import io
import os
import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader
from tqdm import tqdm

from files.disk import atomic_save, expect, list_files, read_bytes

IMAGE_SUFFIXES = (".avif", ".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def list_images(folder):
    """The images below a folder, and a line that counts them and other files. Raises InputError for none."""
    files = list_files(folder)
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    expect(images, f"{folder}: no images; expected a folder with {', '.join(IMAGE_SUFFIXES)} files")
    return images, f"{len(images)} images of {folder} ({len(files) - len(images)} other files left out)"


def load_image(path, offset=0, size=-1, upright=False):
    """An image, where `read_bytes` finds it, as RGB with 8 bits; `upright` obeys its EXIF orientation.

    Grey of 16 bits is scaled, transparency goes over white, other modes are PIL's conversion. Raises
    ValueError where the range is unknown (float, 32 bits in use), and whatever PIL raises for a damaged file.
    """
    with Image.open(io.BytesIO(read_bytes(path, offset, size))) as image:
        if upright:
            image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # I;16 and its byte orders, I, F
            grey = np.asarray(image)
            if image.mode == "F" or not 0 <= grey.min() <= grey.max() < 2**16:
                raise ValueError(f"pixels of 32 bits (mode {image.mode}), of unknown range; save it with 8 or 16")
            grey = np.where(grey == image.info.get("transparency"), 2**16 - 1, grey)
            image = Image.fromarray((grey / 257).round().astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")


def center_crop(image, size):
    """The middle square of a PIL image, resized to `size` pixels with Lanczos: uint8 (size, size, 3)."""
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))


def try_image(path, offset=0, size=-1, upright=False):
    """`load_image`, or None and a line on stderr where it cannot be read."""
    try:
        return load_image(path, offset, size, upright)
    except Exception as error:  # a decoder may raise anything for a damaged file
        print(f"left out {path}, byte {offset}: {error!r:.200}", file=sys.stderr)


def load_batch(paths, transform):
    """(path, transformed image) of each that can be read, in a worker process."""
    images = ((path, try_image(path)) for path in paths)
    # Arrays go through a pipe; tensors would need /dev/shm, of which a container has 64 MB.
    return [(path, np.asarray(transform(image))) for path, image in images if image]


def available_cores():
    """How many processes can work at once: a container or a cluster's job may have a part of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def image_batches(paths, transform):
    """Yields (paths, transformed images (b, …)) from worker processes; names what cannot be read.

    Raises InputError where nothing can.
    """
    collate = partial(load_batch, transform=transform)
    loader = DataLoader(paths, 32, num_workers=min(8, available_cores()), collate_fn=collate)
    read = 0
    for batch in tqdm(loader, unit=" x 32 images"):
        if batch:
            good, arrays = zip(*batch)
            yield good, torch.from_numpy(np.stack(arrays))
        read += len(batch)
    expect(read, f"{Path(paths[0]).parent}: no image of {len(paths)} can be read")


def to_pixels(arrays):
    """uint8 images (H, W, 3) to floats (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1


def to_pil(image):
    """An image (3, H, W) in [-1, 1] as a PIL image."""
    return Image.fromarray(((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


def save_preview(path, columns, captions, note):
    """Saves images as a grid, a row a caption, `note` under it; columns: label -> images (n, 3, H, W) in [-1, 1]."""
    font = ImageFont.load_default(13)
    margin, head = 190, 24  # pixels for the captions on the left, and for the labels above
    cell = max(160, *(images.shape[-1] for images in columns.values()))
    pitch = cell + 4
    sheet = Image.new("RGB", (margin + len(columns) * pitch, 2 * head + len(captions) * pitch), "white")
    draw = ImageDraw.Draw(sheet)
    for x, (label, images) in enumerate(columns.items()):
        draw.text((margin + x * pitch, 4), label, "black", font)
        for y, image in enumerate(images[: len(captions)]):
            tile = to_pil(image).resize((cell, cell), Image.Resampling.NEAREST)  # small images unsmoothed
            sheet.paste(tile, (margin + x * pitch, head + y * pitch))
    for y, caption in enumerate(captions):
        draw.text((6, head + y * pitch + 4), textwrap.fill(caption, 26, max_lines=cell // 17), "black", font)
    draw.text((6, sheet.height - head + 4), note, "black", font)
    atomic_save(path, lambda file: sheet.save(file, "PNG"))
