"""The policy π_θ: an autoregressive transformer over VQ codes, its sampling and its log-probabilities.

It is LlamaGen's text-to-image model (Sun et al. 2024, arXiv 2406.06525), whose entry names it has. Janus-Pro
has the same layers (public/janus.py). Sizes are read from shapes:

    file                   n_layer  n_head   dim  vocab_size  cls_token_num  parameters
    scenes/policy.pt             3       6    96        1024              8       0.5 M
    t2i_XL_stage1_256.pt        36      20  1280       16384            120       778 M
    t2i_XL_stage2_512.pt        36      20  1280       16384            120       778 M

Easy to get wrong:
- LlamaGen's prefix (the caption) is not rotated by zero, it is *multiplied* by zero: its rotary table is all
  zeros there, so q and k of text positions vanish and text attends evenly to the text before it.
- Captions are left-padded, and a padded position is no key for anyone but itself. One mask, `attention_mask`,
  serves sampling and scoring; with two, the log-probabilities are those of another model.

Axes: B captions, G rollouts each, R = B·G rows, T text positions, N image tokens, V codes, C text channels.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from files.disk import expect
from files.weights import build, count_layers


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a policy. `grid_size`² = N tokens form an image, row by row."""

    dim: int = 1280
    n_layer: int = 36
    head_dim: int = 64
    ffn_dim: int = 3584
    vocab_size: int = 16384  # V
    cls_token_num: int = 120  # the longest caption
    caption_dim: int = 2048  # C
    grid_size: int = 16
    norm_eps: float = 1e-5


@dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from; by default the policy's own."""

    cfg_scale: float = 1.0  # s of classifier-free guidance, uncond + s (cond − uncond); 1 is none
    temperature: float = 1.0
    top_k: int = 0  # codes to choose from; 0 is all, 1 is greedy decoding


# ---- modules ---------------------------------------------------------------------------------------------------------


def rope_1d(positions, head_dim):
    """Llama's rotary table, base 10000: positions (…) to complex numbers of length 1 (…, head_dim / 2)."""
    freqs = 10000.0 ** (-torch.arange(0, head_dim, 2, device=positions.device) / head_dim)
    angles = positions[..., None] * freqs
    return torch.complex(angles.cos(), angles.sin())


def rope_2d(positions, grid_size, head_dim):
    """LlamaGen's, same shape: a head's first half of pairs turns with the row, its second with the column."""
    row, column = positions // grid_size, positions % grid_size
    return torch.cat([rope_1d(row, head_dim // 2), rope_1d(column, head_dim // 2)], -1)


def apply_rotary_emb(x, freqs_cis):
    """Rotates neighbouring pairs of `x` (…, R, heads, L, head_dim) by `freqs_cis` (R, L, head_dim / 2), complex."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * freqs_cis.unsqueeze(1)).flatten(-2).type_as(x)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x, freqs_cis, mask, kv_cache, input_pos):
        qkv = self.wqkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)  # (3, R, heads, L, head_dim)
        q, k = apply_rotary_emb(qkv[:2], freqs_cis)
        v = qkv[2]
        if kv_cache is not None:
            kv_cache.index_copy_(3, input_pos, torch.stack([k, v]))
            k, v = kv_cache[:, :, :, : mask.shape[-1]]  # only what the mask speaks of is attended to
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.wo(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x, freqs_cis, mask, kv_cache, input_pos):
        x = x + self.attention(self.attention_norm(x), freqs_cis, mask, kv_cache, input_pos)
        return x + self.feed_forward(self.ffn_norm(x))


class CaptionEmbedder(nn.Module):
    """LlamaGen's: text features to prefix embeddings; holds the learned "no caption" features of guidance."""

    def __init__(self, config):
        super().__init__()
        self.uncond_embedding = nn.Parameter(torch.zeros(config.cls_token_num, config.caption_dim))
        fc1, fc2 = (nn.Linear(width, config.dim, bias=False) for width in (config.caption_dim, config.dim))
        self.cap_proj = nn.Sequential(OrderedDict(fc1=fc1, gelu=nn.GELU("tanh"), fc2=fc2))

    def unconditional(self, cond, cond_mask):
        """What stands for "no caption" in the place of these (B, T, C), padded left; Janus' needs `cond_mask` too."""
        return self.uncond_embedding[-cond.shape[1] :].expand_as(cond)

    def forward(self, cond, cond_mask, use_cfg):
        """(B, T, C) and mask (B, T) to (B, T, dim) and mask; `use_cfg` appends B unconditional rows."""
        if use_cfg:
            cond = torch.cat([cond, self.unconditional(cond, cond_mask)])
            cond_mask = cond_mask.repeat(2, 1)
        return self.cap_proj(cond), cond_mask


class Policy(nn.Module):
    """The transformer. Attributes are named as in LlamaGen's checkpoints."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.cls_embedding = CaptionEmbedder(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)

    def freqs_cis(self, cond_mask, n):
        """Rotary table (R, T + n, head_dim / 2) of a prefix with cond_mask (R, T) and n image tokens."""
        table = rope_2d(torch.arange(n, device=cond_mask.device), self.config.grid_size, self.config.head_dim)
        # Zero over the prefix, the same for all rows.
        return F.pad(table, (0, 0, cond_mask.shape[1], 0)).expand(len(cond_mask), -1, -1)

    def transformer(self, x, freqs_cis, mask, kv_cache, input_pos, checkpointing=False):
        """Embeddings (R, L, dim) to last hidden states of the same shape.

        `mask` (R, 1, L, keys) is true where a position may look; None is causal. `kv_cache`, one a layer
        (`new_kv_cache`, or None for each), is written at `input_pos` (L,) and read up to the mask's keys.
        """
        x = x.float()  # whatever autocast makes of embeddings: sampling and scoring must add alike
        if mask is not None:  # as attention adds it, made once and not in each layer
            mask = torch.where(mask, 0.0, -torch.inf).to(compute_dtype(x.device))
        for layer, layer_cache in zip(self.layers, kv_cache):
            x = maybe_checkpoint(layer, x, freqs_cis, mask, layer_cache, input_pos, enabled=checkpointing)
        return self.norm(x)

    def hidden_states(self, cond, cond_mask, tokens, use_cfg=False, checkpointing=False):
        """Hidden states (R, n + 1, dim) that predict `tokens` (R, n) after a caption, and one token more.

        cond is (R, T, C) or (R, T), cond_mask (R, T). The last prefix position predicts the first token.
        `use_cfg` appends R unconditional rows.
        """
        n = tokens.shape[1]
        prefix, cond_mask = self.cls_embedding(cond, cond_mask, use_cfg)
        x = torch.cat([prefix, self.tok_embeddings(tokens).repeat(2 if use_cfg else 1, 1, 1)], 1)
        # Where no row is padded the mask is merely causal, and a kernel that knows that needs none.
        mask = None if cond_mask.all() else attention_mask(cond_mask, n)
        no_cache = [None] * len(self.layers)
        return self.transformer(x, self.freqs_cis(cond_mask, n), mask, no_cache, None, checkpointing)[:, -n - 1 :]

    def logits(self, h):
        """Logits (…, V) of hidden states (…, dim), in float32: bf16 would round away what one update changes."""
        with torch.autocast(h.device.type, enabled=False):
            return self.output(h.float())

    def forward(self, cond, cond_mask, tokens, use_cfg=False):
        """Logits (R, n + 1, V) of `tokens` (R, n) after a caption and of one more; see `hidden_states`."""
        return self.logits(self.hidden_states(cond, cond_mask, tokens, use_cfg))

    def new_kv_cache(self, rows, positions):
        """Room for keys and values of `rows` sequences: (n_layer, 2, rows, heads, positions, head_dim)."""
        config, device = self.config, self.norm.weight.device
        shape = (config.n_layer, 2, rows, config.dim // config.head_dim, positions, config.head_dim)
        # Zeros: a step recorded as a CUDA graph (below) reads past what is filled, and NaN would pass through its mask.
        return torch.zeros(shape, device=device, dtype=compute_dtype(device))


def compute_dtype(device):
    """What queries, keys and values are in: autocast's type, or float32."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


def maybe_checkpoint(function, *inputs, enabled):
    """function(*inputs); if `enabled`, its activations are not kept but recomputed in the backward pass.

    An argument decides it, and not train() or eval(), which would have to be right at every call.
    """
    options = {"use_reentrant": False, "preserve_rng_state": False}
    return checkpoint(function, *inputs, **options) if enabled else function(*inputs)


def attention_mask(cond_mask, n):
    """Mask (R, 1, T + n, T + n), true where a position (row) may look at a key (column).

    Causal over text, with cond_mask (R, T), and n image tokens. Padding is no key, but every position sees
    itself, or a padded one would have no key at all.
    """
    keys = F.pad(cond_mask, (0, n), value=True)[:, None, None]  # (R, 1, 1, T + n)
    itself = torch.eye(keys.shape[-1], dtype=torch.bool, device=keys.device)
    causal = torch.ones_like(itself).tril()
    return (keys & causal) | itself


# ---- sampling and scoring --------------------------------------------------------------------------------------------


def logits_to_logprobs(logits, sampling=Sampling()):
    """Log-probabilities (R, …, V) of the next token, float32, in the distribution that `sampling` describes.

    With guidance the logits have 2R rows, the conditional ones first.
    """
    logits = logits.float()
    if sampling.cfg_scale != 1:
        cond_logits, uncond_logits = logits.chunk(2)
        logits = uncond_logits + sampling.cfg_scale * (cond_logits - uncond_logits)
    logits = logits / sampling.temperature
    if sampling.top_k:
        least = logits.topk(min(sampling.top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits.log_softmax(-1)


def sample_token(logprobs, u):
    """Tokens (R,) from log-probabilities (R, V), by inverting the distribution function at `u` (R,).

    `u`, uniform in [0, 1), is one number a token, where the Gumbel trick needs V: small enough to be an
    argument, so two policies can be compared on the same draw and no row's draw depends on its neighbours.
    """
    # In float64: a GPU's parallel sum wobbles, and in float32 a few draws in a million have probability 0.
    cdf = logprobs.exp().cumsum(-1, dtype=torch.float64)
    token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).squeeze(1)
    return token.clamp_max(logprobs.shape[-1] - 1)  # NaN gives V: on a GPU a wrong index ends the process


@torch.no_grad()
def generate(policy, cond, cond_mask, u, sampling=Sampling()):
    """Draws G image token sequences for each of B captions.

    cond (B, T, C) or input_ids (B, T), cond_mask (B, T): a text encoder's; u (B, G, N): uniform in [0, 1).
    Returns tokens (B, G, N) and their log-probabilities (B, G, N) in the distribution they were drawn from.
    """
    B, G, N = u.shape
    T, use_cfg = cond.shape[1], sampling.cfg_scale != 1
    u = u.flatten(0, 1)  # (R, N)
    prefix, prefix_mask = policy.cls_embedding(cond, cond_mask, use_cfg)  # (B or 2B, T, dim), (B or 2B, T)
    freqs_cis, mask = policy.freqs_cis(prefix_mask, N - 1), attention_mask(prefix_mask, N - 1)

    # The caption is read once, and its keys and values are shared by its G rollouts.
    prefix_cache = policy.new_kv_cache(len(prefix), T)
    prefix_pos = torch.arange(T, device=u.device)
    h = policy.transformer(prefix, freqs_cis[:, :T], mask[..., :T, :T], prefix_cache, prefix_pos)
    kv_cache = policy.new_kv_cache(len(prefix) * G, T + N - 1)
    kv_cache[..., :T, :].unflatten(2, (-1, G)).copy_(prefix_cache.unsqueeze(3))
    h, freqs_cis, mask = (x.repeat_interleave(G, 0) for x in (h[:, -1:], freqs_cis, mask))  # R or 2R rows

    tokens = torch.empty(B * G, N, dtype=torch.long, device=u.device)
    logprobs = torch.empty(B * G, N, device=u.device)
    drawn = torch.zeros(1, dtype=torch.long, device=u.device)  # so far; on the device, where a recorded step reads it

    def sample_next():
        """Draws the next token of every row from `h` and stores it; returns it as (R, 1)."""
        next_logprobs = logits_to_logprobs(policy.logits(h[:, 0]), sampling)  # (R, V)
        token = sample_token(next_logprobs, u.index_select(1, drawn)[:, 0])[:, None]
        tokens.index_copy_(1, drawn, token)
        logprobs.index_copy_(1, drawn, next_logprobs.gather(1, token))
        return token

    def decode_one_token(kv_len):
        """Draws the next token and reads it, looking at the first `kv_len` positions; never waits for the device."""
        x = policy.tok_embeddings(sample_next())
        x = torch.cat([x, x]) if use_cfg else x  # (R or 2R, 1, dim)
        input_pos = T + drawn
        row_mask = mask.index_select(2, input_pos)[..., :kv_len]
        h.copy_(policy.transformer(x, freqs_cis.index_select(1, input_pos), row_mask, kv_cache, input_pos))
        drawn.add_(1)

    decode_n_tokens(decode_one_token, T, N - 1, use_cuda_graph=u.is_cuda)
    sample_next()
    return tokens.view(B, G, N), logprobs.view(B, G, N)


def decode_n_tokens(decode_one_token, prefix_len, n, use_cuda_graph, bucket=128):
    """Calls decode_one_token(kv_len) for each of n tokens.

    On a GPU a step is a thousand small kernels, which take longer to start than to run: it is recorded as a
    CUDA graph and replayed. A graph's shapes are fixed, so each `bucket` of tokens has its own graph, which
    looks at all positions up to the bucket's end.
    """
    for i in range(n):
        bucket_end = prefix_len + min(n, i - i % bucket + bucket)
        if not use_cuda_graph:
            decode_one_token(prefix_len + i + 1)
        elif i % bucket == 0:
            decode_one_token(bucket_end)  # draws, and loads kernels and makes workspaces: a recording cannot
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a loader's thread may go on
                decode_one_token(bucket_end)  # recorded, not run
        else:
            graph.replay()


def score_tokens(policy, cond, cond_mask, tokens, sampling=Sampling(), checkpointing=False, chunk=64):
    """Log-probabilities (R, N) of given tokens (R, N) in one teacher-forced pass, and the entropies (R, N), in nats,
    of the distributions they are scored in.

    cond is (R, T, C) or (R, T), cond_mask (R, T). The default scores the unguided policy, as the paper does
    although it samples with guidance. Logits exist for `chunk` tokens at a time: (R, N, V) floats are 67 MB a
    row at N = 1024, and softmax takes several such arrays.
    """
    h = policy.hidden_states(cond, cond_mask, tokens[:, :-1], sampling.cfg_scale != 1, checkpointing)

    def score(h, tokens):
        next_logprobs = logits_to_logprobs(policy.logits(h), sampling)  # (R, n, V)
        entropy = -(next_logprobs.exp() * next_logprobs).sum(-1)
        return next_logprobs.gather(2, tokens[..., None])[..., 0], entropy

    chunks = zip(h.split(chunk, 1), tokens.split(chunk, 1))
    logprobs, entropies = zip(*(maybe_checkpoint(score, *piece, enabled=checkpointing) for piece in chunks))
    return torch.cat(logprobs, 1), torch.cat(entropies, 1)


def drop_captions(policy, cond, cond_mask, dropped):
    """`cond`, a text encoder's, with "no caption" in the rows where `dropped` (B,): what guidance is learned from."""
    rows = dropped.view(-1, *[1] * (cond.dim() - 1))
    return torch.where(rows, policy.cls_embedding.unconditional(cond, cond_mask), cond)


def token_logprobs(policy, cond, cond_mask, tokens, *args, **options):
    """The log-probabilities (R, N) of `score_tokens` alone."""
    return score_tokens(policy, cond, cond_mask, tokens, *args, **options)[0]


# ---- text ------------------------------------------------------------------------------------------------------------
# A text encoder is a callable: B captions → cond (B, T, C) or input_ids (B, T), and cond_mask (B, T), true
# where text is; left-padded to the longest of the captions (T5's with --padding right: right, to T), on the device.


def left_pad(rows, length):
    """Stacks captions' features (n, C) or words (n,) into (B, T, …) and a mask (B, T), true where text is.

    `length` = T is the longest caption's.
    """
    padded, masks = [], []
    for row in rows:
        missing = length - len(row)
        padded.append(torch.cat([row.new_zeros(missing, *row.shape[1:]), row]))
        masks.append(torch.arange(length, device=row.device) >= missing)
    return torch.stack(padded), torch.stack(masks)


# ---- public checkpoints ----------------------------------------------------------------------------------------------


def load_llamagen(state_dict, grid_size, head_dim=None):
    """A policy for images of `grid_size`² tokens from LlamaGen's state dict; other sizes are in the shapes.

    `head_dim` defaults to that of LlamaGen's model of this width. Raises InputError for a width that is no
    multiple of it and for a freqs_cis of another grid, KeyError for a missing entry, RuntimeError (PyTorch's,
    naming each) for missing, surplus or misshapen ones.
    """
    state_dict = dict(state_dict)
    table = state_dict.pop("freqs_cis", torch.empty(0))  # in older files: (T + N, head_dim / 2, 2)
    vocab_size, dim = state_dict["tok_embeddings.weight"].shape
    cls_token_num, caption_dim = state_dict["cls_embedding.uncond_embedding"].shape
    fits = table.dim() != 3 or len(table) == cls_token_num + grid_size**2
    expect(fits, f"its freqs_cis has {len(table)} positions, not {cls_token_num} + {grid_size}²: see --image-size")
    head_dim = head_dim or {3200: 100, 4096: 128}.get(dim, 64)  # LlamaGen's 3B and 7B; all others 64
    expect(dim % head_dim == 0 and head_dim % 4 == 0, f"a width of {dim} does not divide into heads of {head_dim}")
    config = GPTConfig(
        dim=dim,
        n_layer=count_layers(state_dict, "layers."),
        head_dim=head_dim,
        ffn_dim=len(state_dict["layers.0.feed_forward.w1.weight"]),
        vocab_size=vocab_size,
        cls_token_num=cls_token_num,
        caption_dim=caption_dim,
        grid_size=grid_size,
    )
    return build(lambda: Policy(config), state_dict)
