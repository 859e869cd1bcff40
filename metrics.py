"""What the paper measures: the Fréchet Inception distance (from scratch), CLIP scores (through open_clip), token statistics.

Two ways to prepare a picture for Inception are in use, and they give different numbers for the same pictures:

    "clean"        clean-fid (Parmar et al. 2022): bicubic with anti-aliasing in float, (x − 128) / 128; the published tables
    "pytorch-fid"  bilinear without anti-aliasing, x / 127.5 − 1; most older papers

Pixels are in [-1, 1] for CLIP, which is differentiated, and uint8 for Inception, which is not: FID is defined on saved pictures.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

# ---- Inception-v3, FID variant -----------------------------------------------------------------------------------------
# The 2015 TensorFlow graph that FID is defined on differs from the well-known PyTorch one in its pools: averages leave
# out the padding, and the last block pools by maximum. A branch is a list of (width, kernel), by name; a list within the list
# is a fork whose arms are concatenated. The pool's arm comes last.


def _a(pool_width):
    return {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
        "branch_pool": [(pool_width, 1)],
    }


def _c(w):
    return {
        "branch1x1": [(192, 1)],
        "branch7x7": [(w, 1), (w, (1, 7)), (192, (7, 1))],
        "branch7x7dbl": [(w, 1), (w, (7, 1)), (w, (1, 7)), (w, (7, 1)), (192, (1, 7))],
        "branch_pool": [(192, 1)],
    }


_B = {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}
_D = {"branch3x3": [(192, 1), (320, 3)], "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)]}
_E = {
    "branch1x1": [(320, 1)],
    "branch3x3": [(384, 1), [(384, (1, 3)), (384, (3, 1))]],
    "branch3x3dbl": [(448, 1), (384, 3), [(384, (1, 3)), (384, (3, 1))]],
    "branch_pool": [(192, 1)],
}
_BLOCKS = {  # name: (channels in, branches, pool, stride of each branch's last convolution)
    "Mixed_5b": (192, _a(32), "average", 1),
    "Mixed_5c": (256, _a(64), "average", 1),
    "Mixed_5d": (288, _a(64), "average", 1),
    "Mixed_6a": (288, _B, "max", 2),
    "Mixed_6b": (768, _c(128), "average", 1),
    "Mixed_6c": (768, _c(160), "average", 1),
    "Mixed_6d": (768, _c(160), "average", 1),
    "Mixed_6e": (768, _c(192), "average", 1),
    "Mixed_7a": (768, _D, "max", 2),
    "Mixed_7b": (1280, _E, "average", 1),
    "Mixed_7c": (2048, _E, "max", 1),
}


class ConvNorm(nn.Module):
    def __init__(self, inside, outside, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outside, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Parallel branches, concatenated. Layer k of a branch is the entry `NAME_k`; a fork's arms are `NAME_ka` and `NAME_kb`."""

    def __init__(self, inside, branches, pool, stride):
        super().__init__()
        self.pool, self.stride, self.plan = pool, stride, {}
        for name, branch in branches.items():
            before, self.plan[name] = inside, []
            for k, layer in enumerate(branch, 1):
                arms = layer if isinstance(layer, list) else [layer]
                last = k == len(branch) and stride == 2
                numbered = f"{name}_{k}" if len(branch) > 1 else name
                names = [numbered + "ab"[i] for i in range(2)] if len(arms) == 2 else [numbered]
                for arm, (width, kernel) in zip(names, arms):
                    same = 0 if last else tuple(n // 2 for n in kernel) if isinstance(kernel, tuple) else kernel // 2
                    self.add_module(arm, ConvNorm(before, width, kernel, 2 if last else 1, same))
                before = width
                self.plan[name].append(names)

    def forward(self, x):
        if self.pool == "average":
            pooled = F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False)
        else:
            pooled = F.max_pool2d(x, 3, self.stride, padding=1 if self.stride == 1 else 0)
        outputs = []
        for name, layers in self.plan.items():
            y = pooled if name == "branch_pool" else x
            for arms in layers:
                y = torch.cat([getattr(self, arm)(y) for arm in arms], 1)
            outputs.append(y)
        return torch.cat(outputs if "branch_pool" in self.plan else [*outputs, pooled], 1)


class Inception(nn.Module):
    """Prepared pictures (B, 3, 299, 299), about [-1, 1], to pooled features (B, 2048). Entry names are the public file's."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3)
        for name, block in _BLOCKS.items():
            self.add_module(name, Mixed(*block))

    def forward(self, x):
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name in _BLOCKS:
            x = getattr(self, name)(x)
        return x.mean((2, 3))


def inception_from_entries(entries):
    """The network of `pt_inception-2015-12-05-6726825d.pth`, without its classifier. Raises RuntimeError where an entry does not fit."""
    network = Inception()
    network.load_state_dict({name: value for name, value in entries.items() if not name.startswith("fc.")}, strict=True)
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
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def embed_text(self, captions):
        """B captions to unit embeddings (B, E)."""
        return self.model.encode_text(self.tokenize(captions).to(self.mean.device), normalize=True).float()

    def forward(self, images, text):
        """Scores (R,) of images (R, 3, H, W) in [-1, 1] against text embeddings (R, E)."""
        size = self.model.visual.image_size
        x = (images.clamp(-1, 1) + 1) / 2  # a saved picture has no pixel outside: nothing to gain there
        if tuple(x.shape[2:]) != tuple(size):
            x = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        features = self.model.encode_image((x - self.mean) / self.std, normalize=True)
        return 100 * (features.float() * text).sum(-1)


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
