"""The tokenizer, a VQ-GAN: encoder, codebook and decoder D_φ; and what trains it, PatchGAN and LPIPS.

The VQ-GAN (Esser et al. 2021, arXiv 2012.09841) is LlamaGen's VQ-16 entry for entry: its file loads strictly.

    file                 ch  ch_mult      factor  codebook   parameters
    scenes/vq.pt         32  1,1,2,2           8   1024 × 8       1.2 M
    vq_ds16_t2i.pt      128  1,1,2,2,4        16  16384 × 8        72 M

Codebook and latents are l2-normalized, so the nearest code is the one of largest cosine.
Departure from VQ-GAN: the discriminator uses GroupNorm for BatchNorm, so an image's logits depend neither on
the images beside it nor on train() and eval(), and several processes need not share statistics.

Axes: B images of N = h·w codes, V codes of d dimensions in the codebook. Pixels are in [-1, 1].
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import vgg16
from torchvision.transforms import Normalize

from files.disk import expect
from files.weights import build, count_layers


@dataclass(frozen=True)
class VQConfig:
    """Sizes of a VQ-GAN. Levels after the first halve the resolution: a code is 2^(levels − 1) px wide."""

    ch: int = 128
    ch_mult: tuple = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2  # a level's; the decoder has one more
    z_channels: int = 256  # between the convolutions and the codebook's projection
    codebook_size: int = 16384
    codebook_dim: int = 8
    norm_groups: int = 32  # of GroupNorm; not seen in the shapes

    def grid_size(self, image_size):
        """Codes a side of an image of `image_size` pixels. Raises InputError where it does not divide."""
        factor = 2 ** (len(self.ch_mult) - 1)
        grid_size, rest = divmod(image_size, factor)
        expect(grid_size and not rest, f"--image-size {image_size}: expected a multiple of the tokenizer's {factor}")
        return grid_size


# ---- VQ-GAN ----------------------------------------------------------------------------------------------------------


class ResnetBlock(nn.Module):
    def __init__(self, in_ch, out_ch, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_ch, eps=1e-6)
        self.conv1 = nn.Conv2d(in_ch, out_ch, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_ch, eps=1e-6)
        self.conv2 = nn.Conv2d(out_ch, out_ch, 3, padding=1)
        self.nin_shortcut = nn.Identity() if in_ch == out_ch else nn.Conv2d(in_ch, out_ch, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    def __init__(self, ch, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, ch, eps=1e-6)
        self.q = nn.Conv2d(ch, ch, 1)
        self.k = nn.Conv2d(ch, ch, 1)
        self.v = nn.Conv2d(ch, ch, 1)
        self.proj_out = nn.Conv2d(ch, ch, 1)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (y.flatten(2).transpose(1, 2)[:, None] for y in (self.q(h), self.k(h), self.v(h)))  # (B, 1, h·w, ch)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).view_as(x)
        return x + self.proj_out(h)


def downsample(ch):
    """Half the resolution; padded right and below only, as in VQ-GAN."""
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(ch, ch, 3, stride=2)))


def upsample(ch):
    return nn.Sequential(OrderedDict(repeat=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(ch, ch, 3, padding=1)))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where `attend`."""

    def __init__(self, in_ch, out_ch, num_res_blocks, groups, attend):
        super().__init__()
        self.res, self.attn = nn.ModuleList(), nn.ModuleList()
        for i in range(num_res_blocks):
            self.res.append(ResnetBlock(out_ch if i else in_ch, out_ch, groups))
            self.attn.append(AttnBlock(out_ch, groups) if attend else nn.Identity())

    def forward(self, x):
        for block, attn in zip(self.res, self.attn):
            x = attn(block(x))
        return x


def mid(ch, groups):
    return nn.Sequential(ResnetBlock(ch, ch, groups), AttnBlock(ch, groups), ResnetBlock(ch, ch, groups))


class Encoder(nn.Module):
    """Images (B, 3, H, W) to (B, z_channels, h, w); attention at the lowest resolution only."""

    def __init__(self, config):
        super().__init__()
        widths, groups = [config.ch * mult for mult in config.ch_mult], config.norm_groups
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        in_ch = config.ch
        for i, out_ch in enumerate(widths):
            last = i == len(widths) - 1
            level = Level(in_ch, out_ch, config.num_res_blocks, groups, attend=last)
            level.downsample = nn.Identity() if last else downsample(out_ch)
            self.conv_blocks.append(level)
            in_ch = out_ch
        self.mid = mid(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for level in self.conv_blocks:
            h = level.downsample(level(h))
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """D_φ: (B, z_channels, h, w) to images (B, 3, H, W)."""

    def __init__(self, config):
        super().__init__()
        widths, groups = [config.ch * mult for mult in reversed(config.ch_mult)], config.norm_groups
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = mid(widths[0], groups)
        self.conv_blocks = nn.ModuleList()
        in_ch = widths[0]
        for i, out_ch in enumerate(widths):
            last = i == len(widths) - 1
            level = Level(in_ch, out_ch, config.num_res_blocks + 1, groups, attend=i == 0)
            level.upsample = nn.Identity() if last else upsample(out_ch)
            self.conv_blocks.append(level)
            in_ch = out_ch
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z):
        h = self.mid(self.conv_in(z))
        for level in self.conv_blocks:
            h = level.upsample(level(h))
        h = F.silu(self.norm_out(h))
        # In float32 whatever autocast says: bf16 would paint in steps of half an 8-bit level.
        with torch.autocast(h.device.type, enabled=False):
            return self.conv_out(h.float())


class Codebook(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)
        self.register_buffer("codebook_used", torch.zeros(65536))  # usage statistic; carried, never read

    def vectors(self):
        """The unit vectors (V, d), in float32: neighbouring codes differ by less than bf16 resolves."""
        return F.normalize(self.embedding.weight.float(), dim=-1)

    def nearest(self, latents):
        """Codes (B, N) of latents (B, d, h, w)."""
        with torch.autocast(latents.device.type, enabled=False):  # autocast would make the products bf16
            return torch.einsum("bdhw,vd->bhwv", latents.float(), self.vectors()).argmax(-1).flatten(1)


class VQModel(nn.Module):
    """LlamaGen's VQ-16. Attribute names are its entry names."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.quantize = Codebook(config)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)
        self.decoder = Decoder(config)

    def encode_latents(self, images):
        """Images (B, 3, H, W) in [-1, 1] to latents (B, d, h, w) before normalization and quantization."""
        return self.quant_conv(self.encoder(images))

    @torch.no_grad()
    def encode(self, images):
        """Images (B, 3, H, W) in [-1, 1] to codes (B, N), row by row."""
        return self.quantize.nearest(self.encode_latents(images))

    def decode_latents(self, latents):
        """Unit latents (B, d, h, w) to images (B, 3, H, W), about [-1, 1]; who shows, scores or ranks them clamps."""
        return self.decoder(self.post_quant_conv(latents))

    def decode(self, codes):
        """Codes (B, N) of a square image to images (B, 3, H, W), float32."""
        h = round(codes.shape[1] ** 0.5)
        z = self.quantize.vectors()[codes].transpose(1, 2).unflatten(2, (h, h))  # (B, d, h, w)
        return self.decode_latents(z)

    def decoder_parameters(self):
        """Stage 2 trains D and the post-quantization convolution; the rest defines the tokens and stays."""
        return [*self.post_quant_conv.parameters(), *self.decoder.parameters()]


def load_vq(state_dict, norm_groups=32):
    """A VQ-GAN from LlamaGen's state dict, or Janus-Pro's under `gen_vision_model.`; sizes from the shapes.

    Raises KeyError for a missing entry, or PyTorch's RuntimeError naming those missing, surplus or misshapen.
    """
    prefix = "gen_vision_model."
    if any(name.startswith(prefix) for name in state_dict):
        state_dict = {name.removeprefix(prefix): x for name, x in state_dict.items() if name.startswith(prefix)}
    ch = len(state_dict["encoder.conv_in.weight"])
    levels = range(count_layers(state_dict, "encoder.conv_blocks."))
    codebook_size, codebook_dim = state_dict["quantize.embedding.weight"].shape
    config = VQConfig(
        ch=ch,
        ch_mult=tuple(len(state_dict[f"encoder.conv_blocks.{i}.res.0.conv1.weight"]) // ch for i in levels),
        num_res_blocks=count_layers(state_dict, "encoder.conv_blocks.0.res."),
        z_channels=len(state_dict["encoder.conv_out.weight"]),
        codebook_size=codebook_size,
        codebook_dim=codebook_dim,
        norm_groups=norm_groups,
    )
    statistic = {"quantize.codebook_used": torch.zeros(65536)}  # some files leave it out
    # channels_last: the layout in which convolutions are fastest.
    return build(lambda: VQModel(config), statistic | state_dict).to(memory_format=torch.channels_last)


# ---- what trains a decoder -------------------------------------------------------------------------------------------


def patch_discriminator(ndf=64, n_layers=3, kernel=4):
    """PatchGAN (Isola et al. 2017, arXiv 1611.07004): images (B, 3, H, W) to a logit a patch (B, 1, h, w).

    A patch has 70 pixels a side with kernel 4 and 3 layers (VQ-GAN's size), 11 with kernel 3 and 1 layer.
    """
    widths = [ndf * min(2**i, 8) for i in range(n_layers + 1)]
    layers = [nn.Conv2d(3, ndf, kernel, stride=2, padding=1), nn.LeakyReLU(0.2)]
    for i in range(n_layers):
        stride = 2 if i < n_layers - 1 else 1
        conv = nn.Conv2d(widths[i], widths[i + 1], kernel, stride, padding=1, bias=False)
        layers += [conv, nn.GroupNorm(8, widths[i + 1]), nn.LeakyReLU(0.2)]
    layers.append(nn.Conv2d(widths[-1], 1, kernel, padding=1))
    for layer in layers:  # as CycleGAN's and VQ-GAN's discriminators start; biases stay PyTorch's
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.02)
        elif isinstance(layer, nn.GroupNorm):
            nn.init.normal_(layer.weight, mean=1.0, std=0.02)
    return nn.Sequential(*layers)


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018, arXiv 1801.03924).

    `slices` follow each other, images to feature maps; `weights`: a non-negative number a channel for each.
    """

    def __init__(self, slices, weights):
        super().__init__()
        self.slices = nn.ModuleList(slices)
        self.weights = nn.ParameterList(weights)
        self.requires_grad_(False)

    def forward(self, a, b):
        """Distances (B,) between images a and b (B, 3, H, W) in [-1, 1]."""
        distance = 0.0
        for features, weight in zip(self.slices, self.weights):
            a, b = features(a), features(b)
            difference = unit(a) - unit(b)  # (B, channels, h, w)
            distance = distance + (difference.square() * weight.view(1, -1, 1, 1)).sum(1).mean((1, 2))
        return distance


def unit(features):
    """Features (B, channels, h, w), each position's channels scaled to length 1."""
    features = features.float()
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)


def load_lpips(vgg_state_dict, linear_state_dict):
    """LPIPS from torchvision's VGG16 and the 5 linear layers in lpips' `vgg.pth`. Raises like `load_vq`."""
    features = {n.removeprefix("features."): x for n, x in vgg_state_dict.items() if n.startswith("features.")}
    layers = build(lambda: vgg16(weights=None).features[:30], features)
    # ImageNet's mean and deviation, for pixels in [-1, 1]; a slice ends with the last ReLU before a pooling.
    normalize = Normalize([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450])
    slices = [nn.Sequential(normalize, layers[:4]), layers[4:9], layers[9:16], layers[16:23], layers[23:]]
    weights = [linear_state_dict[f"lin{i}.model.1.weight"] for i in range(5)]
    return LPIPS(slices, [weight.float().view(n) for weight, n in zip(weights, (64, 128, 256, 512, 512))])
