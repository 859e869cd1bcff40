"""The tokenizer: a VQ-GAN's encoder, codebook and decoder D_φ, with the two networks that train it, PatchGAN and LPIPS.

The VQ-GAN (Esser et al. 2021, arXiv 2012.09841) is LlamaGen's VQ-16, entry for entry, so that `vq_ds16_t2i.pt` loads strictly:

    file               channels  multipliers  factor  codes      parameters
    scenes/vq.pt             32  1,1,2             4  512 × 8         0.9 M
    vq_ds16_t2i.pt          128  1,1,2,2,4        16  16384 × 8      72   M

Codebook and latents are l2-normalized on both sides, so the nearest code is the one of largest cosine.
Departure from VQ-GAN: the discriminator uses GroupNorm for BatchNorm, so that a picture's verdict depends neither on the
pictures beside it nor on train() and eval(), and several processes need not share statistics.

Axes: B images, N = h·w codes, D code size. Pixels are in [-1, 1].
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import vgg16
from torchvision.transforms import Normalize


@dataclass(frozen=True)
class VQConfig:
    """Sizes of a VQ-GAN. Each level after the first halves the resolution, so a code stands for 2^(levels − 1) pixels a side."""

    channels: int = 32
    multipliers: tuple = (1, 1, 2)
    blocks: int = 1  # residual blocks a level; the decoder has one more
    latent: int = 64  # channels between the convolutions and the codebook's projection
    codes: int = 512
    code_size: int = 8


# ---- VQ-GAN ------------------------------------------------------------------------------------------------------------


def group_norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    def __init__(self, inside, outside):
        super().__init__()
        self.norm1 = group_norm(inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.norm2 = group_norm(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        if inside != outside:
            self.nin_shortcut = nn.Conv2d(inside, outside, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))  # (B, 1, h·w, channels)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).view_as(x)
        return x + self.proj_out(h)


def downsample(channels):
    """Half the resolution; padded right and below only, as in VQ-GAN."""
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(channels, channels, 3, stride=2)))


def upsample(channels):
    return nn.Sequential(OrderedDict(repeat=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(channels, channels, 3, padding=1)))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where `attend`, then a change of resolution."""

    def __init__(self, inside, outside, blocks, attend, resample=None):
        super().__init__()
        self.res = nn.ModuleList(ResidualBlock(outside if i else inside, outside) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(outside) for _ in range(blocks if attend else 0))
        self.resample = resample[0] if resample else None  # the name it has in files
        if resample:
            self.add_module(*resample)

    def forward(self, x):
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return getattr(self, self.resample)(x) if self.resample else x


def middle(channels):
    return nn.Sequential(ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels))


def levels(first, widths, blocks, lowest, name, resample):
    """A chain of `Level`s, each but the last followed by `resample` under `name`; attention is at the `lowest` resolution."""
    chain, last = enumerate(zip([first, *widths], widths)), len(widths) - 1
    return nn.Sequential(*(Level(a, b, blocks, i == lowest, (name, resample(b)) if i < last else None) for i, (a, b) in chain))


def encoder(c):
    """Images (B, 3, H, W) to (B, latent, h, w). The names are the entries'; the SiLU is in no file."""
    widths = [c.channels * m for m in c.multipliers]
    chain = levels(c.channels, widths, c.blocks, len(widths) - 1, "downsample", downsample)
    layers = {"conv_in": nn.Conv2d(3, c.channels, 3, padding=1), "conv_blocks": chain, "mid": middle(widths[-1])}
    layers |= {"norm_out": group_norm(widths[-1]), "silu": nn.SiLU(), "conv_out": nn.Conv2d(widths[-1], c.latent, 3, padding=1)}
    return nn.Sequential(OrderedDict(layers))


def decoder(c):
    """D_φ, (B, latent, h, w) to images (B, 3, H, W)."""
    widths = [c.channels * m for m in reversed(c.multipliers)]
    chain = levels(widths[0], widths, c.blocks + 1, 0, "upsample", upsample)
    layers = {"conv_in": nn.Conv2d(c.latent, widths[0], 3, padding=1), "mid": middle(widths[0]), "conv_blocks": chain}
    layers |= {"norm_out": group_norm(widths[-1]), "silu": nn.SiLU(), "conv_out": LastConv(widths[-1], 3, 3, padding=1)}
    return nn.Sequential(OrderedDict(layers))


class LastConv(nn.Conv2d):
    """A convolution in float32 whatever autocast says: in bf16 it would paint in steps of half an 8-bit level."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class Codebook(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.codes, config.code_size)
        self.register_buffer("codebook_used", torch.zeros(65536))  # LlamaGen's usage statistic; carried, never read

    def vectors(self):
        """The unit vectors (V, D), in float32: neighbouring codes differ by less than bf16 resolves."""
        return F.normalize(self.embedding.weight.float(), dim=-1)

    def nearest(self, latents):
        """Codes (B, N) of latents (B, D, h, w)."""
        with torch.autocast(latents.device.type, enabled=False):  # it would take the products back to bf16
            return torch.einsum("bdhw,vd->bhwv", latents.float(), self.vectors()).argmax(-1).flatten(1)


class VQModel(nn.Module):
    """LlamaGen's VQ-16. Attribute names are its entry names."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = encoder(config)
        self.quant_conv = nn.Conv2d(config.latent, config.code_size, 1)
        self.quantize = Codebook(config)
        self.post_quant_conv = nn.Conv2d(config.code_size, config.latent, 1)
        self.decoder = decoder(config)

    def latents(self, images):
        """Images (B, 3, H, W) to latents (B, D, h, w) before quantization and normalization."""
        return self.quant_conv(self.encoder(images))

    @torch.no_grad()
    def encode(self, images):
        """Images (B, 3, H, W) in [-1, 1] to codes (B, N), row by row."""
        return self.quantize.nearest(self.latents(images))

    def decode_latents(self, latents):
        """Unit latents (B, D, h, w) to images (B, 3, H, W), float32, about [-1, 1] (not clamped: that would cut gradients)."""
        return self.decoder(self.post_quant_conv(latents))

    def decode(self, codes):
        """Codes (B, N) of a square image to images (B, 3, H, W)."""
        side = round(codes.shape[1] ** 0.5)
        z = self.quantize.vectors()[codes].transpose(1, 2).unflatten(2, (side, side))  # (B, D, h, w)
        return self.decode_latents(z)

    def moving_parameters(self):
        """What RankE's stage 2 trains: D and the post-quantization convolution. Encoder and codebook define the tokens and stay."""
        return [*self.post_quant_conv.parameters(), *self.decoder.parameters()]


def vq_from_entries(entries):
    """A VQ-GAN from a state dict in LlamaGen's layout; sizes from the shapes.

    Raises KeyError for a missing entry and RuntimeError (PyTorch's, naming each) for missing, surplus or misshapen ones.
    """
    channels = entries["encoder.conv_in.weight"].shape[0]
    levels = 1 + max((int(name.split(".")[2]) for name in entries if name.startswith("encoder.conv_blocks.")), default=-1)
    firsts = [entries[f"encoder.conv_blocks.{i}.res.0.conv1.weight"] for i in range(levels)]
    multipliers = tuple(first.shape[0] // channels for first in firsts)
    blocks = sum(name.startswith("encoder.conv_blocks.0.res.") and name.endswith("conv1.weight") for name in entries)
    config = VQConfig(
        channels, multipliers, blocks, len(entries["encoder.conv_out.weight"]), *entries["quantize.embedding.weight"].shape
    )
    with torch.device("meta"):
        vq = VQModel(config)
    statistic = {"quantize.codebook_used": torch.zeros(65536)}  # some files leave it out
    vq.load_state_dict(statistic | entries, strict=True, assign=True)
    return vq.float()


# ---- the networks that judge a decoder ---------------------------------------------------------------------------------


def patch_discriminator(channels=64, halvings=3, kernel=4):
    """PatchGAN (Isola et al. 2017): images (B, 3, H, W) to a logit a patch (B, 1, h, w).

    With kernel 4, `halvings` = 3 sees 70 pixels (VQ-GAN's size); with kernel 3, `halvings` = 1 sees 11.
    """
    widths = [channels * min(2**i, 8) for i in range(halvings + 1)]
    layers = [nn.Conv2d(3, channels, kernel, stride=2, padding=1), nn.LeakyReLU(0.2)]
    for i, (before, width) in enumerate(zip(widths, widths[1:])):
        stride = 2 if i < halvings - 1 else 1
        layers += [nn.Conv2d(before, width, kernel, stride, padding=1, bias=False), nn.GroupNorm(8, width), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, kernel, padding=1))


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018, arXiv 1801.03924).

    `stages` follow each other, images to feature maps; `weights` holds a non-negative number a channel for each stage.
    """

    def __init__(self, stages, weights):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.weights = nn.ParameterList(weights)

    def forward(self, a, b):
        """Distances (B,) between images a and b (B, 3, H, W) in [-1, 1]."""
        total = 0.0
        for stage, weight in zip(self.stages, self.weights):
            a, b = stage(a), stage(b)
            x, y = (f.float() / (f.float().square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (a, b))
            total = total + ((x - y).square() * weight.view(1, -1, 1, 1)).sum(1).mean((1, 2))
        return total


def lpips_from_entries(vgg, linear):
    """LPIPS from torchvision's VGG16 entries and the five linear layers (`vgg.pth` of the lpips package). Raises like `vq_from_entries`."""
    with torch.device("meta"):  # the classifier's 500 MB never exist
        layers = vgg16(weights=None).features[:30]
    entries = {name.removeprefix("features."): value for name, value in vgg.items() if name.startswith("features.")}
    layers.load_state_dict(entries, strict=True, assign=True)
    # ImageNet's mean and deviation, carried over from [0, 1] to [-1, 1]; a stage ends with the last ReLU before a pooling.
    normalize = Normalize([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450])
    stages = [nn.Sequential(normalize, layers[:4]), layers[4:9], layers[9:16], layers[16:23], layers[23:]]
    return LPIPS(stages, [linear[f"lin{i}.model.1.weight"].flatten() for i in range(5)]).float().requires_grad_(False)
