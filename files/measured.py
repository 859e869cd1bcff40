"""What metrics.py reads beside images: statistics of features, prompts, tokens."""

import json

import numpy as np
import torch

from files.disk import expect, list_files, reading


def load_statistics(path):
    """mu and sigma of a .npz, and a line on where they come from."""
    with reading(path, "a .npz with mu (2048,) and sigma (2048, 2048)"), np.load(path) as file:
        mu = file["mu"].reshape(2048).astype(float)
        sigma = file["sigma"].reshape(2048, 2048).astype(float)
    expect(np.isfinite(mu.sum() + sigma.sum()), f"{path}: not finite")
    return mu, sigma, f"statistics of {path}"


def read_prompt(image):
    """The caption of an image in GenEval's layout: DIR/00000/metadata.jsonl of DIR/00000/samples/0000.png."""
    file = image.parent.parent / "metadata.jsonl"
    with reading(file, 'the caption of the images beside it, {"prompt": "..."}, as --sample writes'):
        return json.loads(file.read_text("utf-8-sig"))["prompt"]


def list_tokens(folder):
    """The files of tokens below a folder, as --sample writes them beside images."""
    return [file for file in list_files(folder) if file.suffix == ".npy"]


def load_tokens(folder, files, size):
    """Tokens in 0 … size − 1, an int64 tensor a file. Raises InputError that names the folder for others."""
    with reading(folder, f".npy files of tokens below {size}, as --sample writes"):
        tokens = [torch.from_numpy(np.load(file).astype(np.int64, casting="safe").ravel()) for file in files]
        expect(all(0 <= x.min() and x.max() < size for x in tokens), "other numbers")
    return tokens
