"""RankE: post-training a discrete text-to-image model with decoder co-evolution (arXiv 2605.21195).

Reinforcement learning that moves only the policy π_θ drifts its tokens away from those of real images, the
only ones the VQ decoder D_φ was trained on (*latent covariate shift*): the reward rises and the images get
worse. RankE moves both, in turns:

    max J(Ψ) = E[A_Ψ] − λ Ω(Ψ)     Ψ = θ: token-level ranking, held by a KL anchor             → `update_policy`
                                   Ψ = φ: pixel-level ranking, held by reconstruction and
                                          consistency anchors                                  → `update_decoder`

No gradient crosses the discrete tokens; what one module learns reaches the other through the next step's
rewards. This file reads top to bottom: the settings of the paper's table, its equations as pure functions,
the two stages, one step.

Departures from the authors' scripts (all of them, with lines: experiments/README.md):
- K (`rank_k`) defaults to G: with their K = 1 every weight is 1, and soft ranking becomes best-of-G.
- π_ref is the paper's EMA, not the start (`ref_policy`).
- The discriminator's fakes are rollouts, not reconstructions (`disc_fakes`). It has GroupNorm (vq.py) and learns from
  the first step; `disc_start` delays its loss' way to the decoder.
- Captions are left-padded in training as in sampling, and one causal mask serves both (policy.py).
- The rates are those that their scripts name; their code runs at 1e-6 and 1e-5. Every network's gradient is averaged
  over processes; theirs leaves out LlamaGen's decoder.
- HPSv2's gradient reaches the decoder; theirs ends at a PIL image. Stage 2 and the logits are in float32.
- Two teacher-forced passes a step, not three: with one update a step π_old is π_θ before it, detached.

Axes: B captions, G rollouts a caption, R = B·G, K rollouts of a caption kept, N tokens, V codes; T text
positions and C channels of a caption.
Real images are (B', 3, H, W), drawn ones (R, 3, H, W), all in [-1, 1].
"""

import copy
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_

from policy import Sampling, drop_captions, generate, score_tokens


@dataclass(frozen=True)
class Config:
    """Defaults are the authors' for LlamaGen-XL, except `rank_k`, `ref_policy` and `disc_fakes` (docstring above)."""

    method: Annotated[
        Literal["ranke", "rl", "decoder", "sft"], "RankE, no stage 2 (standard RL), stage 2 alone, or fine-tuning"
    ] = "ranke"
    max_steps: Annotated[int, "steps of rollout, stage 1, stage 2, EMA"] = 6000
    batch_size: Annotated[int, "B, captions a step and process"] = 4
    group_size: Annotated[int, "G, rollouts a caption"] = 8
    rollout_batch_size: Annotated[int, "rollouts sampled at once, whole captions; changes memory, not the samples"] = 32
    micro_batch_size: Annotated[int, "rollouts in a pass with gradients; changes memory, and adaptive GAN weights"] = 4
    gradient_checkpointing: Annotated[bool, "keep only the policy's layer inputs for the backward pass"] = True
    max_grad_norm: Annotated[float, "largest gradient norm of policy and decoder; the discriminator's is free"] = 1.0
    weight_decay: Annotated[float, "AdamW's, for all three networks"] = 0.01
    # Stage 1
    policy_lr: Annotated[float, "learning rate of π_θ"] = 1e-5
    warmup_steps: Annotated[int, "steps over which the policy's learning rate rises"] = 0
    clip_eps: Annotated[float, "ε, clip range of π_θ / π_old; never acts with one update a step"] = 0.2
    kl_coef: Annotated[float, "β, weight of the KL anchor"] = 0.05
    ref_policy: Annotated[Literal["ema", "initial"], "π_ref: the policy's EMA (paper) or its start (scripts)"] = "ema"
    cfg_logprobs: Annotated[bool, "score with guidance and temperature, as sampled; published: without"] = False
    caption_dropout: Annotated[float, "share of captions left out in --method sft, for guidance"] = 0.1
    # Stage 2
    decoder_lr: Annotated[float, "learning rate of D_φ and the post-quantization convolution"] = 5e-5
    disc_lr: Annotated[float, "learning rate of the discriminator"] = 2e-5
    gan_beta2: Annotated[float, "AdamW's β₂ for decoder and discriminator"] = 0.999
    rank_k: Annotated[int, "K, best rollouts of a caption that stage 2 trains on; 0 is all G"] = 0
    rank_zscore: Annotated[bool, "rank by rewards standardized within the group; paper: by raw ones"] = False
    tau_start: Annotated[float, "τ of the rank weights at the first step"] = 4.0
    tau_end: Annotated[float, "τ after --tau-steps"] = 1.0
    tau_steps: Annotated[int, "steps over which τ falls; 0 is a fifth of --max-steps"] = 0
    gan: Annotated[Literal["rank", "uniform"], "Rank-GAN, or its ablation with w = 1"] = "rank"
    disc_fakes: Annotated[Literal["rollouts", "reconstructions"], "what the discriminator sees as fake"] = "rollouts"
    disc_start: Annotated[int, "step from which the discriminator reaches the decoder; it learns from the first"] = 100
    disc_weight: Annotated[float, "weight of the discriminator in both GAN terms; 0 leaves it out"] = 0.5
    lambda_d: Annotated[float, "λ_d, reward back-propagated through the decoder"] = 0.01
    lambda_g: Annotated[float, "λ_g, Rank-GAN"] = 1.0
    lambda_r: Annotated[float, "λ_r, reconstruction anchor on real images"] = 1.0
    lambda_c: Annotated[float, "λ_c, consistency anchor to the EMA decoder"] = 10.0
    real_batch_size: Annotated[int, "real images a step for anchor and discriminator; 0 is the captions' own"] = 0
    # EMA
    policy_ema: Annotated[float, "decay of the policy's EMA"] = 0.999
    policy_ema_every: Annotated[int, "steps between updates of the policy's EMA"] = 10
    decoder_ema: Annotated[float, "decay of the decoder's EMA, every step"] = 0.99
    # Sampling
    cfg_scale: Annotated[float, "scale s of classifier-free guidance; 1 is none"] = 6.0
    temperature: Annotated[float, "sampling temperature"] = 1.0
    top_k: Annotated[int, "codes to choose from; 0 is all"] = 1000

    @property
    def sampling(self):
        """How rollouts are drawn."""
        return Sampling(self.cfg_scale, self.temperature, self.top_k)

    @property
    def trains_policy(self):
        return self.method != "decoder"

    @property
    def trains_decoder(self):
        return self.method in ("ranke", "decoder")


# ---- stage 1: token-level ranking ------------------------------------------------------------------------------------


def group_advantages(rewards):
    """A_i = (r_i − mean) / std within each caption's group; rewards (B, G), G ≥ 2, to advantages (B, G).

    A group whose rewards are all equal (std < 1e-4) gets 0: dividing would blow up rounding. Outliers stop at ±5.
    """
    std = rewards.std(1, keepdim=True)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / std
    return torch.where(std < 1e-4, 0.0, advantages).clamp(-5, 5)


def policy_loss(logprobs, old_logprobs, advantages, clip_eps):
    """−mean min(ρ A, clip(ρ, 1 − ε, 1 + ε) A) and clip_frac, with ρ = π_θ / π_old (R, N) and A (R, 1)."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return -torch.min(ratio * advantages, clipped * advantages).mean(), (ratio != clipped).float().mean()


def kl_anchor(logprobs, ref_logprobs):
    """Ω_θ = mean ½ (log π_θ − log π_ref)² over sampled tokens, the "k2" estimator of their KL divergence.

    Log-probabilities (R, N) to a scalar. Source: Schulman, Approximating KL divergence (2020).
    """
    return 0.5 * (logprobs - ref_logprobs).square().mean()


# ---- stage 2: pixel-level ranking ------------------------------------------------------------------------------------


def tau_at(step, max_steps, tau_start, tau_end, tau_steps=0):
    """τ at `step`: from tau_start to tau_end by a half cosine over tau_steps; 0 is a fifth of max_steps."""
    progress = min(1.0, step / max(1.0, tau_steps or 0.2 * max_steps))
    return tau_end + (tau_start - tau_end) * 0.5 * (1 + math.cos(math.pi * progress))


def rank_weights(rewards, tau, k):
    """w_i ∝ exp(r_i / τ) over a caption's top K, scaled to mean 1; rewards (B, G) to weights, indices (B, K).

    Mean 1 keeps the size of a plain GAN's gradient and shifts it to the preferred samples.
    """
    best = rewards.topk(k, dim=1)
    return k * (best.values / tau).softmax(1), best.indices


def hinge_d_loss(logits_real, logits_fake):
    """Hinge loss ½ (mean max(0, 1 − disc(x)) + mean max(0, 1 + disc(D(z)))); the logits have any shape."""
    return 0.5 * (torch.relu(1 - logits_real).mean() + torch.relu(1 + logits_fake).mean())


def hinge_g_loss(logits_fake, weights=1.0):
    """−mean(w disc(D(z))): what the decoder minimizes; logits (R, 1, h, w), weights (R,) or 1."""
    return -(weights * logits_fake.mean((1, 2, 3))).mean()


def adaptive_weight(recon_loss, gan_loss, last_layer):
    """VQ-GAN's ‖∇ recon_loss‖ / ‖∇ gan_loss‖ at the last layer, at most 1e4.

    Multiplied by it, the GAN loss pulls there as hard as the reconstruction loss.
    """
    recon_grad = torch.autograd.grad(recon_loss, last_layer, retain_graph=True)[0]
    gan_grad = torch.autograd.grad(gan_loss, last_layer, retain_graph=True)[0]
    return (recon_grad.norm() / (gan_grad.norm() + 1e-4)).clamp(max=1e4)


def reconstruction_anchor(images, recon, lpips, discriminator, disc_weight, last_layer):
    """Ω_φ, first half: L1 + LPIPS + adaptive GAN of real `images` x and `recon` = D(E(x)), (B', 3, H, W)."""
    loss = (images - recon).abs().mean() + lpips(images, recon).mean()
    if disc_weight:
        gan_loss = hinge_g_loss(discriminator(recon))
        loss = loss + disc_weight * adaptive_weight(loss, gan_loss, last_layer) * gan_loss
    return loss


# ---- EMA and random numbers ------------------------------------------------------------------------------------------


@torch.no_grad()
def ema_update(ema, model, decay):
    """ema ← decay · ema + (1 − decay) · model, parameter by parameter, in place."""
    for slow, fast in zip(ema.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


def random_stream(seed, purpose, *index):
    """A NumPy generator for a seed, purpose (a word) and index (step, process …), independent by hashing."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *index])


def uniform(stream, *shape):
    """Uniform numbers in [0, 1), float32, of a NumPy generator."""
    return torch.from_numpy(stream.random(shape, dtype=np.float32))


# ---- one step --------------------------------------------------------------------------------------------------------


@dataclass
class World:
    """What a run is made of: networks, data, what is watched. Another data set or model is another `World`."""

    policy: torch.nn.Module  # π_θ
    vq: torch.nn.Module  # tokenizer; D_φ is its decoder
    text_encoder: Callable  # captions → cond, cond_mask (see policy.py)
    scorer: torch.nn.Module  # r: encode_text(captions) → (B, dim); images (R, 3, H, W), (R, dim) → rewards (R,)
    lpips: torch.nn.Module  # two batches of images → distances (B,); None will do for standard RL
    discriminator: torch.nn.Module  # images → logits (B, 1, h, w)
    batches: Callable  # first step, process, processes → yields a step's captions and real images (B', 3, H, W)
    captions: list  # drawn before, during and after the run
    images: torch.Tensor  # (n, 3, H, W), their real images
    data: str  # says which data these are; a resumed run compares it
    evaluate: Callable | None  # tokens and images drawn for `captions` → numbers by name, if the world has any
    save_networks: Callable  # folder, networks by name: files for other programs


class Models:
    """The networks of a run, those that learn with their optimizers, and the slow copies that hold them."""

    def __init__(self, world, autocast, cfg):
        self.text_encoder, self.scorer, self.lpips = world.text_encoder, world.scorer, world.lpips  # frozen
        self.policy, self.vq, self.discriminator = world.policy, world.vq, world.discriminator
        self.autocast = autocast  # bf16 on a GPU, of the policy alone: one update of D_φ is less than bf16 resolves
        self.policy_ema = copy.deepcopy(self.policy).requires_grad_(False)
        # A third copy only where it is asked for: it is 3 GB at XL.
        self.ref_policy = self.policy_ema if cfg.ref_policy == "ema" else copy.deepcopy(self.policy_ema)
        self.vq_ema = copy.deepcopy(self.vq).requires_grad_(False)
        self.vq.requires_grad_(False)
        for weight in self.vq.decoder_parameters():
            weight.requires_grad_(True)
        # Fused where it can be: the default makes temporaries as large as the policy.
        options = {"weight_decay": cfg.weight_decay, "fused": next(self.policy.parameters()).is_cuda}
        gan_options = options | {"betas": (0.9, cfg.gan_beta2)}
        self.policy_optimizer = torch.optim.AdamW(self.policy.parameters(), cfg.policy_lr, **options)
        self.decoder_optimizer = torch.optim.AdamW(self.vq.decoder_parameters(), cfg.decoder_lr, **gan_options)
        self.disc_optimizer = torch.optim.AdamW(self.discriminator.parameters(), cfg.disc_lr, **gan_options)


@dataclass
class Rollouts:
    """R = B·G samples of a step, a caption's G in a row."""

    cond: torch.Tensor  # (R, T, C), or input_ids (R, T)
    cond_mask: torch.Tensor  # (R, T)
    text_emb: torch.Tensor  # (R, dim), the scorer's embeddings of the captions
    tokens: torch.Tensor  # (R, N)
    sampling_logprobs: torch.Tensor  # (R, N), of the guided, top-k distribution
    images: torch.Tensor  # (R, 3, H, W), D_ema(z) in [-1, 1]: what is rewarded, and what holds the decoder
    rewards: torch.Tensor  # (B, G), 100 · cosine


def in_batches(function, *tensors, size):
    """`function` over `size` rows at a time, its results concatenated; for passes without a gradient."""
    pieces = zip(*(x.split(size) for x in tensors))
    return torch.cat([function(*piece) for piece in pieces])


def add_to_logs(logs, share, **values):
    """Adds a micro-batch's values, means over its rows, times its share of all rows."""
    for name, value in values.items():
        logs[name] = logs.get(name, 0.0) + share * value.item()


def optimizer_step(optimizer, max_grad_norm):
    """Averages the gradient over processes, clips it, steps, clears it; returns its norm before clipping.

    If the norm is not finite, no process makes a step.
    """
    parameters = [weight for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]
    if dist.is_initialized():
        for weight in parameters:
            dist.all_reduce(weight.grad)
            weight.grad /= dist.get_world_size()
    norm = clip_grad_norm_(parameters, max_grad_norm)
    if norm.isfinite():
        optimizer.step()
    optimizer.zero_grad()
    return norm.item()


def sample_tokens(policy, cond, cond_mask, u, cfg):
    """`generate`, `rollout_batch_size` rows at a time; u, tokens and log-probabilities are (B, G, N) each."""
    size = max(1, cfg.rollout_batch_size // u.shape[1])  # whole captions
    pieces = zip(cond.split(size), cond_mask.split(size), u.split(size))
    tokens, logprobs = zip(*(generate(policy, *piece, cfg.sampling) for piece in pieces))
    return torch.cat(tokens), torch.cat(logprobs)


@torch.no_grad()
def rollout(models, captions, u, cfg):
    """Samples, decodes (EMA decoder) and scores G images a caption; u (B, G, N) is uniform in [0, 1)."""
    B, G, _ = u.shape
    cond, cond_mask = models.text_encoder(captions)
    with models.autocast:
        tokens, logprobs = sample_tokens(models.policy, cond, cond_mask, u, cfg)  # (B, G, N)
    tokens, logprobs = tokens.flatten(0, 1), logprobs.flatten(0, 1)  # (R, N)
    images = in_batches(models.vq_ema.decode, tokens, size=cfg.micro_batch_size).clamp(-1, 1)  # (R, 3, H, W)
    text_emb = models.scorer.encode_text(captions).repeat_interleave(G, 0)  # (R, dim)
    rewards = in_batches(models.scorer, images, text_emb, size=cfg.micro_batch_size).view(B, G)
    cond, cond_mask = cond.repeat_interleave(G, 0), cond_mask.repeat_interleave(G, 0)
    return Rollouts(cond, cond_mask, text_emb, tokens, logprobs, images, rewards)


def finetune_policy(models, captions, images, u, cfg):
    """Supervised fine-tuning, the paper's second row: cross-entropy of π_θ on real images' codes.

    `captions`: one for each of `images` (B, 3, H, W), left out where u (B,) < caption_dropout. Returns what to log.
    """
    cond, cond_mask = models.text_encoder(captions)
    with torch.no_grad():
        tokens = in_batches(models.vq.encode, images, size=cfg.micro_batch_size)  # (B, N)
    B, logs = len(tokens), {}
    for i in torch.arange(B, device=tokens.device).split(cfg.micro_batch_size):
        with models.autocast:
            given = drop_captions(models.policy, cond[i], cond_mask[i], u[i] < cfg.caption_dropout)
            scored = (models.policy, given, cond_mask[i], tokens[i])
            logprobs, entropy = score_tokens(*scored, checkpointing=cfg.gradient_checkpointing)
        loss, share = -logprobs.mean(), len(i) / B
        (share * loss).backward()
        add_to_logs(logs, share, policy_loss=loss, entropy=entropy.mean())
    logs["policy_grad_norm"] = optimizer_step(models.policy_optimizer, cfg.max_grad_norm)
    return logs


def update_policy(models, rollouts, step, cfg):
    """Stage 1: moves π_θ; nothing else changes. `step` is for an edit's schedules. Returns what to log."""
    advantages = group_advantages(rollouts.rewards).view(-1, 1)  # (R, 1)
    # Top-k is never scored: a code outside of the reference's top k would have an infinite KL.
    scoring = Sampling(cfg.cfg_scale, cfg.temperature) if cfg.cfg_logprobs else Sampling()

    def score(policy, i):
        """Log-probabilities and entropies (rows, N) of the rollouts i."""
        cond, cond_mask, tokens = rollouts.cond[i], rollouts.cond_mask[i], rollouts.tokens[i]
        with models.autocast:
            return score_tokens(policy, cond, cond_mask, tokens, scoring, cfg.gradient_checkpointing)

    R, logs = len(rollouts.tokens), {}
    for i in torch.arange(R, device=rollouts.tokens.device).split(cfg.micro_batch_size):
        with torch.no_grad():
            ref_logprobs, _ = score(models.ref_policy, i)
        logprobs, entropy = score(models.policy, i)
        # Before its step π_θ *is* π_old: no third pass. ρ is 1 and ε never acts, but ρ's gradient is not 0.
        pg_loss, clip_frac = policy_loss(logprobs, logprobs.detach(), advantages[i], cfg.clip_eps)
        kl = kl_anchor(logprobs, ref_logprobs)
        share = len(i) / R
        (share * (pg_loss + cfg.kl_coef * kl)).backward()
        # 0 if what is scored was sampled: with `cfg_logprobs`, and without top-k.
        gap = (logprobs - rollouts.sampling_logprobs[i]).mean()
        add_to_logs(logs, share, policy_loss=pg_loss, kl_loss=cfg.kl_coef * kl, kl=kl, clip_frac=clip_frac)
        add_to_logs(logs, share, logprob_gap=gap, entropy=entropy.mean())
    logs["policy_grad_norm"] = optimizer_step(models.policy_optimizer, cfg.max_grad_norm)
    return logs


def update_discriminator(models, rollouts, images, cfg):
    """Trains the discriminator: real images (B', 3, H, W) against what D_φ, not D_ema, decodes. Returns what to log."""
    with torch.no_grad():
        if cfg.disc_fakes == "rollouts":
            fakes = in_batches(models.vq.decode, rollouts.tokens, size=cfg.micro_batch_size).clamp(-1, 1)
        else:
            codes = in_batches(models.vq.encode, images, size=cfg.micro_batch_size)
            fakes = in_batches(models.vq.decode, codes, size=cfg.micro_batch_size)  # not clamped, as theirs
    loss = hinge_d_loss(models.discriminator(images), models.discriminator(fakes))
    loss.backward()
    norm = optimizer_step(models.disc_optimizer, math.inf)
    return {"disc_loss": loss.item(), "disc_grad_norm": norm}


def update_decoder(models, rollouts, images, step, cfg):
    """Stage 2: trains the discriminator, then D_φ; `images` are real, (B', 3, H, W). Returns what to log."""
    logs = update_discriminator(models, rollouts, images, cfg) if cfg.disc_weight else {}
    rewards = group_advantages(rollouts.rewards) if cfg.rank_zscore else rollouts.rewards
    B, G = rewards.shape
    tau = tau_at(step, cfg.max_steps, cfg.tau_start, cfg.tau_end, cfg.tau_steps)
    weights, best = rank_weights(rewards, tau, cfg.rank_k or G)  # (B, K) each
    first = G * torch.arange(B, device=best.device)[:, None]  # (B, 1), a caption's first of the R rows
    kept, weights = (first + best).flatten(), weights.flatten()  # (B·K,) each
    disc_weight = cfg.disc_weight if step >= cfg.disc_start else 0.0
    use_gan = cfg.lambda_g * disc_weight > 0
    models.discriminator.requires_grad_(False)

    if cfg.lambda_d or use_gan or cfg.lambda_c:
        for part in torch.arange(len(kept), device=kept.device).split(cfg.micro_batch_size):
            i, w, losses = kept[part], weights[part], {}
            decoded = models.vq.decode(rollouts.tokens[i]).clamp(-1, 1)  # D(z)
            if cfg.lambda_d:  # −mean(w r(D(z))): the reward, back-propagated through the decoder
                losses["reward_loss"] = -cfg.lambda_d * (w * models.scorer(decoded, rollouts.text_emb[i])).mean()
            if use_gan:  # −mean(w disc(D(z))): Rank-GAN; the uniform GAN has w = 1
                gan_loss = hinge_g_loss(models.discriminator(decoded), w if cfg.gan == "rank" else 1.0)
                losses["rank_gan_loss"] = cfg.lambda_g * disc_weight * gan_loss
            if cfg.lambda_c:  # Ω_φ, second half: LPIPS(D(z), D_ema(z)), the consistency anchor
                losses["consistency_loss"] = cfg.lambda_c * models.lpips(decoded, rollouts.images[i]).mean()
            loss, share = sum(losses.values()), len(i) / len(kept)
            (share * loss).backward()
            add_to_logs(logs, share, **losses, decoder_loss=loss)
    if cfg.lambda_r:
        last_layer = models.vq.decoder.conv_out.weight
        for x in images.split(cfg.micro_batch_size):
            recon = models.vq.decode(models.vq.encode(x))
            anchor = reconstruction_anchor(x, recon, models.lpips, models.discriminator, disc_weight, last_layer)
            loss, share = cfg.lambda_r * anchor, len(x) / len(images)
            (share * loss).backward()
            add_to_logs(logs, share, reconstruction_loss=loss, decoder_loss=loss)

    models.discriminator.requires_grad_(True)
    logs["decoder_grad_norm"] = optimizer_step(models.decoder_optimizer, cfg.max_grad_norm)
    return logs


def train_step(models, captions, images, u, step, cfg):
    """One step of RankE on B captions and real images (B', 3, H, W), which standard RL does not use.

    u (B, G, N), uniform in [0, 1), decides the rollouts. Returns what to log.
    """
    warmup = min(1.0, (step + 1) / (cfg.warmup_steps + 1))
    for group in models.policy_optimizer.param_groups:
        group["lr"] = cfg.policy_lr * warmup
    if cfg.method == "sft":
        logs = finetune_policy(models, captions[: len(images)], images[: len(captions)], u[:, 0, 0], cfg)
    else:
        rollouts = rollout(models, captions, u, cfg)
        shares = torch.bincount(rollouts.tokens.flatten()) / rollouts.tokens.numel()  # of each code
        logs = {"reward": rollouts.rewards.mean().item(), "reward_std": rollouts.rewards.std(1).mean().item()}
        logs["token_entropy"] = torch.special.entr(shares).sum().item() / math.log(2)  # bits; of few tokens
        if cfg.trains_policy:
            logs |= update_policy(models, rollouts, step, cfg)
    if cfg.trains_policy and (step + 1) % cfg.policy_ema_every == 0:
        ema_update(models.policy_ema, models.policy, cfg.policy_ema)
    if cfg.trains_decoder:
        logs |= update_decoder(models, rollouts, images, step, cfg)
        ema_update(models.vq_ema, models.vq, cfg.decoder_ema)
    return logs
