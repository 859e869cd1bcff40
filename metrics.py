"""What the paper measures: the Fréchet Inception distance (from scratch), CLIP scores (through open_clip), token statistics.

    python metrics.py fid A B --weights pt_inception-2015-12-05-6726825d.pth     A, B: folders of pictures, or saved statistics
    python metrics.py statistics A OUT.npz --weights …                           statistics in pytorch-fid's layout
    python metrics.py clip DIR --captions FILE --weights …                       CLIP ViT-B/32, "A photo depicts …"
    python metrics.py hpsv2 DIR --captions FILE --weights HPS_v2.1_compressed.pt
    python metrics.py shift A B --vq vq_ds16_t2i.pt                              KL of the codes' histograms, and entropies

Two ways to prepare a picture for Inception are in use, and they give different numbers for the same pictures:

    "clean"        clean-fid (Parmar et al. 2022): bicubic with anti-aliasing in float, (x − 128) / 128; the published tables
    "pytorch-fid"  bilinear without anti-aliasing, x / 127.5 − 1; most older papers

Pixels are in [-1, 1] for CLIP, which is differentiated, and uint8 for Inception, which is not: FID is defined on saved pictures.
This file imports nothing of ours, but for `shift` on pictures, which needs the tokenizer.
"""

import argparse
import contextlib
import functools
import hashlib
import inspect
import json
import os
import re
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import open_clip
import safetensors.torch
import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image, ImageOps
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Normalize
from tqdm import tqdm

# ---- files ------------------------------------------------------------------------------------------------------------


class BadInput(Exception):
    """Something the user gave does not fit; the message is one line: the thing, what was expected, what to do. Status 2."""


def first_line(error):
    """The line of an error that names the offender; PyTorch's and KeyError's need help with that."""
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    if isinstance(error, KeyError):
        return f"has no entry {lines[0]}"
    return lines[1 if lines[0].startswith("Error(s) in loading") else 0][:300]


@contextlib.contextmanager
def reading(path, expected):
    """Makes whatever goes wrong inside a BadInput that names the file, the fault and what was `expected`."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:  # a file fails in many ways, by damage, by its layout or because it would run code
        raise BadInput(f"{path}: {first_line(error)}; expected {expected}") from error


def weight_files(path):
    """The files of a checkpoint: itself, or in a folder model.safetensors or pytorch_model.bin, whole or as an index lists its parts."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    for file in (path / "model.safetensors", path / "pytorch_model.bin"):
        if file.exists():
            return [file]
        index = file.with_name(file.name + ".index.json")
        if index.exists():
            with reading(index, "an index of weights"):
                return [path / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
    raise BadInput(
        f"{path}: a folder without model.safetensors or pytorch_model.bin, whole or with an index; expected a checkpoint"
    )


def read_checkpoint(path):
    """What .pt or .safetensors files hold, mapped and not copied; a pickle that would run code is refused. Raises BadInput."""
    path, *more = weight_files(path)
    if more:
        return functools.reduce(dict.__or__, map(read_checkpoint, [path, *more]))
    if not path.is_file():
        raise BadInput(f"{path}: no such file; expected a checkpoint")
    with reading(path, "an undamaged checkpoint of plain weights; get it again"):
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle's protocol, just before it is refused
            # Files from before 2020 (VGG's, LPIPS') are no zip archives and cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def read_entries(path):
    """The state dict in a checkpoint: under `model`, `module` or `state_dict` or bare, wrappers' prefixes taken off."""
    entries = read_checkpoint(path)
    for key in ("model", "module", "state_dict"):
        if isinstance(entries, dict) and isinstance(entries.get(key), dict):
            entries = entries[key]
    tensors = isinstance(entries, dict) and all(isinstance(value, torch.Tensor) for value in entries.values())
    if not tensors or not entries or not all(isinstance(name, str) for name in entries):
        raise BadInput(f"{path}: holds no state dict; expected tensors by name, bare or under model, module or state_dict")
    for prefix in ("module.", "_orig_mod."):
        entries = {name.removeprefix(prefix): value for name, value in entries.items()}
    for name, value in entries.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise BadInput(f"{path}: {name} holds numbers that are not finite; get it again")
    return entries


def build(path, what, from_entries, *more):
    """`from_entries` on a file's entries and `more`; what does not fit becomes BadInput with the first offender's name."""
    with reading(path, what):
        return from_entries(read_entries(path), *more)


# ---- Inception-v3, FID variant -----------------------------------------------------------------------------------------
# The 2015 TensorFlow graph that FID is defined on differs from the well-known PyTorch one in its pools: averages leave
# out the padding, and the last block pools by maximum. Widths and kernels are read from the file's shapes; its names say
# what follows what: branch3x3dbl_2 comes after branch3x3dbl_1, and branch3x3_2a and branch3x3_2b fork.

BRANCHES = ["1x1", "5x5", "3x3", "7x7", "3x3dbl", "7x7dbl", "7x7x3", "_pool"]  # as they are concatenated


def conv_norm(shape, stride=1, padding=0):
    outside, inside, *kernel = shape
    conv = nn.Conv2d(inside, outside, kernel, stride, padding, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outside, eps=1e-3), relu=nn.ReLU()))


class Mixed(nn.Module):
    """Parallel branches of convolutions, concatenated; `shapes`: name of a convolution → shape of its weight."""

    def __init__(self, name, shapes):
        super().__init__()
        self.halves = not any("pool" in name for name in shapes)  # the two blocks that have no convolution after their pool
        self.average = not self.halves and name != "Mixed_7c"
        self.plan = {}  # branch → place → names of the convolutions there, two where it forks
        for conv in sorted(shapes):
            branch, place = re.fullmatch(r"branch(.+?)(?:_(\d)[ab]?)?", conv).groups()
            self.plan.setdefault(branch, {}).setdefault(place, []).append(conv)
        for places in self.plan.values():
            for place, convs in places.items():
                last = self.halves and place == max(places)
                for conv in convs:
                    padding = 0 if last else [size // 2 for size in shapes[conv][2:]]
                    self.add_module(conv, conv_norm(shapes[conv], 2 if last else 1, padding))

    def forward(self, x):
        if self.average:
            pooled = F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False)
        else:
            pooled = F.max_pool2d(x, 3, 2) if self.halves else F.max_pool2d(x, 3, 1, padding=1)
        outputs = []
        for branch in sorted(self.plan, key=BRANCHES.index):
            y = pooled if branch == "_pool" else x
            for convs in self.plan[branch].values():
                y = torch.cat([getattr(self, conv)(y) for conv in convs], 1)
            outputs.append(y)
        return torch.cat([*outputs, pooled] if self.halves else outputs, 1)


def inception_from_entries(entries):
    """Prepared pictures (B, 3, 299, 299), about [-1, 1], to pooled features (B, 2048): the network of
    `pt_inception-2015-12-05-6726825d.pth`, without its classifier.

    Raises KeyError or RuntimeError (PyTorch's, naming each) for entries that are missing or not its own.
    """
    entries = {name: value for name, value in entries.items() if not name.startswith("fc.")}
    suffix = ".conv.weight"
    shapes = {name.removesuffix(suffix): value.shape for name, value in entries.items() if name.endswith(suffix)}
    layers = OrderedDict(
        Conv2d_1a_3x3=conv_norm(shapes["Conv2d_1a_3x3"], stride=2),
        Conv2d_2a_3x3=conv_norm(shapes["Conv2d_2a_3x3"]),
        Conv2d_2b_3x3=conv_norm(shapes["Conv2d_2b_3x3"], padding=1),
        pool_1=nn.MaxPool2d(3, 2),
        Conv2d_3b_1x1=conv_norm(shapes["Conv2d_3b_1x1"]),
        Conv2d_4a_3x3=conv_norm(shapes["Conv2d_4a_3x3"]),
        pool_2=nn.MaxPool2d(3, 2),
    )
    for block in sorted({name.split(".")[0] for name in shapes if name.startswith("Mixed")}):
        layers[block] = Mixed(block, {name.split(".")[1]: shape for name, shape in shapes.items() if name.startswith(block)})
    network = nn.Sequential(OrderedDict(layers, pool_3=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten()))
    network.load_state_dict(entries, strict=True)
    network.eval().requires_grad_(False)
    for block in network.modules():  # a quarter of the time otherwise goes into normalizing by constants
        if hasattr(block, "bn"):
            block.conv, block.bn = fuse_conv_bn_eval(block.conv, block.bn), nn.Identity()
    return network.to(memory_format=torch.channels_last)


PREPROCESSINGS = ("clean", "pytorch-fid")


def prepare_for_inception(pixels, preprocess):
    """uint8 pictures (B, H, W, 3) to Inception's input (B, 3, 299, 299), by "clean" or "pytorch-fid" (see the head of this file)."""
    if preprocess == "pytorch-fid":
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        return F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
    if preprocess == "clean":
        # Channel by channel as float images: PIL would round to uint8 between its two passes otherwise.
        planes = [
            np.asarray(Image.fromarray(plane.astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255)
            for picture in pixels
            for plane in picture.transpose(2, 0, 1)
        ]
        return (torch.from_numpy(np.stack(planes)).view(-1, 3, 299, 299) - 128) / 128
    raise ValueError(f"unknown preprocessing {preprocess!r}")


# ---- Fréchet distance --------------------------------------------------------------------------------------------------


def feature_statistics(batches):
    """Mean (F,) and covariance (F, F), float64, of features that come as batches (b, F), and how many they are; memory does not
    grow with them. Raises BadInput for fewer than two."""
    count, total, products = 0, 0.0, 0.0
    for features in batches:
        features = features.double().cpu()
        count, total, products = count + len(features), total + features.sum(0), products + features.T @ features
    if count < 2:
        raise BadInput(f"a Fréchet distance needs at least 2 samples on each side; one side has {count}")
    mean = total / count
    return mean.numpy(), ((products - count * mean.outer(mean)) / (count - 1)).numpy(), count


def frechet_distance(mean_a, covariance_a, mean_b, covariance_b):
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) (Heusel et al. 2017, arXiv 1706.08500), finite also for singular Σ.

    With Σ = L Lᵀ, tr (Σ_a Σ_b)^½ is the sum of the singular values of L_aᵀ L_b. That needs no matrix root of a product that is
    not symmetric, which goes complex for singular Σ; rounding enters it once, not under a root; and L has a column only
    for each dimension that the samples span.
    """

    def factor(covariance):
        values, vectors = torch.linalg.eigh(torch.from_numpy(covariance))  # NumPy's takes several times as long
        spanned = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        return vectors[:, spanned] * values[spanned].sqrt()  # (F, rank)

    overlap = torch.linalg.svdvals(factor(covariance_a).T @ factor(covariance_b)).sum()
    distance = np.square(mean_a - mean_b).sum() + np.trace(covariance_a) + np.trace(covariance_b) - 2 * overlap
    return max(0.0, float(distance))  # equal statistics may round to −1e-13


# ---- CLIP --------------------------------------------------------------------------------------------------------------


class CLIPScore(nn.Module):
    """100 · cosine of an open_clip model's image and text embeddings, no logit scale; differentiable to the pixels.

    Pictures are resized as tensors: through PIL the "reward back-propagated to the decoder" would have no gradient at all.
    """

    def __init__(self, model, tokenize, mean, std):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenize = tokenize
        self.normalize = Normalize(mean, std)

    @torch.no_grad()
    def embed_text(self, captions):
        """B captions to unit embeddings (B, E)."""
        return self.model.encode_text(self.tokenize(captions).to(self.model.logit_scale.device), normalize=True).float()

    def forward(self, images, text):
        """Scores (R,) of images (R, 3, H, W) in [-1, 1] against text embeddings (R, E)."""
        size = self.model.visual.image_size
        x = (images.clamp(-1, 1) + 1) / 2  # a saved picture has no pixel outside: nothing to gain there
        if tuple(x.shape[2:]) != tuple(size):
            x = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        features = self.model.encode_image(self.normalize(x), normalize=True)
        return 100 * (features.float() * text).sum(-1)


def clip_from_entries(entries, quick_gelu, head_width):
    """A `CLIPScore` from open_clip's entries of a ViT; sizes from the shapes.

    OpenAI's models, the default reward among them, have `quick_gelu` and vision heads 64 wide; HPSv2 is a ViT-H-14, without and 80
    wide. Half-precision files become float32. Raises KeyError for a missing entry and RuntimeError (PyTorch's, naming
    each) for missing, surplus or misshapen ones.
    """
    layers = lambda tower: len({name[len(tower) :].split(".")[0] for name in entries if name.startswith(tower)})
    depth, text_depth = layers("visual.transformer.resblocks."), layers("transformer.resblocks.")
    vision_width, _, patch, _ = entries["visual.conv1.weight"].shape
    size = patch * round((len(entries["visual.positional_embedding"]) - 1) ** 0.5)  # one position is the class token's
    words, width = entries["positional_embedding"].shape
    vision = CLIPVisionCfg(layers=depth, width=vision_width, head_width=head_width, patch_size=patch, image_size=size)
    text = CLIPTextCfg(words, len(entries["token_embedding.weight"]), width=width, heads=width // 64, layers=text_depth)
    with torch.device("meta"):
        model = CLIP(entries["text_projection"].shape[1], vision, text, quick_gelu)
    model.load_state_dict(entries, strict=True, assign=True)
    model.attn_mask = torch.full((words, words), -torch.inf).triu(1)  # in no file: a text position sees what is before it
    tokenize = open_clip.get_tokenizer("ViT-L-14", context_length=words)  # CLIP's byte pairs, the same for all of them
    return CLIPScore(model.float(), tokenize, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)


# ---- tokens ------------------------------------------------------------------------------------------------------------


def token_histogram(codes, size):
    """Frequencies (V,), float64, of integer codes of any shape, with one count added to each of the V = `size` codes."""
    counts = torch.bincount(codes.flatten(), minlength=size).double() + 1
    return counts / counts.sum()


def token_kl(generated, real):
    """KL(generated ‖ real) in nats of two histograms (V,): the paper's latent covariate shift."""
    return (generated * (generated / real).log()).sum().item()


def token_entropy(histogram):
    """Entropy in bits of a histogram (V,); log2 V when all codes are used alike."""
    return -(histogram * histogram.log2()).sum().item()


# ---- pictures in folders -----------------------------------------------------------------------------------------------

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises for a bad file
WORKERS = os.cpu_count()  # processes that read pictures; 0: none, the caller reads them itself
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Pictures(Dataset):
    """The files of pictures, each opened, made RGB and given to `prepare`, which returns a tensor."""

    def __init__(self, paths, prepare):
        self.paths, self.prepare = paths, prepare

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        """The tensor and "", or None and a line that says why the file cannot be read."""
        try:
            with Image.open(self.paths[i]) as picture:
                return self.prepare(picture.convert("RGB")), ""
        except UNREADABLE as error:
            return None, f"{self.paths[i]}: {first_line(error)}"


def list_pictures(folder):
    """Every picture in a folder and those in it, sorted. Raises BadInput where there is none."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    if not paths:
        raise BadInput(f"{folder}: no pictures; expected a folder with {', '.join(SUFFIXES)} files")
    return paths


def read_pictures(paths, prepare, workers, batch=32):
    """Pairs (indices of the files, tensors (b, …)) from worker processes; what cannot be read is named and left out.

    Raises BadInput where none can be read.
    """
    loader = DataLoader(Pictures(paths, prepare), batch, num_workers=workers, collate_fn=list)
    position = skipped = 0
    with tqdm(total=len(paths), unit="pictures") as bar:
        for items in loader:
            for line in filter(None, (line for _, line in items)):
                skipped += 1
                bar.write(f"skipped {line} ({skipped} so far)", file=sys.stderr)
            good = [i for i, (tensor, _) in enumerate(items) if tensor is not None]
            if good:
                yield [position + i for i in good], torch.stack([items[i][0] for i in good])
            position += len(items)
            bar.update(len(items))
    if skipped == len(paths):
        raise BadInput(f"{Path(paths[0]).parent}: none of its {len(paths)} pictures can be read")


def read_statistics(path):
    """Mean, covariance and count ("?" where the file does not say) of a .npz in pytorch-fid's layout. Raises BadInput."""
    with reading(path, "a .npz with mu (F,) and sigma (F, F)"), np.load(path) as file:
        mean, covariance = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
        if mean.ndim != 1 or covariance.shape != mean.shape * 2 or not np.isfinite([mean.sum(), covariance.sum()]).all():
            raise ValueError(f"mu {mean.shape} and sigma {covariance.shape} do not fit, or are not finite")
        return mean, covariance, int(file["count"]) if "count" in file else "?"


# ---- what the paper's tables hold --------------------------------------------------------------------------------------
# Each function is a command too. All return the numbers, name → value, and lines that say by which protocol they came about.


def inception_input(preprocess, image_size, picture):
    if image_size:
        picture = middle_square(image_size, picture)
    return prepare_for_inception(np.array(picture)[None], preprocess)[0]


def middle_square(size, picture):
    return ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)


def square(size, picture):
    """The middle square of a PIL picture, (3, size, size) in [-1, 1], resized with Lanczos."""
    return torch.from_numpy(np.array(middle_square(size, picture))).permute(2, 0, 1) / 127.5 - 1


def file_hash(path):
    digest = hashlib.sha256()
    for part in weight_files(path):
        with open(part, "rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    return f"{Path(path).name} sha256 {digest.hexdigest()[:12]}"


def inception(weights, device="cpu"):
    return build(weights, "Inception-v3 in its FID variant", inception_from_entries).to(device)


def side_statistics(side, network, preprocess, image_size, workers, device):
    """Mean, covariance and count of one side of a distance, a folder's pictures or a .npz, and a line on where they come from."""
    if preprocess not in PREPROCESSINGS:
        raise BadInput(f"--preprocess {preprocess}: there are {' and '.join(PREPROCESSINGS)}")
    if image_size < 0:
        raise BadInput(f"--image-size {image_size}: give the pixels a side, or 0 to take pictures as they are")
    if str(side).endswith(".npz"):
        *found, count = read_statistics(side)
        return *found, count, f"{count} pictures, by statistics made elsewhere: {file_hash(side)}"
    pictures = read_pictures(list_pictures(side), functools.partial(inception_input, preprocess, image_size), workers)
    *found, count = feature_statistics(network(x.to(device)) for _, x in pictures)
    resized = f", middle squares at {image_size} px, Lanczos" if image_size else ""
    return *found, count, f"{count} pictures of {side}{resized}, {preprocess} preprocessing"


def statistics(a, out, *, weights, preprocess="clean", image_size=0, workers=WORKERS, device=DEVICE):
    """Writes the mean and covariance of a folder's pictures to OUT.npz, in pytorch-fid's layout."""
    if not Path(out).absolute().parent.is_dir():
        raise BadInput(f"{out}: its folder is not there; make it first")
    mean, covariance, count, how = side_statistics(a, inception(weights, device), preprocess, image_size, workers, device)
    np.savez(out, mu=mean, sigma=covariance, count=count)
    return {"pictures": count}, [f"{how}, {file_hash(weights)}"]


def fid(a, b, *, weights, preprocess="clean", image_size=0, workers=WORKERS, device=DEVICE):
    """Fréchet Inception distance of two folders of pictures (png, jpg, webp; nested), or of saved statistics (.npz).

    `image_size`: pixels a side that pictures' middle squares are resized to first, with Lanczos; 0 takes them as they are.
    """
    network = inception(weights, device)
    (*of_a, count_a, how_a), (*of_b, count_b, how_b) = (
        side_statistics(side, network, preprocess, image_size, workers, device) for side in (a, b)
    )
    if of_a[0].shape != of_b[0].shape:
        raise BadInput(f"{a} has {len(of_a[0])} features and {b} {len(of_b[0])}; give statistics of one network")
    protocol = [f"FID: {how_a}", f"against {how_b}; {file_hash(weights)}"]
    if any(count != "?" and count < 2048 for count in (count_a, count_b)):
        protocol.append("FID is biased upwards below 2,048 pictures: compare it with the same counts only")
    return {"FID": frechet_distance(*of_a, *of_b)}, protocol


def read_captions(file, folder, paths):
    """A caption for each picture: from a .json, name → caption, or a text file with a line for each in sorted order."""
    with reading(file, f"a caption for each of the {len(paths)} pictures of {folder}: a line each, or .json, path → caption"):
        text = Path(file).read_text("utf-8")
        lines = text.removesuffix("\n").split("\n")  # captions may hold what splitlines() splits at
        if str(file).endswith(".json"):
            known, names = json.loads(text), [str(path.relative_to(folder)) for path in paths]
            lines = [known[name if name in known else os.path.splitext(name)[0]] for name in names]
        if len(lines) != len(paths):
            raise ValueError(f"has {len(lines)} lines")
        if not all(isinstance(line, str) for line in lines):
            raise ValueError("holds captions that are not text")
        return lines


def text_score(name, prefix, shape, a, captions, weights, workers, device):
    scorer = build(weights, f"the scorer {name}", clip_from_entries, *shape).to(device)
    paths = list_pictures(a)
    texts, scores = read_captions(captions, a, paths), []
    # CLIP's own: the shorter side to the network's size by PIL's bicubic, then the middle.
    prepare = open_clip.image_transform(scorer.model.visual.image_size, is_train=False, mean=[0.5] * 3, std=[0.5] * 3)
    for places, images in read_pictures(paths, prepare, workers):
        scores += scorer(images.to(device), scorer.embed_text([prefix + texts[i] for i in places])).tolist()
    error = np.std(scores) / len(scores) ** 0.5
    how = f"{name}: {len(scores)} pictures of {a}, standard error {error:.3f}, {prefix!r} before a caption, bicubic"
    return {name: float(np.mean(scores))}, [f"{how}, {file_hash(weights)}"]


def clip(a, *, captions, weights, workers=WORKERS, device=DEVICE):
    """CLIP score ×100 as published: ViT-B/32, "A photo depicts" and the caption; captions as lines or a .json, name → caption."""
    return text_score("CLIP", "A photo depicts ", (True, 64), a, captions, weights, workers, device)


def hpsv2(a, *, captions, weights, workers=WORKERS, device=DEVICE):
    """HPSv2 ×100: ViT-H/14 and the caption as it is."""
    return text_score("HPSv2", "", (False, 80), a, captions, weights, workers, device)


def code_histogram(side, vq, codes, image_size, workers, device):
    """Of a .npy of codes or a folder of them; or of the codes that the tokenizer gives a folder's pictures."""
    if vq:
        prepare = functools.partial(square, image_size)
        found = [vq.encode(images.to(device)).cpu() for _, images in read_pictures(list_pictures(side), prepare, workers)]
    else:
        with reading(side, f"a .npy of codes from 0 to {codes - 1} or a folder of them; pictures need --vq"):
            files = sorted(Path(side).rglob("*.npy")) if Path(side).is_dir() else [side]
            found = [torch.from_numpy(np.load(file).astype(np.int64, casting="safe")) for file in files]
            if not found or min(part.min() for part in found) < 0 or max(part.max() for part in found) >= codes:
                raise ValueError("holds none, or others; their number is --codes")
    found = torch.cat([part.flatten() for part in found])
    return len(found), token_histogram(found, codes)


def shift(a, b, *, vq="", codes=16384, image_size=256, workers=WORKERS, device=DEVICE):
    """KL divergence of token histograms, A from B, and entropies: the paper's latent covariate shift."""
    how = "nats and bits; one count added to each code, on both sides"
    if vq:
        from vq import vq_from_entries  # here alone does a measure need a model of ours

        how += f"; pictures' middle squares at {image_size} px, Lanczos, {file_hash(vq)}"
        vq = build(vq, "LlamaGen's VQ tokenizer", vq_from_entries).to(device).requires_grad_(False)
        codes = vq.config.codes
    (count_a, of_a), (count_b, of_b) = (code_histogram(side, vq, codes, image_size, workers, device) for side in (a, b))
    numbers = {"token KL": token_kl(of_a, of_b), "reverse KL": token_kl(of_b, of_a)}
    numbers |= {"entropy": token_entropy(of_a), "entropy of B": token_entropy(of_b)}
    return numbers, [f"token KL: {count_a} codes of {a}, {count_b} of {b}, of {codes}; {how}"]


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("metrics.py", None, __doc__, formatter_class=layout, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (fid, statistics, clip, hpsv2, shift):
        command = commands.add_parser(function.__name__, description=function.__doc__, allow_abbrev=False)
        command.set_defaults(function=function)
        for name, parameter in inspect.signature(function).parameters.items():
            default, option = parameter.default, parameter.kind == parameter.KEYWORD_ONLY
            kind = {} if default is parameter.empty else {"default": default, "type": type(default), "help": f"[{default}]"}
            kind |= {"required": not kind} if option else {}
            command.add_argument("--" * option + name.replace("_", "-"), **kind)
    given = vars(parser.parse_args())
    function, _ = given.pop("function"), given.pop("command")
    try:
        with reading(
            f"--device {given['device']}, --workers {given['workers']}", "a device of this machine, and 0 or more workers"
        ):
            torch.empty(0, device=given["device"])
            if given["workers"] < 0:
                raise ValueError("fewer than none")
        numbers, protocol = function(**given)
    except BadInput as error:
        print(f"metrics.py: {error}", file=sys.stderr)
        sys.exit(2)
    print("   ".join(f"{name} {value:.6g}" for name, value in numbers.items()), *protocol, sep="\n")


if __name__ == "__main__":
    main()
