"""The embedded world: small captioned scenes, and everything a post-training run needs of a world, for a CPU.

    python -m scenes.world --pretrain --out DIR --seed 1       make a base of its own

A scene is one object on a hatched ground, 32 × 32, drawn from seven attributes; its caption names them: "small
red striped circle top left on navy". Shift, rotation, light, phase, blotches and grain are in no caption: the
decoder has to paint them. Four networks stand in for the public ones:

    here                                              in place of
    a Gaussian vector a word                          T5's features
    open_clip's CLIP class, very small                CLIP ViT-L/14, the reward
    a reader of scenes, its feature maps              VGG16 in LPIPS
    another reader of scenes, of another seed         Inception in FID; no training ever sees it

`pretrain` makes them and the base policy and VQ-GAN, which are saved in LlamaGen's layout as a public
checkpoint would be. Nothing of the method is here, and nothing that a real checkpoint needs.
"""

import argparse
import itertools
import multiprocessing
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import nn

from files.disk import atomic_save, expect, reading
from files.weights import load, read_checkpoint, save_networks
from metrics import CLIPScore, feature_statistics, frechet_distance, token_entropy, token_histogram, token_kl
from policy import GPTConfig, Policy, drop_captions, left_pad, load_llamagen, token_logprobs
from rankee import World, hinge_d_loss, in_batches, random_stream, reconstruction_anchor
from scenes import SETTINGS
from vq import LPIPS, VQConfig, VQModel, load_vq, patch_discriminator

FOLDER = Path(__file__).parent
RESOLUTION = 32
# The tokenizer's. 32 channels in 32 groups would be an instance norm, through which brightness passes only as
# one loud pixel that sets the scale of all others; that pixel is seen as a speck (StyleGAN's droplet artifact).
NORM_GROUPS = 8
TOKENIZER = VQConfig(32, (1, 1, 2, 2), 1, 64, 1024, 8, NORM_GROUPS)  # factor 8: 16 codes of 10 bits a scene
# Heads of 16: LlamaGen's 64 do not divide a width of 96.
POLICY = GPTConfig(96, 3, 16, 256, TOKENIZER.codebook_size, cls_token_num=8, caption_dim=64, grid_size=4)

# ---- captions --------------------------------------------------------------------------------------------------------

ATTRIBUTES = {
    "size": ["small", "large"],
    "colour": ["red", "green", "blue", "yellow", "cyan", "purple"],
    "texture": ["plain", "striped", "dotted", "checkered"],
    "shape": ["circle", "square", "triangle", "ring", "cross"],
    "vertical": ["top", "middle", "bottom"],
    "horizontal": ["left", "center", "right"],
    "background": ["black", "white", "grey", "navy", "olive"],
}
COUNTS = [len(words) for words in ATTRIBUTES.values()]
VOCABULARY = ["<start>", *sorted({"on", *(word for words in ATTRIBUTES.values() for word in words)}), "<end>"]
# What no caption tells, each uniform in [-1, 1]: name → how many numbers.
NUISANCE = {"shift": 2, "turn": 1, "growth": 1, "phase": 2, "light": 2, "colour": 3, "ground": 3, "blotches": 16}


def random_attributes(n, rng):
    """n scenes as indices into the words of `ATTRIBUTES`, (n, 7)."""
    return torch.from_numpy(rng.integers(COUNTS, size=(n, len(COUNTS))))


def random_nuisance(n, rng):
    """What no caption tells of n scenes, (n, 30) in [-1, 1]."""
    return torch.from_numpy(rng.random((n, sum(NUISANCE.values())), dtype=np.float32)) * 2 - 1


def caption(attributes):
    """The caption of one scene (7,): seven words and "on"."""
    words = [names[i] for names, i in zip(ATTRIBUTES.values(), attributes.tolist())]
    return " ".join([*words[:-1], "on", words[-1]])


def tokenize(captions):
    """Word indices (B, 10) for the reward; CLIP's text tower reads its result at the highest, <end>."""
    return torch.tensor([[VOCABULARY.index(word) for word in f"<start> {text} <end>".split()] for text in captions])


class WordVectors:
    """The world's text encoder (see policy.py): a frozen Gaussian vector (dim,) a word, seeded by the word.

    Raises InputError for a word it lacks.
    """

    def __init__(self, dim, length, device):
        self.length, self.device = length, device
        streams = {word: np.random.default_rng(zlib.crc32(word.encode())) for word in VOCABULARY[1:-1]}
        self.vectors = {word: torch.from_numpy(rng.standard_normal(dim, "f4")) for word, rng in streams.items()}

    def __call__(self, captions):
        for text in captions:
            fits = 0 < len(text.split()) <= self.length and set(text.split()) <= set(self.vectors)
            words = ", ".join(self.vectors)
            expect(fits, f"{text!r}: the embedded world reads 1 to {self.length} of the words {words}")
        rows = [torch.stack([self.vectors[word] for word in text.split()]) for text in captions]
        cond, cond_mask = left_pad(rows, max(map(len, rows)))
        return cond.to(self.device), cond_mask.to(self.device)


# ---- images ----------------------------------------------------------------------------------------------------------

# Red, green and blue in percent of the words in `ATTRIBUTES`, in their order.
PERCENT = ("90 15 15  15 75 25  20 35 95  95 85 15  15 85 90  65 20 80", "8 8 8  92 92 92  50 50 50  8 10 35  40 40 12")
COLOURS, BACKGROUNDS = (torch.tensor([int(x) for x in text.split()]).view(-1, 3) / 100 for text in PERCENT)


def signed_distances(p, r):
    """Distances (n, 5, H, W), negative inside, of points p (n, 2, H, W) to shapes of radius r (n, 1, 1)."""
    x, y = p.unbind(1)
    length = p.square().sum(1).sqrt()
    square = torch.maximum(x.abs(), y.abs()) - 0.85 * r
    triangle = torch.maximum(0.866 * x.abs() - 0.5 * y, y) - 0.55 * r
    ring = (length - 0.72 * r).abs() - 0.28 * r
    bar, pole = torch.maximum(x.abs() - r, y.abs() - 0.32 * r), torch.maximum(x.abs() - 0.32 * r, y.abs() - r)
    return torch.stack([length - r, square, triangle, ring, torch.minimum(bar, pole)], 1)


def draw(attributes, nuisance, rng):
    """Scenes (n, 7) with nuisance (n, 30) to images (n, 3, 32, 32) in [-1, 1]; `rng` draws the grain."""
    n, row = len(attributes), torch.arange(len(attributes))
    size, colour, texture, shape, vertical, horizontal, background = attributes.unbind(1)
    hidden = dict(zip(NUISANCE, nuisance.split(list(NUISANCE.values()), 1)))
    axis = (torch.arange(RESOLUTION) + 0.5) / RESOLUTION * 2 - 1

    # The object's own coordinates: moved, shifted, rotated.
    centre = 0.46 * (torch.stack([horizontal, vertical], 1) - 1) + 0.04 * hidden["shift"]
    p = torch.stack(torch.meshgrid(axis, axis, indexing="xy")) - centre[:, :, None, None]  # (n, 2, H, W)
    angle = 0.2 * hidden["turn"][:, 0]
    turn = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()], 1).view(n, 2, 2)
    q = torch.einsum("nij,njhw->nihw", turn, p)
    radius = torch.tensor([0.36, 0.52])[size] * (1 + 0.06 * hidden["growth"][:, 0])
    outline = signed_distances(q, radius[:, None, None])[row, shape]  # (n, H, W)
    coverage = (0.5 - outline * RESOLUTION / 2).clamp(0, 1)  # anti-aliased over one pixel

    # Paint: a texture of two inks, lit from one side.
    across, along = torch.sin(q * (2 * torch.pi / 0.5) + torch.pi / 2 * hidden["phase"][:, :, None, None]).unbind(1)
    inks = torch.stack([torch.full_like(across, 9.0), along, across + along - 0.6, 2 * across * along], 1)
    ink = 0.3 + 0.7 * torch.sigmoid(4 * inks[row, texture])
    light = 1 + (0.4 * torch.einsum("ni,nihw->nhw", hidden["light"], p)).clamp(-0.2, 0.2)
    paint = (COLOURS[colour] + 0.04 * hidden["colour"])[:, :, None, None] * (ink * light)[:, None]

    # Ground: a hatching, every 6 pixels along a row, low-frequency blotches.
    pixel = torch.arange(RESOLUTION)
    hatching = 0.05 * torch.sin((pixel[:, None] + pixel) * (2 * torch.pi / 6))
    blotches = 0.05 * F.interpolate(hidden["blotches"].view(n, 1, 4, 4), RESOLUTION, mode="bilinear")
    ground = (BACKGROUNDS[background] + 0.02 * hidden["ground"])[:, :, None, None] + hatching + blotches

    grain = 0.0125 * torch.from_numpy(rng.standard_normal(ground.shape, dtype=np.float32))
    return (torch.lerp(ground, paint, coverage[:, None]) + grain).clamp(0, 1) * 2 - 1


def render(attributes, rng):
    """Scenes (n, 7) to images (n, 3, 32, 32) in [-1, 1], with fresh nuisance."""
    return draw(attributes, random_nuisance(len(attributes), rng), rng)


def random_scenes(n, rng):
    """Attributes (n, 7), nuisance (n, 30) and images (n, 3, 32, 32)."""
    attributes, nuisance = random_attributes(n, rng), random_nuisance(n, rng)
    return attributes, nuisance, draw(attributes, nuisance, rng)


def batches(batch_size, seed, start, rank, world_size):
    """Yields captions and images (B, 3, 32, 32) without end, a function of seed, step and process alone."""
    for step in itertools.count(start):
        attributes, _, images = random_scenes(batch_size, random_stream(seed, "scenes", step, rank))
        yield [caption(row) for row in attributes], images


# ---- judges ----------------------------------------------------------------------------------------------------------


class SceneNet(nn.Module):
    """Reads a scene: its attributes, and its nuisance, which no caption tells.

    Its `layers` stand in for VGG16, its `features` for Inception. As Inception sees texture too, these are
    trained on the nuisance: they see what a decoder does to light and phase, and not only the shape.
    """

    def __init__(self):
        super().__init__()
        widths = [(3, 24, 1), (24, 48, 2), (48, 48, 1), (48, 64, 2), (64, 32, 2)]
        convs = [nn.Conv2d(in_ch, out_ch, 3, stride, 1) for in_ch, out_ch, stride in widths]
        self.layers = nn.Sequential(*(nn.Sequential(c, nn.GroupNorm(8, c.out_channels), nn.SiLU()) for c in convs))
        self.neck = nn.Linear(32 * 16, 96)
        self.heads = nn.Linear(96, sum(COUNTS) + sum(NUISANCE.values()))

    def features(self, images):
        """Images (B, 3, 32, 32) to the last features (B, 96) and the middle layer's channel means (B, 48)."""
        middle = self.layers[:3](images)
        return F.silu(self.neck(self.layers[3:](middle).flatten(1))), middle.mean((2, 3))

    def read(self, images):
        """Logits for each attribute, a list of (B, words), and the nuisance (B, 30)."""
        *logits, nuisance = self.heads(self.features(images)[0]).split([*COUNTS, sum(NUISANCE.values())], 1)
        return logits, nuisance

    def loss(self, attributes, nuisance, images):
        logits, guess = self.read(images)
        loss = sum(F.cross_entropy(x, target) for x, target in zip(logits, attributes.unbind(1)))
        return loss + 0.5 * (guess - nuisance).square().mean(0).sum()

    def lpips(self):
        """LPIPS on its feature maps, all channels alike."""
        return LPIPS(self.layers, [torch.ones(layer[0].out_channels) for layer in self.layers])


def small_clip():
    """open_clip's CLIP at the world's size, with two changes so that it learns position and shape in minutes.

    Convolutions come before the patches (Xiao et al. 2021, arXiv 2106.14881), and the position embedding
    starts at sines and cosines of row and column.
    """
    vision = CLIPVisionCfg(layers=3, width=64, head_width=16, patch_size=4, image_size=RESOLUTION)
    text = CLIPTextCfg(context_length=10, vocab_size=len(VOCABULARY), width=64, heads=4, layers=2)
    model = CLIP(64, vision, text)
    stem = [nn.Conv2d(3, 32, 3, 2, 1), nn.GELU(), nn.Conv2d(32, 64, 3, 2, 1), nn.GELU(), nn.Conv2d(64, 64, 1)]
    for layer in stem[::2]:
        nn.init.kaiming_normal_(layer.weight)  # PyTorch's default is so small that the positions drown the image
    model.visual.conv1 = nn.Sequential(*stem)
    turns = torch.arange(8)[:, None] * 2 ** torch.linspace(-2.5, 0.5, 16)
    waves = torch.cat([turns.sin(), turns.cos()], 1)  # (8, 32)
    rows, columns = waves[:, None].expand(8, 8, 32), waves[None].expand(8, 8, 32)
    model.visual.positional_embedding.data[1:] = 0.5 * torch.cat([rows, columns], -1).flatten(0, 1)
    return model


def small_discriminator():
    """Patches of 11 pixels: one that sees a whole scene keeps moving the decoder (experiments/README.md)."""
    return patch_discriminator(32, n_layers=1, kernel=3)


NETWORKS = {"reward": small_clip, "perceptual": SceneNet, "features": SceneNet, "discriminator": small_discriminator}


def load_judges(folder, device):
    """The networks that judge a run, by name: reward, perceptual, features, discriminator."""
    path = Path(folder, "judges.pt")
    state_dicts = read_checkpoint(path)
    networks = {name: make().to(device).eval() for name, make in NETWORKS.items()}
    with reading(path, "the judges of a base of this version; make one: python -m scenes.world --pretrain"):
        for name, network in networks.items():
            network.load_state_dict(state_dicts[name])
    return networks


# The small CLIP's score × 100; Fréchet distance on the last layer; × 1000 on the middle one; share of attributes
# right; nats; bits.
NUMBERS = ("scene_clip", "frechet", "frechet_middle", "accuracy", "token_kl", "token_entropy")


class Evaluation:
    """n captions, the same for every model of a run, and n other real scenes, the same for every run."""

    def __init__(self, scorer, feature_net, vq, n, seed, device):
        self.scorer, self.feature_net, self.codebook_size = scorer, feature_net, vq.config.codebook_size
        self.attributes, _, self.images = random_scenes(n, random_stream(seed, "evaluation"))
        self.captions = [caption(row) for row in self.attributes]
        self.text_emb = scorer.encode_text(self.captions)
        others = random_scenes(n, random_stream(0, "other scenes"))[2].to(device)
        codes = in_batches(vq.encode, others, size=256)
        self.real_histogram = token_histogram(codes.cpu(), self.codebook_size)
        self.real_statistics = self.statistics(others)

    def statistics(self, images):
        return [feature_statistics([x])[:2] for x in self.feature_net.features(images)]

    @torch.no_grad()
    def __call__(self, tokens, images):
        """The `NUMBERS` of tokens (n, N) and images (n, 3, 32, 32) that were drawn for `captions`."""
        images, histogram = images.clamp(-1, 1), token_histogram(tokens.cpu(), self.codebook_size)
        guesses = torch.stack([x.argmax(1).cpu() for x in self.feature_net.read(images)[0]], 1)  # (n, 7)
        frechet, middle = (frechet_distance(*a, *b) for a, b in zip(self.statistics(images), self.real_statistics))
        clip = in_batches(self.scorer, images, self.text_emb, size=256).mean().item()
        accuracy = (guesses == self.attributes).float().mean().item()
        kl, entropy = token_kl(histogram, self.real_histogram), token_entropy(histogram)
        return dict(zip(NUMBERS, (clip, frechet, 1000 * middle, accuracy, kl, entropy)))


# ---- the world of a run ----------------------------------------------------------------------------------------------


def preset(given):
    """What differs from the defaults, as words of a command line; `given` are the user's options."""
    base = given.get("base", FOLDER)
    return [*SETTINGS.split(), "--ckpt", f"{base}/policy.pt", "--vq", f"{base}/vq.pt"]


def resolve_files(cfg):
    """All files are local, and are named where they cannot be read."""
    return cfg


def load_pretrained(cfg):
    """Policy, tokenizer and text encoder, on the device. Raises InputError for another world's."""
    expect(cfg.image_size == RESOLUTION, f"--image-size {cfg.image_size}: scenes have {RESOLUTION}")
    vq = load(cfg.vq, load_vq, NORM_GROUPS)
    policy = load(cfg.ckpt, load_llamagen, vq.config.grid_size(RESOLUTION), POLICY.head_dim)
    V, codebook_size = policy.config.vocab_size, vq.config.codebook_size
    expect(V == codebook_size, f"--ckpt {cfg.ckpt} has {V} codes, --vq {codebook_size}; give a pair")
    text_encoder = WordVectors(policy.config.caption_dim, policy.config.cls_token_num, cfg.device)
    return policy.to(cfg.device), vq.to(cfg.device), text_encoder


def load_world(cfg):
    """The `World` of a run on scenes."""
    policy, vq, text_encoder = load_pretrained(cfg)
    judges = load_judges(cfg.base, cfg.device)
    scorer = CLIPScore(judges["reward"], tokenize, [0.5] * 3, [0.5] * 3).to(cfg.device)
    evaluation = Evaluation(
        scorer, judges["features"].requires_grad_(False), vq, cfg.eval_samples, cfg.seed, cfg.device
    )
    batch_size = max(cfg.batch_size, cfg.real_batch_size)
    return World(
        policy=policy,
        vq=vq,
        text_encoder=text_encoder,
        scorer=scorer,
        lpips=judges["perceptual"].lpips(),
        discriminator=judges["discriminator"],
        batches=lambda start, rank, world_size: batches(batch_size, cfg.seed, start, rank, world_size),
        captions=evaluation.captions,
        images=evaluation.images,
        evaluate=evaluation,
        data="hatched scenes",  # until 8cfb2eb they were woven; a resumed run of then says so
        save_networks=save_networks,
    )


# ---- pre-training ----------------------------------------------------------------------------------------------------


def fit(name, parameters, steps, lr, loss_at):
    """AdamW with a warm-up and a half cosine to 0 on `loss_at(step)`; prints a line every 100 steps."""
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.95), weight_decay=0.01)  # β₁: OneCycleLR's
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.01)
    for step in range(steps):
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"{name:>14} {step + 1:5d}/{steps}  loss {loss.item():.3f}", flush=True)


def train_scene_net(name, steps, seed):
    torch.manual_seed(seed)
    net, rng = SceneNet(), random_stream(seed, name)
    fit(name, list(net.parameters()), steps, 2e-3, lambda step: net.loss(*random_scenes(64, rng)))
    return net.eval()


def train_reward(steps, seed):
    """CLIP's contrastive loss. A batch is 16 families of 8 captions that differ in two attributes only: among
    random captions colour and background tell pairs apart, and position would never be learned.
    """
    torch.manual_seed(seed)
    model, rng = small_clip(), random_stream(seed, "reward")

    def loss_at(step):
        families = random_attributes(16, rng).repeat_interleave(8, 0)  # (128, 7)
        varied = torch.from_numpy(rng.random((16, 7))).argsort(1).lt(2).repeat_interleave(8, 0)
        attributes = torch.where(varied, random_attributes(128, rng), families)
        image_emb = model.encode_image(render(attributes, rng), normalize=True)
        text_emb = model.encode_text(tokenize([caption(row) for row in attributes]), normalize=True)
        logits = model.logit_scale.exp().clamp(max=100) * image_emb @ text_emb.T
        same = (attributes[:, None] == attributes).all(2).float()  # equal captions are no negatives
        target = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    fit("reward", list(model.parameters()), steps, 2e-3, loss_at)
    return model.eval()


@torch.no_grad()
def init_codebook_kmeans(vq, rng):
    """Spherical k-means on the latents of real scenes: the codebook starts where the encoder already is."""
    latents = torch.cat([vq.encode_latents(random_scenes(128, rng)[2]) for _ in range(8)])
    points = F.normalize(latents, dim=1).movedim(1, -1).flatten(0, 2)
    centres = points[torch.from_numpy(rng.permutation(len(points))[: vq.config.codebook_size])]
    for _ in range(10):
        sums = torch.zeros_like(centres).index_add(0, (points @ centres.T).argmax(1), points)
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), centres)
    vq.quantize.embedding.weight.copy_(centres)


def train_vq(net, steps, seed):
    """The tokenizer, without a discriminator: 500 steps without quantization, then with a k-means codebook.

    The codebook is begun anew at steps 1,000 and 1,500. From step 1,000 the loss of the perceptual net on a
    reconstruction counts too, since textures weigh little in L1.
    """
    torch.manual_seed(seed)
    vq, lpips, rng = VQModel(TOKENIZER), net.lpips(), random_stream(seed, "tokenizer")

    def loss_at(step):
        if step in (500, 1000, 1500):
            init_codebook_kmeans(vq, rng)
        attributes, nuisance, images = random_scenes(16, rng)
        latents, loss = F.normalize(vq.encode_latents(images), dim=1), 0.0  # (16, D, 4, 4)
        if step >= 500:
            nearest = vq.quantize.vectors()[vq.quantize.nearest(latents)].transpose(1, 2).view_as(latents)
            loss = F.mse_loss(nearest, latents.detach()) + 0.25 * F.mse_loss(latents, nearest.detach())
            latents = latents + (nearest - latents).detach()  # straight through
        recon = vq.decode_latents(latents)
        loss = loss + reconstruction_anchor(images, recon, lpips, None, 0, None) + 10 * (images - recon).abs().mean()
        return loss + (0.2 * net.loss(attributes, nuisance, recon) if step >= 1000 else 0.0)

    fit("tokenizer", list(vq.parameters()), steps, 1e-3, loss_at)
    return vq


def finetune_decoder_gan(vq, lpips, steps, seed):
    """VQ-GAN's second half: the decoder against a discriminator, on codes that stay. Returns both."""
    torch.manual_seed(seed)
    discriminator, rng = small_discriminator(), random_stream(seed, "decoder")
    disc_optimizer = torch.optim.AdamW(discriminator.parameters(), 1e-3, betas=(0.5, 0.9))

    def loss_at(step):
        images = random_scenes(32, rng)[2]
        recon = vq.decode(vq.encode(images))
        disc_optimizer.zero_grad()
        hinge_d_loss(discriminator(images), discriminator(recon.detach())).backward()
        disc_optimizer.step()
        disc_weight = 0.5 if step >= 50 else 0.0  # the discriminator learns first
        return reconstruction_anchor(images, recon, lpips, discriminator, disc_weight, vq.decoder.conv_out.weight)

    fit("decoder", vq.decoder_parameters(), steps, 1e-3, loss_at)
    return vq, discriminator


def train_policy(vq, steps, seed):
    """Next-token prediction with 30% of the words random and 10% of the captions dropped (for guidance).

    A base that follows its captions loosely, as public ones do, has something to learn from a reward.
    """
    torch.manual_seed(seed)
    policy, rng = Policy(POLICY), random_stream(seed, "policy")
    for weight in (weight for weight in policy.parameters() if weight.dim() > 1):
        nn.init.normal_(weight, std=0.02)  # as LlamaGen starts; its output is zero
    nn.init.normal_(policy.cls_embedding.uncond_embedding, std=POLICY.caption_dim**-0.5)
    nn.init.zeros_(policy.output.weight)
    text_encoder = WordVectors(POLICY.caption_dim, POLICY.cls_token_num, "cpu")
    attributes = random_attributes(32768, rng)
    tokens = torch.cat([vq.encode(render(rows, rng)) for rows in attributes.split(256)])

    def loss_at(step):
        rows = torch.from_numpy(rng.integers(len(tokens), size=64))
        wrong = torch.from_numpy(rng.random((64, 7))) < 0.3
        noisy = torch.where(wrong, random_attributes(64, rng), attributes[rows])
        cond, cond_mask = text_encoder([caption(row) for row in noisy])
        cond = drop_captions(policy, cond, cond_mask, torch.from_numpy(rng.random(64)) < 0.1)
        return -token_logprobs(policy, cond, cond_mask, tokens[rows]).mean()

    fit("policy", list(policy.parameters()), steps, 4e-3, loss_at)
    return policy


def pretrain(out, seed):
    """Trains the whole world and writes policy.pt, vq.pt and judges.pt to the folder `out`, in float16."""
    out.mkdir(parents=True, exist_ok=True)  # if it cannot be made, that is said before the work
    # Two processes with a core each beat one with two; each trains half of what can be trained at a time.
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        features = pool.submit(train_scene_net, "features", 2500, seed + 1000)  # another seed than the perceptual net's
        perceptual = pool.submit(train_scene_net, "perceptual", 1500, seed).result()
        tokenizer = pool.submit(train_vq, perceptual, 9000, seed)
        reward = pool.submit(train_reward, 2200, seed)
        finetuned = pool.submit(finetune_decoder_gan, tokenizer.result(), perceptual.lpips(), 600, seed)
        policy = pool.submit(train_policy, tokenizer.result(), 3000, seed)
        judges = {"reward": reward.result(), "perceptual": perceptual, "features": features.result()}
        vq, judges["discriminator"] = finetuned.result()
    files = {"policy.pt": {"model": policy.result()}, "vq.pt": {"model": vq}, "judges.pt": judges}
    for file, networks in files.items():  # judges.pt is the last: with it the base is whole
        state_dicts = {name: network.half().state_dict() for name, network in networks.items()}
        atomic_save(out / file, lambda target: torch.save(state_dicts, target))


if __name__ == "__main__":
    parser = argparse.ArgumentParser("scenes.world", description="makes a base of the embedded world")
    parser.add_argument("--pretrain", action="store_true", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pretrain(args.out, args.seed)
