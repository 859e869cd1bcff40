"""RankE: post-training a discrete text-to-image model with decoder co-evolution (arXiv 2605.21195).

Reinforcement learning that moves only the policy π_θ drifts its codes away from those of real images, the only ones the VQ decoder
D_φ was trained on (*latent covariate shift*): the reward rises and the pictures get worse. RankE moves both, in turns:

    max J(Ψ) = E[A_Ψ] − λ Ω(Ψ)     Ψ = θ: token-level ranking, held by a KL anchor             → `policy_stage`
                                   Ψ = φ: pixel-level ranking, held by reconstruction and
                                          consistency anchors                                  → `decoder_stage`

No gradient crosses the discrete codes; what one module learns reaches the other through the next round's rewards.
This file reads top to bottom: the settings of the paper's table, its equations as pure functions, the two stages, one round.

Departures from the authors' scripts, each for a reason given where it is made:
- K (`keep`) defaults to G: with their K = 1 every weight is 1 and soft ranking becomes best-of-G.
- Two teacher-forced passes a round, not three: with one inner epoch π_old is π_θ before its step, detached.
- The reward reaches the decoder through tensors; through a PIL image it has no gradient.

Axes: B captions, G rollouts a caption, R = B·G, K rollouts kept, N tokens, V codes. Images are (…, 3, H, W) in [-1, 1].
"""

import copy
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_

from policy import sample, token_log_probs


@dataclass(frozen=True)
class Method:
    """The method's settings: type, meaning, least and largest value where they are not 0 and none. Defaults: the authors'
    scripts for LlamaGen-XL, but for `keep`, and `reference`, which is the paper's."""

    arm: Annotated[Literal["both", "policy", "decoder"], "RankE, standard RL (decoder frozen), or stage 2 alone"] = "both"
    rounds: Annotated[int, "rounds of rollout, stage 1, stage 2, EMA", 1] = 6000
    captions: Annotated[int, "B, captions a round", 1] = 4
    rollouts: Annotated[int, "G, samples a caption", 2] = 8
    guidance: Annotated[float, "scale s of classifier-free guidance in rollouts; 1 is none", 1] = 6.0
    temperature: Annotated[float, "sampling temperature in rollouts", 1e-6] = 1.0
    top_k: Annotated[int, "codes a rollout chooses from; 0 is all"] = 1000
    sample_batch: Annotated[int, "rollouts sampled at once, whole captions; changes memory, not the samples", 1] = 32
    micro_batch: Annotated[int, "rollouts in one pass with gradients; changes memory and the adaptive GAN weight", 1] = 4
    recompute: Annotated[bool, "keep only the policy's layer inputs for the backward pass (gradient checkpointing)"] = True
    clip_grad: Annotated[float, "largest gradient norm, for each of the three networks"] = 1.0
    weight_decay: Annotated[float, "AdamW's, for all three networks"] = 0.01
    # Stage 1
    lr_policy: Annotated[float, "learning rate of π_θ"] = 1e-5
    warmup: Annotated[int, "rounds over which the policy's learning rate rises from 0"] = 0
    epsilon: Annotated[float, "ε, clip range of π_θ / π_old", 0, 1] = 0.2
    beta: Annotated[float, "β, weight of the KL anchor"] = 0.05
    reference: Annotated[Literal["ema", "initial"], "π_ref: the policy's EMA (paper) or its start (scripts)"] = "ema"
    inner_epochs: Annotated[int, "policy updates on the same rollouts", 1] = 1
    score_guided: Annotated[bool, "score the guided policy that was sampled, not the unguided one (published recipe)"] = False
    # Stage 2
    lr_decoder: Annotated[float, "learning rate of D_φ and the post-quantization convolution"] = 5e-5
    lr_discriminator: Annotated[float, "learning rate of the discriminator"] = 2e-5
    beta1_decoder: Annotated[float, "AdamW's β₁ for decoder and discriminator", 0, 0.9999] = 0.9
    beta2_decoder: Annotated[float, "AdamW's β₂ for decoder and discriminator", 0, 0.9999] = 0.95
    keep: Annotated[int, "K, best rollouts of a caption that stage 2 trains on; 0 is all G"] = 0
    weight_by: Annotated[Literal["reward", "zscore"], "reward: raw (paper); zscore: standardized in the group"] = "reward"
    tau_start: Annotated[float, "τ of the rank weights at the first round", 1e-6] = 4.0
    tau_end: Annotated[float, "τ after annealing", 1e-6] = 1.0
    tau_fraction: Annotated[float, "part of the rounds over which τ is annealed", 0, 1] = 0.2
    gan: Annotated[Literal["rank", "uniform", "none"], "Rank-GAN, its ablation with w = 1, or no GAN term on rollouts"] = "rank"
    fakes: Annotated[Literal["policy", "reconstruction"], "what the discriminator sees as fake"] = "policy"
    gan_start: Annotated[int, "round from which the discriminator's verdict counts; it learns from the first"] = 100
    gan_weight: Annotated[float, "weight of the discriminator in both GAN terms; 0 leaves it out"] = 0.5
    lambda_d: Annotated[float, "λ_d, reward back-propagated through the decoder"] = 0.01
    lambda_g: Annotated[float, "λ_g, Rank-GAN"] = 1.0
    lambda_r: Annotated[float, "λ_r, reconstruction anchor on real images"] = 1.0
    lambda_c: Annotated[float, "λ_c, consistency anchor to the EMA decoder"] = 10.0
    real_images: Annotated[int, "real images a round for reconstruction and discriminator; 0 is the captions' own"] = 0
    # EMA
    ema_policy: Annotated[float, "decay of the policy's EMA", 0, 1] = 0.999
    ema_policy_every: Annotated[int, "rounds between updates of the policy's EMA", 1] = 10
    ema_decoder: Annotated[float, "decay of the decoder's EMA, every round", 0, 1] = 0.99


# ---- stage 1: token-level ranking --------------------------------------------------------------------------------------


def group_advantages(rewards):
    """A_i = (r_i − mean) / std within each caption's group; rewards (B, G), G ≥ 2, to advantages (B, G).

    A group that agrees (std < 1e-4) teaches nothing and gets 0, not its rounding noise blown up; outliers stop at ±5.
    """
    std = rewards.std(1, keepdim=True)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / std
    return torch.where(std < 1e-4, 0.0, advantages).clamp(-5, 5)


def policy_loss(log_probs, old_log_probs, advantages, epsilon):
    """−mean min(ρ A, clip(ρ, 1 − ε, 1 + ε) A), ρ = π_θ / π_old a token; (R, N), (R, N), (R, 1) to a scalar and the clipped fraction."""
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    return -torch.min(ratio * advantages, clipped * advantages).mean(), (ratio != clipped).float().mean()


def kl_anchor(log_probs, reference_log_probs):
    """Ω_θ = mean ½ (log π_θ − log π_ref)² over sampled tokens, the second-order estimate of their KL divergence; (R, N) each."""
    return 0.5 * (log_probs - reference_log_probs).square().mean()


# ---- stage 2: pixel-level ranking --------------------------------------------------------------------------------------


def annealed_tau(step, rounds, start, end, fraction):
    """τ at `step`: from `start` to `end` by a half cosine over the first `fraction` of the rounds."""
    progress = min(1.0, step / max(1.0, fraction * rounds))
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def rank_weights(rewards, tau, keep, by="reward"):
    """w_i ∝ exp(r_i / τ) within each caption's top K, scaled to mean 1 there; 0 elsewhere. Rewards (B, G) to weights (B, G).

    Mean 1 keeps the size of a plain GAN's gradient and shifts it to the preferred samples. `by` = "zscore" standardizes r
    in its group first: where rewards spread over many τ, one sample would take all the weight.
    """
    if by == "zscore":
        rewards = group_advantages(rewards)
    best = rewards.topk(keep, dim=1)
    weights = keep * (best.values / tau).softmax(1)  # (B, K), mean 1
    weights = weights.clamp(min=torch.finfo(weights.dtype).tiny)  # a kept sample stays kept where exp underflows
    return torch.zeros_like(rewards).scatter(1, best.indices, weights)


def reward_loss(rewards, weights):
    """−mean(w r(D(z))), scalar; rewards (K·B,) carry the gradient through the decoder, weights (K·B,) do not."""
    return -(weights * rewards).mean()


def rank_gan_loss(verdicts, weights):
    """Rank-GAN: −mean(w · disc(D(z))), scalar; verdicts (K·B,) are a picture's mean patch logits. w = 1 is the uniform GAN."""
    return -(weights * verdicts).mean()


def discriminator_loss(logits, real):
    """Hinge, one of its two halves: ½ mean max(0, 1 − disc(x)) for `real`, ½ mean max(0, 1 + disc(D(z))) otherwise."""
    return 0.5 * torch.relu(1 - logits if real else 1 + logits).mean()


def adaptive_weight(reconstruction, adversarial, last_layer):
    """VQ-GAN's ‖∇ reconstruction‖ / ‖∇ adversarial‖ at the decoder's last layer, at most 1e4: neither term drowns the other."""
    gradient = lambda loss: torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm()
    return (gradient(reconstruction) / (gradient(adversarial) + 1e-4)).clamp(max=1e4).detach()


def reconstruction_anchor(images, decoded, perceptual, discriminator, gan_weight, last_layer):
    """Ω_φ, first half: L1 + LPIPS + adaptive GAN between real `images` and `decoded` = D(E(x)), both (B, 3, H, W); a scalar."""
    loss = (images - decoded).abs().mean() + perceptual(images, decoded).mean()
    if gan_weight:
        adversarial = -discriminator(decoded).float().mean()
        loss = loss + gan_weight * adaptive_weight(loss, adversarial, last_layer) * adversarial
    return loss


def consistency_anchor(decoded, ema_decoded, perceptual):
    """Ω_φ, second half: LPIPS(D(z), D_ema(z)), a scalar; both (K·B, 3, H, W)."""
    return perceptual(decoded, ema_decoded).mean()


# ---- EMA ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def ema_update(ema, model, decay):
    """ema ← decay · ema + (1 − decay) · model, parameter by parameter, in place."""
    for slow, fast in zip(ema.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


# ---- one round ---------------------------------------------------------------------------------------------------------


class Players:
    """The networks of a run and their optimizers. `scorer` rewards and `perceptual` is LPIPS; both are frozen."""

    def __init__(self, policy, vq, discriminator, scorer, perceptual, m, autocast):
        frozen = lambda module: copy.deepcopy(module).requires_grad_(False)
        # Fused where it can be: the default makes temporaries as large as the policy.
        fused = next(policy.parameters()).is_cuda
        adamw = lambda weights, lr, **more: torch.optim.AdamW(weights, lr, weight_decay=m.weight_decay, fused=fused, **more)
        betas = (m.beta1_decoder, m.beta2_decoder)
        self.policy, self.policy_ema = policy, frozen(policy)
        # Only where it is the reference: a third copy of the policy is 3 GB at XL.
        self.policy_initial = frozen(policy) if m.reference == "initial" else None
        self.vq, self.vq_ema = vq.requires_grad_(False), frozen(vq)
        for weight in vq.moving_parameters():
            weight.requires_grad_(True)
        self.discriminator, self.scorer, self.perceptual = discriminator, scorer, perceptual
        self.policy_optimizer = adamw(policy.parameters(), m.lr_policy)
        self.decoder_optimizer = adamw(vq.moving_parameters(), m.lr_decoder, betas=betas)
        self.discriminator_optimizer = adamw(discriminator.parameters(), m.lr_discriminator, betas=betas)
        self.autocast = autocast  # bf16 on a GPU, off otherwise; losses and norms are float32 either way


@dataclass
class Rollouts:
    """R = B·G samples of a round, a caption's G in a row."""

    features: torch.Tensor  # (R, T, C), or words (R, T); left-padded
    text_mask: torch.Tensor  # (R, T)
    text: torch.Tensor  # (R, E), the scorer's embeddings of the captions
    codes: torch.Tensor  # (R, N)
    sampled_log_probs: torch.Tensor  # (R, N), of the guided, top-k distribution
    images: torch.Tensor  # (R, 3, H, W), by the EMA decoder
    rewards: torch.Tensor  # (B, G), 100 · cosine


def in_rows(function, *tensors, size):
    """`function` over `size` rows of the tensors at a time; for passes without a gradient. A result or several, concatenated."""
    results = [function(*rows) for rows in zip(*(t.split(size) for t in tensors))]
    return torch.cat(results) if isinstance(results[0], torch.Tensor) else [torch.cat(parts) for parts in zip(*results)]


def take_step(optimizer, parameters, clip):
    """Averages the gradient of `parameters` over the processes, clips it, steps and forgets it; returns its norm before clipping.

    A norm that is not finite is returned as it is and nothing moves, in all processes alike.
    """
    if dist.is_initialized():
        for weight in parameters:
            if weight.grad is not None:
                dist.all_reduce(weight.grad)
                weight.grad /= dist.get_world_size()
    norm = clip_grad_norm_(parameters, clip)
    if norm.isfinite():
        optimizer.step()
    optimizer.zero_grad()
    return norm.item()


def draw(policy, m, features, text_mask, noise):
    """G code sequences for each caption, `sample_batch` rows at a time: features (B, T, C), text_mask (B, T), noise (B, G, N)
    uniform in [0, 1) to codes (B, G, N) and their log-probabilities."""
    some = lambda *rows: sample(policy, *rows, m.guidance, m.temperature, m.top_k)
    return in_rows(some, features, text_mask, noise, size=max(1, m.sample_batch // noise.shape[1]))


@torch.no_grad()
def roll_out(p, m, captions, features, text_mask, noise):
    """Samples G code sequences for each of B captions, decodes them with the EMA decoder and scores the pictures.

    features (B, T, C), text_mask (B, T), noise (B, G, N) uniform in [0, 1).
    """
    B, G, _ = noise.shape
    with p.autocast:
        codes, log_probs = draw(p.policy, m, features, text_mask, noise)
        codes = codes.flatten(0, 1)  # (R, N)
        text = p.scorer.embed_text(captions).repeat_interleave(G, 0)  # (R, E)
        images = in_rows(p.vq_ema.decode, codes, size=m.micro_batch)  # (R, 3, H, W)
        rewards = in_rows(p.scorer, images, text, size=m.micro_batch).view(B, G)
    features, text_mask = features.repeat_interleave(G, 0), text_mask.repeat_interleave(G, 0)
    return Rollouts(features, text_mask, text, codes, log_probs.flatten(0, 1), images, rewards)


def policy_stage(p, m, r, step):
    """Stage 1: moves π_θ on rollouts `r`; nothing else changes. Returns what to log."""
    advantages = group_advantages(r.rewards).view(-1, 1)  # (R, 1)
    reference = p.policy_ema if m.reference == "ema" else p.policy_initial
    scored_as = (m.guidance, m.temperature) if m.score_guided else (1.0, 1.0)
    for group in p.policy_optimizer.param_groups:
        group["lr"] = m.lr_policy * min(1.0, (step + 1) / (m.warmup + 1))

    def log_probs(policy, rows):
        with p.autocast:
            return token_log_probs(policy, r.features[rows], r.text_mask[rows], r.codes[rows], *scored_as, m.recompute)

    chunks = torch.arange(len(r.codes), device=r.codes.device).split(m.micro_batch)
    with torch.no_grad():
        reference_log_probs = [log_probs(reference, rows) for rows in chunks]
    old_log_probs = []
    for epoch in range(m.inner_epochs):
        total_kl = total_clipped = 0.0
        for i, rows in enumerate(chunks):
            now = log_probs(p.policy, rows)  # (rows, N)
            # Before the first step π_θ *is* π_old: no third pass. With one inner epoch ρ stays 1 and ε never acts.
            if epoch == 0:
                old_log_probs.append(now.detach())
            ranking, clipped = policy_loss(now, old_log_probs[i], advantages[rows], m.epsilon)
            kl = kl_anchor(now, reference_log_probs[i])
            share = len(rows) / len(r.codes)
            (share * (ranking + m.beta * kl)).backward()
            total_kl, total_clipped = total_kl + share * kl.item(), total_clipped + share * clipped.item()
        norm = take_step(p.policy_optimizer, list(p.policy.parameters()), m.clip_grad)
    gap = (torch.cat(old_log_probs) - r.sampled_log_probs).mean().item()  # 0 only where what is scored is what was sampled
    return {"kl": total_kl, "clip_fraction": total_clipped, "score_gap": gap, "policy_grad": norm}


def discriminator_step(p, m, r, images):
    """Trains the discriminator on real images (B', 3, H, W) against decoded ones; returns what to log."""
    with torch.no_grad(), p.autocast:
        codes = r.codes if m.fakes == "policy" else in_rows(p.vq.encode, images, size=m.micro_batch)
        fakes = in_rows(p.vq.decode, codes, size=m.micro_batch)
    log = {}
    for pictures, real in ((images, True), (fakes, False)):
        for x in pictures.split(m.micro_batch):
            with p.autocast:
                logits = p.discriminator(x).float()
            backward({"discriminator": discriminator_loss(logits, real)}, len(x) / len(pictures), log)
    return log | {"discriminator_grad": take_step(p.discriminator_optimizer, list(p.discriminator.parameters()), m.clip_grad)}


def decoder_stage(p, m, r, step, images):
    """Stage 2: moves D_φ and the discriminator on rollouts `r` and real images (B', 3, H, W). Returns what to log."""
    log = {}
    tau = annealed_tau(step, m.rounds, m.tau_start, m.tau_end, m.tau_fraction)
    weights = rank_weights(r.rewards, tau, m.keep or m.rollouts, m.weight_by).flatten()  # (R,)
    kept = weights.nonzero()[:, 0]  # (B·K,)
    if m.gan_weight:
        log |= discriminator_step(p, m, r, images)
    gan_weight = m.gan_weight if step >= m.gan_start else 0.0
    rank_gan = m.lambda_g * gan_weight if m.gan != "none" else 0.0
    p.discriminator.requires_grad_(False)

    for rows in kept.split(m.micro_batch) if m.lambda_d or rank_gan or m.lambda_c else ():
        with p.autocast:
            decoded = p.vq.decode(r.codes[rows])
            terms = {}
            if m.lambda_d:
                terms["decoder_reward"] = m.lambda_d * reward_loss(p.scorer(decoded, r.text[rows]), weights[rows])
            if rank_gan:
                verdicts = p.discriminator(decoded).float().mean((1, 2, 3))
                w = weights[rows] if m.gan == "rank" else torch.ones_like(verdicts)
                terms["rank_gan"] = rank_gan * rank_gan_loss(verdicts, w)
            if m.lambda_c:
                terms["consistency"] = m.lambda_c * consistency_anchor(decoded, r.images[rows], p.perceptual)
        backward(terms, len(rows) / len(kept), log)
    if m.lambda_r:
        for x in images.split(m.micro_batch):
            with p.autocast:
                decoded, last_layer = p.vq.decode(p.vq.encode(x)), p.vq.decoder.conv_out.weight
                anchor = reconstruction_anchor(x, decoded, p.perceptual, p.discriminator, gan_weight, last_layer)
            backward({"reconstruction": m.lambda_r * anchor}, len(x) / len(images), log)

    p.discriminator.requires_grad_(True)
    log["decoder_grad"] = take_step(p.decoder_optimizer, p.vq.moving_parameters(), m.clip_grad)
    return log


def backward(terms, share, log):
    """Back-propagates the sum of the loss terms of a micro-batch, `share` of the whole, and adds them to `log`."""
    (share * sum(terms.values())).backward()
    for name, value in terms.items():
        log[name] = log.get(name, 0.0) + share * value.item()


def one_round(p, m, step, captions, features, text_mask, images, noise):
    """One round of RankE on B captions with their text features, real images (B' ≥ 1, unused where `arm` is policy) and the rollouts' noise (B, G, N).

    Returns what to log and the rollouts.
    """
    r = roll_out(p, m, captions, features, text_mask, noise)
    log = {"reward": r.rewards.mean().item(), "reward_spread": r.rewards.std(1).mean().item()}
    if m.arm != "decoder":
        log |= policy_stage(p, m, r, step)
        if (step + 1) % m.ema_policy_every == 0:
            ema_update(p.policy_ema, p.policy, m.ema_policy)
    if m.arm != "policy":
        log |= decoder_stage(p, m, r, step, images)
        ema_update(p.vq_ema, p.vq, m.ema_decoder)
    return log, r
