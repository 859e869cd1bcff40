"""The embedded world: small captioned scenes, and everything a post-training run needs of a world, made in minutes on a CPU.

A scene is one object on a background, 32×32, drawn from seven attributes; its caption names them:
"small red striped circle top left on navy". Jitter, rotation, shading, woven ground, blotches and grain are in no caption:
the decoder has to paint them. Four networks stand in for the public ones:

    here                                     in place of
    a Gaussian vector a word                 T5's features
    open_clip's CLIP class, very small       CLIP ViT-L/14, the reward
    an attribute classifier's feature maps   VGG16 in LPIPS
    another classifier, another seed         Inception in FID; no training ever sees it

`pretrain` makes them and the base policy and VQ-GAN, which are saved in LlamaGen's layout as a public checkpoint would be.
Nothing of the method is here, and nothing that a real checkpoint needs.
"""

import functools
import multiprocessing
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import nn

from metrics import CLIPScore, feature_statistics, frechet_distance, token_entropy, token_histogram, token_kl
from policy import Policy, PolicyConfig, left_pad, token_log_probs
from rankee import discriminator_loss, in_rows, reconstruction_anchor
from vq import LPIPS, VQConfig, VQModel, patch_discriminator

FOLDER = Path(__file__).parent
RESOLUTION = 32
HEAD_SIZE = 16  # of the policy; LlamaGen's 64 would leave it one and a half heads

# ---- captions ----------------------------------------------------------------------------------------------------------

ATTRIBUTES = {
    "size": ["small", "large"],
    "colour": ["red", "green", "blue", "yellow", "cyan", "purple"],
    "texture": ["plain", "striped", "dotted", "checkered"],
    "shape": ["circle", "square", "triangle", "ring", "cross"],
    "vertical": ["top", "middle", "bottom"],
    "horizontal": ["left", "center", "right"],
    "background": ["black", "white", "grey", "navy", "olive"],
}
COUNTS = torch.tensor([len(words) for words in ATTRIBUTES.values()])
VOCABULARY = ["<start>", *sorted({"on", *(word for words in ATTRIBUTES.values() for word in words)}), "<end>"]


def random_attributes(n, generator):
    """n scenes as indices into the words of `ATTRIBUTES`, (n, 7)."""
    return (torch.rand(n, len(COUNTS), generator=generator) * COUNTS).long()


def caption(attributes):
    """The caption of one scene (7,): seven words and "on"."""
    words = [names[i] for names, i in zip(ATTRIBUTES.values(), attributes.tolist())]
    return " ".join([*words[:-1], "on", words[-1]])


@functools.cache
def word_vector(word, width):
    """The stand-in for a text encoder: a frozen Gaussian vector (width,), seeded by the word."""
    return torch.randn(width, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))


def word_features(captions, width):
    """Text features of captions, a list of (words, width)."""
    return [torch.stack([word_vector(word, width) for word in text.split()]) for text in captions]


def tokenize(captions):
    """Word indices (B, 10) for the reward model. <end> has the highest index, where CLIP's text tower reads its result."""
    return torch.tensor([[VOCABULARY.index(word) for word in f"<start> {text} <end>".split()] for text in captions])


# ---- pictures ----------------------------------------------------------------------------------------------------------

RGB = {
    "red": (0.90, 0.15, 0.15), "green": (0.15, 0.75, 0.25), "blue": (0.20, 0.35, 0.95), "yellow": (0.95, 0.85, 0.15),
    "cyan": (0.15, 0.85, 0.90), "purple": (0.65, 0.20, 0.80), "black": (0.08, 0.08, 0.08), "white": (0.92, 0.92, 0.92),
    "grey": (0.50, 0.50, 0.50), "navy": (0.08, 0.10, 0.35), "olive": (0.40, 0.40, 0.12),
}  # fmt: skip


def signed_distances(p, r):
    """Distances (n, 5, H, W) from points p (n, 2, H, W) to the outlines of the five shapes of radius r (n, 1, 1); inside is negative."""
    x, y = p.unbind(1)
    length = p.square().sum(1).sqrt()
    box = lambda width, height: torch.maximum(x.abs() - width, y.abs() - height)
    triangle = torch.maximum(0.866 * x.abs() - 0.5 * y, y) - 0.55 * r
    ring = (length - 0.72 * r).abs() - 0.28 * r
    cross = torch.minimum(box(r, 0.32 * r), box(0.32 * r, r))
    return torch.stack([length - r, box(0.85 * r, 0.85 * r), triangle, ring, cross], 1)


def draw(attributes, generator):
    """Scenes (n, 7) to pictures (n, 3, 32, 32) in [-1, 1], with fresh nuisance from `generator`."""
    n, row = len(attributes), torch.arange(len(attributes))
    size, colour, texture, shape, vertical, horizontal, background = attributes.unbind(1)
    palette = lambda name, index: torch.tensor([RGB[word] for word in ATTRIBUTES[name]])[index]
    uniform = lambda *shape: torch.rand(n, *shape, generator=generator) * 2 - 1
    axis = (torch.arange(RESOLUTION) + 0.5) / RESOLUTION * 2 - 1

    # The object's own coordinates: moved, jittered, rotated.
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    centre = 0.46 * (torch.stack([horizontal, vertical], 1) - 1) + 0.04 * uniform(2)
    p = torch.stack([x, y]) - centre[:, :, None, None]  # (n, 2, H, W)
    angle = 0.2 * uniform()
    turn = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()], 1).view(n, 2, 2)
    q = torch.einsum("nij,njhw->nihw", turn, p)
    radius = torch.tensor([0.32, 0.50])[size] * (1 + 0.06 * uniform())
    outline = signed_distances(q, radius[:, None, None])[row, shape]  # (n, H, W)
    coverage = (0.5 - outline * RESOLUTION / 2).clamp(0, 1)  # anti-aliased over one pixel

    # Paint: a texture of two inks, lit from one side.
    across, along = torch.sin(q * (2 * torch.pi / 0.42) + torch.pi * uniform(2, 1, 1)).unbind(1)
    inks = torch.stack([torch.full_like(across, 9.0), along, across + along - 0.6, 2 * across * along], 1)
    ink = 0.25 + 0.75 * torch.sigmoid(3 * inks[row, texture])
    light = 1 + 0.4 * torch.einsum("ni,nihw->nhw", F.normalize(uniform(2), dim=1), p).clamp(-0.5, 0.5)
    paint = (palette("colour", colour) + 0.04 * uniform(3))[:, :, None, None] * (ink * light)[:, None]

    # Ground: a weave of 3 pixels, low-frequency blotches.
    cell = torch.arange(RESOLUTION) // 3
    weave = 0.05 * ((cell[:, None] + cell) % 2 * 2 - 1)
    blotches = 0.05 * F.interpolate(uniform(1, 4, 4), RESOLUTION, mode="bilinear")
    ground = (palette("background", background) + 0.02 * uniform(3))[:, :, None, None] + weave + blotches

    grain = 0.0125 * torch.randn(ground.shape, generator=generator)
    return (torch.lerp(ground, paint, coverage[:, None]) + grain).clamp(0, 1) * 2 - 1


# ---- the world's networks ----------------------------------------------------------------------------------------------


class AttributeNet(nn.Module):
    """A classifier of the seven attributes; its parts are the world's VGG (`layers`) and the world's Inception (`features`)."""

    def __init__(self):
        super().__init__()
        block = lambda a, b, stride: nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.GroupNorm(8, b), nn.SiLU())
        self.layers = nn.Sequential(block(3, 24, 1), block(24, 48, 2), block(48, 48, 1), block(48, 64, 2), block(64, 32, 2))
        self.neck = nn.Linear(32 * 16, 64)
        self.heads = nn.Linear(64, int(COUNTS.sum()))

    def features(self, images):
        """Images (B, 3, 32, 32) to what the classes are read from, (B, 64), and the middle layer's channel means, (B, 48)."""
        middle = self.layers[:3](images)
        return F.silu(self.neck(self.layers[3:](middle).flatten(1))), middle.mean((2, 3))

    def logits(self, features):
        """Features (B, 64) to logits for each attribute, a tuple of (B, words)."""
        return self.heads(features).split(COUNTS.tolist(), dim=1)


def small_clip():
    """open_clip's CLIP at the world's size, with two helps without which it learns neither position nor shape in minutes.

    Convolutions before the patches (Xiao et al. 2021, arXiv 2106.14881), and a start of the position embedding at sines of
    the row and column.
    """
    vision = CLIPVisionCfg(layers=3, width=64, head_width=16, patch_size=4, image_size=RESOLUTION)
    text = CLIPTextCfg(context_length=10, vocab_size=len(VOCABULARY), width=64, heads=4, layers=2)
    model = CLIP(64, vision, text)
    stem = [nn.Conv2d(3, 32, 3, 2, 1), nn.GELU(), nn.Conv2d(32, 64, 3, 2, 1), nn.GELU(), nn.Conv2d(64, 64, 1)]
    for layer in stem[::2]:
        nn.init.kaiming_normal_(layer.weight)  # PyTorch's default is so small that the positions drown the picture
    model.visual.conv1 = nn.Sequential(*stem)
    turns = torch.arange(8)[:, None] * 2 ** torch.linspace(-2.5, 0.5, 16)
    waves = torch.cat([turns.sin(), turns.cos()], 1)  # (8, 32)
    with torch.no_grad():
        rows, columns = waves[:, None].expand(8, 8, 32), waves[None].expand(8, 8, 32)
        model.visual.positional_embedding[1:] = 0.5 * torch.cat([rows, columns], -1).flatten(0, 1)
    return model


def small_discriminator():
    """A patch of 11 pixels: one that sees the whole object saturates within a few rounds."""
    return patch_discriminator(channels=32, halvings=1, kernel=3)


class Scenes:
    """The world as a run sees it: judges, batches without end, and the `s.samples` captions, real images and noise that
    every model of a run is drawn and measured on, so that rows of a table differ by their models alone."""

    def __init__(self, judges, s, config, vq, device):
        """`judges`: the file scenes/judges.pt, name → state dict; `s`: the run's settings; `config`: the policy's."""

        def load(module, name):
            module.load_state_dict(judges[name])
            return module.to(device).eval()

        self.s, self.config, self.device = s, config, device
        self.scorer = CLIPScore(load(small_clip(), "reward"), tokenize, [0.5] * 3, [0.5] * 3).to(device)
        self.perceptual = perceptual_distance(load(AttributeNet(), "perceptual")).to(device)
        self.feature_net = load(AttributeNet(), "features").requires_grad_(False)
        self.discriminator = load(small_discriminator(), "discriminator")
        generator = torch.Generator().manual_seed(10**6 + s.seed)
        self.attributes = random_attributes(s.samples, generator)
        self.captions, self.features, self.text_mask, self.real = self.show(self.attributes, generator)
        self.noise = torch.rand(s.samples, 1, config.grid**2, generator=generator).to(device)
        self.real_histogram = token_histogram(in_rows(vq.encode, self.real, size=s.micro_batch), config.codes)
        generator = torch.Generator().manual_seed(2**31)  # distances are to other scenes, the same for every arm and seed
        self.real_features = self.feature_net.features(self.show(random_attributes(s.samples, generator), generator)[3])

    def show(self, attributes, generator):
        """Scenes (n, 7) as captions, left-padded text features (n, T, C), their mask (n, T) and pictures (n, 3, 32, 32)."""
        captions = [caption(row) for row in attributes]
        features, text_mask = left_pad(word_features(captions, self.config.caption_dim), self.config.prefix)
        return captions, *(tensor.to(self.device) for tensor in (features, text_mask, draw(attributes, generator)))

    def batch(self, generator):
        """The same of new scenes, enough for a round."""
        return self.show(random_attributes(max(self.s.captions, self.s.real_images), generator), generator)

    @torch.no_grad()
    def measure(self, codes, images):
        """CLIP ×100, Fréchet distance to as many real scenes, attribute accuracy and token statistics of codes (n, N) and
        images (n, 3, 32, 32) drawn for `captions`."""
        ours, theirs = self.feature_net.features(images.clamp(-1, 1)), self.real_features
        distance = lambda a, b: frechet_distance(*feature_statistics([a])[:2], *feature_statistics([b])[:2])
        guesses = torch.stack([logits.argmax(1) for logits in self.feature_net.logits(ours[0])], 1)  # (n, 7)
        histogram = token_histogram(codes, self.config.codes)
        return {
            "clip": self.scorer(images, self.scorer.embed_text(self.captions)).mean().item(),
            "frechet": distance(ours[0], theirs[0]),
            "frechet_middle": distance(ours[1], theirs[1]),
            "accuracy": (guesses.cpu() == self.attributes).float().mean().item(),
            "token_kl": token_kl(histogram, self.real_histogram),
            "token_entropy": token_entropy(histogram),
        }


def perceptual_distance(net):
    """LPIPS on a classifier's feature maps, all channels alike."""
    weights = [torch.ones(layer[0].out_channels) for layer in net.requires_grad_(False).layers]
    return LPIPS(net.layers, weights).requires_grad_(False)


# ---- pre-training ------------------------------------------------------------------------------------------------------


def minimize(name, parameters, steps, lr, loss_at):
    """AdamW with warm-up and a half cosine to 0 on `loss_at(step)`; prints a line every 100 steps."""
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.05)
    for step in range(steps):
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"{name:>14} {step + 1:5d}/{steps}  loss {loss.item():.3f}", flush=True)


def train_attribute_net(name, steps, seed):
    torch.manual_seed(seed)
    net, generator = AttributeNet(), torch.Generator().manual_seed(seed)

    def loss_at(step):
        attributes = random_attributes(128, generator)
        logits = net.logits(net.features(draw(attributes, generator))[0])
        return sum(F.cross_entropy(guess, target) for guess, target in zip(logits, attributes.unbind(1)))

    minimize(name, list(net.parameters()), steps, 2e-3, loss_at)
    return net.eval()


def train_reward(steps, seed):
    """CLIP's contrastive loss. A batch is 16 families of 8 captions that differ in two attributes only: among random captions
    colour and background tell pairs apart, and position would never be learned."""
    torch.manual_seed(seed)
    model, generator = small_clip(), torch.Generator().manual_seed(seed)

    def loss_at(step):
        families = random_attributes(16, generator).repeat_interleave(8, 0)  # (128, 7)
        varied = torch.rand(16, 7, generator=generator).argsort(1).lt(2).repeat_interleave(8, 0)
        attributes = torch.where(varied, random_attributes(128, generator), families)
        image = model.encode_image(draw(attributes, generator), normalize=True)
        text = model.encode_text(tokenize([caption(row) for row in attributes]), normalize=True)
        logits = model.logit_scale.exp().clamp(max=100) * image @ text.T
        same = (attributes[:, None] == attributes).all(2).float()  # equal captions are no negatives
        target = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    minimize("reward", list(model.parameters()), steps, 2e-3, loss_at)
    return model.eval()


@torch.no_grad()
def seed_codebook(vq, generator):
    """Spherical k-means on the latents of real scenes: the codebook starts where the encoder already is."""
    points = F.normalize(vq.latents(draw(random_attributes(256, generator), generator)), dim=1).movedim(1, -1).flatten(0, 2)
    centres = points[torch.randperm(len(points), generator=generator)[: vq.config.codes]]
    for _ in range(10):
        nearest = (points @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add(0, nearest, points)
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), centres)
    vq.quantize.embedding.weight.copy_(centres)


def train_vq(perceptual, steps, seed, free=200):
    """The tokenizer without a discriminator: `free` steps without quantization, then with a codebook from k-means."""
    torch.manual_seed(seed)
    vq, generator = VQModel(VQConfig()).to(memory_format=torch.channels_last), torch.Generator().manual_seed(seed)

    def loss_at(step):
        if step == free:
            seed_codebook(vq, generator)
        images = draw(random_attributes(32, generator), generator)
        latents, loss = F.normalize(vq.latents(images), dim=1), 0.0  # (32, D, 8, 8)
        if step >= free:
            nearest = vq.quantize.vectors()[vq.quantize.nearest(latents)].transpose(1, 2).view_as(latents)
            loss = F.mse_loss(nearest, latents.detach()) + 0.25 * F.mse_loss(latents, nearest.detach())
            latents = latents + (nearest - latents).detach()  # straight through
        return loss + reconstruction_anchor(images, vq.decode_latents(latents), perceptual, None, 0, None)

    minimize("tokenizer", list(vq.parameters()), steps, 2e-3, loss_at)
    return vq


def sharpen_decoder(vq, perceptual, steps, seed):
    """VQ-GAN's second half: the decoder against a discriminator, on codes that stay. Returns both."""
    torch.manual_seed(seed)
    discriminator, generator = small_discriminator(), torch.Generator().manual_seed(seed)
    judge = torch.optim.AdamW(discriminator.parameters(), 1e-3, betas=(0.5, 0.9))

    def loss_at(step):
        images = draw(random_attributes(32, generator), generator)
        decoded = vq.decode(vq.encode(images))
        judge.zero_grad()
        (discriminator_loss(discriminator(images), True) + discriminator_loss(discriminator(decoded.detach()), False)).backward()
        judge.step()
        weight = 0.5 * (step >= 50)  # the discriminator learns first
        return reconstruction_anchor(images, decoded, perceptual, discriminator, weight, vq.decoder.conv_out.weight)

    minimize("decoder", vq.moving_parameters(), steps, 1e-3, loss_at)
    return vq, discriminator


def train_policy(vq, steps, seed):
    """Next-code prediction. 10% of the captions' words are wrong and 10% of the captions are dropped (for guidance): a base
    that follows its captions loosely, as public ones do, has something to learn from a reward."""
    generator = torch.Generator().manual_seed(seed)
    config = PolicyConfig(head_size=HEAD_SIZE, codes=vq.config.codes)
    policy, attributes = Policy(config).initialize(generator), random_attributes(16384, generator)
    codes = torch.cat([vq.encode(draw(rows, generator)) for rows in attributes.split(256)])

    def loss_at(step):
        rows = torch.randint(len(codes), (32,), generator=generator)
        wrong = torch.rand(32, 7, generator=generator) < 0.1
        told = torch.where(wrong, random_attributes(32, generator), attributes[rows])
        features, mask = left_pad(word_features([caption(row) for row in told], config.caption_dim), config.prefix)
        dropped = torch.rand(32, 1, 1, generator=generator) < 0.1
        features = torch.where(dropped, policy.cls_embedding.uncond_embedding, features)
        return -token_log_probs(policy, features, mask, codes[rows]).mean()

    minimize("policy", list(policy.parameters()), steps, 4e-3, loss_at)
    return policy


def pretrain(seed):
    """Trains the whole world, minutes on 2 cores; returns the contents of policy.pt, vq.pt and judges.pt, in float16."""
    seed *= 10  # the next two are taken as well
    # Two processes with a core each beat one with two; each trains half of what can be trained at a time.
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        reward = pool.submit(train_reward, 600, seed + 1)
        net = pool.submit(train_attribute_net, "perceptual", 200, seed).result()
        tokenizer = pool.submit(train_vq, perceptual_distance(net), 450, seed)
        features = pool.submit(train_attribute_net, "feature net", 450, seed + 2)
        vq = tokenizer.result()
        sharpened = pool.submit(sharpen_decoder, vq, perceptual_distance(net), 300, seed)
        policy = pool.submit(train_policy, vq, 1200, seed).result()
        vq, discriminator = sharpened.result()

    judges = {"reward": reward.result(), "perceptual": net, "features": features.result(), "discriminator": discriminator}
    files = {"policy.pt": {"model": policy}, "vq.pt": {"model": vq}, "judges.pt": judges}
    return {file: {name: net.half().state_dict() for name, net in modules.items()} for file, modules in files.items()}
