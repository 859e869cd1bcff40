"""What the paper measures: the Fréchet Inception distance (from scratch), CLIP scores (through open_clip), token statistics.

Two ways to prepare a picture for Inception are in use, and they give different numbers for the same pictures:

    "clean"        clean-fid (Parmar et al. 2022): bicubic with anti-aliasing in float, (x − 128) / 128; the published tables
    "pytorch-fid"  bilinear without anti-aliasing, x / 127.5 − 1; most older papers

Pixels are in [-1, 1] for CLIP, which is differentiated, and uint8 for Inception, which is not: FID is defined on saved pictures.
"""

import re
from collections import OrderedDict

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from torch import nn
from torchvision.transforms import Normalize

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
    return network.eval().requires_grad_(False)


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
    raise ValueError(f"unknown preprocessing {preprocess!r}; there are clean and pytorch-fid")


# ---- Fréchet distance --------------------------------------------------------------------------------------------------


def feature_statistics(features):
    """Mean (F,) and covariance (F, F), float64, of features (n, F), n ≥ 2."""
    features = np.asarray(features, dtype=np.float64)
    if len(features) < 2:
        raise ValueError(f"a Fréchet distance needs at least 2 samples on each side; one side has {len(features)}")
    return features.mean(0), np.cov(features, rowvar=False)


def frechet_distance(mean_a, covariance_a, mean_b, covariance_b):
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) (Heusel et al. 2017, arXiv 1706.08500), finite also for singular Σ.

    tr (Σ_a Σ_b)^½ is the sum of the singular values of Σ_a^½ Σ_b^½. That needs no matrix root of a product that is not
    symmetric, which goes complex for singular Σ, and rounding enters it once, not under a root.
    """

    def root(covariance):
        values, vectors = np.linalg.eigh(covariance)
        return vectors * np.sqrt(values.clip(min=0)) @ vectors.T

    overlap = np.linalg.svd(root(covariance_a) @ root(covariance_b), compute_uv=False).sum()
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
