"""The policy π_θ: an autoregressive transformer over VQ codes, its sampling and its log-probabilities.

One transformer serves LlamaGen's text-to-image model (Sun et al. 2024, arXiv 2406.06525), whose entry names it has, and
Janus-Pro's generation side (Chen et al. 2025, arXiv 2501.17811). What differs is small modules, put together in `llamagen_parts`
and `janus_parts`: how a caption and a code become embeddings, the rotary embedding, the output. Sizes are read from shapes:

    file                      layers  heads  dim    codes   prefix  parameters
    scenes/policy.pt               3      6    96     512        8       0.4 M
    t2i_XL_stage1_256.pt          36     20  1280   16384      120       775 M
    t2i_XL_stage2_512.pt          36     20  1280   16384      120       775 M
    Janus-Pro-1B/                 24     16  2048   16384    ≤ 512      1480 M, of them 210 M words

Easy to get wrong:
- LlamaGen's prefix (the caption) is not rotated by zero, it is *multiplied* by zero: its rotary table is all zeros there,
  so q and k of text positions vanish and text attends evenly to the text before it.
- Captions are left-padded, and a padded position is no key for anyone but itself. One mask, `attention_mask`, serves sampling
  and scoring; with two, the log-probabilities are those of another model.
- Janus rotates a head's first half against its second, LlamaGen neighbours: rows of q and k change places at load and at save.

Axes: B captions, G rollouts a caption, R = B·G rows, T prefix positions, N image tokens, V codes, C features of the text encoder.
"""

import argparse
import copy
import html
import platform
import re
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote_plus

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class PolicyConfig:
    """Sizes of a policy. `grid`² = N tokens form an image, row by row."""

    dim: int = 96
    layers: int = 3
    head_size: int = 32
    hidden: int = 256  # of the feed-forward
    codes: int = 512  # V
    prefix: int = 8  # T
    caption_dim: int = 64  # C
    grid: int = 8
    norm_eps: float = 1e-5
    words: int = 0  # Janus' vocabulary; 0 is LlamaGen's layout
    pad: int = 0  # Janus' word that stands for "no caption"


# ---- modules -----------------------------------------------------------------------------------------------------------


def run(function, *inputs, recompute):
    """function(*inputs); with `recompute` the backward pass computes it again instead of remembering what happened inside.

    An argument decides it, and not train() or eval(), which would have to be right at every call.
    """
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False) if recompute else function(*inputs)


class GridRotary(nn.Module):
    """LlamaGen's 2-D rotary embedding: the first half of a head's pairs turns with the row, the second with the column."""

    def __init__(self, config, base=10000.0):
        super().__init__()
        quarter = config.head_size // 4
        turns = torch.arange(config.grid)[:, None] * base ** (-torch.arange(quarter) / quarter)  # (grid, quarter)
        angles = torch.cat([turns.repeat_interleave(config.grid, 0), turns.repeat(config.grid, 1)], -1)  # (N, head_size / 2)
        self.register_buffer("table", torch.stack([angles.cos(), angles.sin()], -1), persistent=False)

    def forward(self, text_mask, tokens):
        """Cosines and sines (R, T + tokens, head_size / 2, 2) for text_mask (R, T); zero over the prefix (see above)."""
        return F.pad(self.table[:tokens], (0, 0, 0, 0, text_mask.shape[1], 0)).expand(len(text_mask), -1, -1, -1)


class LineRotary(nn.Module):
    """Llama's 1-D rotary embedding; a row's positions are counted from its first real word."""

    def __init__(self, config, base=10000.0):
        super().__init__()
        half = config.head_size // 2
        self.register_buffer("frequencies", base ** (-torch.arange(half) / half), persistent=False)

    def forward(self, text_mask, tokens):
        """Cosines and sines (R, T + tokens, head_size / 2, 2) for text_mask (R, T); those of padding are never looked at."""
        positions = F.pad(text_mask, (0, tokens), value=True).cumsum(1) - 1  # (R, T + tokens)
        angles = positions[..., None] * self.frequencies  # (R, T + tokens, head_size / 2)
        return torch.stack([angles.cos(), angles.sin()], -1)


def rotate(x, table):
    """Turns neighbouring pairs of `x` (…, R, heads, L, head_size) by `table` (R, L, head_size / 2, 2)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unsqueeze(1).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(x)


class Linear(nn.Linear):
    """nn.Linear, twice as fast on a CPU for the few rows of a decoding step.

    There its time is that of reading the matrix. MKL reads at the memory's rate for one row and at half of it for two, which
    guidance needs; with the matrix as left factor it reads at the full rate.
    """

    def forward(self, x):
        if x.device.type != "cpu" or not 2 <= x.shape[:-1].numel() <= 64:
            return super().forward(x)
        # Contiguous, or the next layer's right factor would be stored the other way round, and that is the slow way again.
        y = (self.weight @ x.flatten(0, -2).T).T.contiguous().unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias.type_as(y)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_size = config.head_size
        self.wqkv = Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = Linear(config.dim, config.dim, bias=False)

    def forward(self, x, table, mask, cache, at):
        qkv = self.wqkv(x).unflatten(-1, (3, -1, self.head_size)).permute(2, 0, 3, 1, 4)  # (3, R, heads, L, head_size)
        (q, k), v = rotate(qkv[:2], table), qkv[2]
        if cache is not None:
            cache.index_copy_(3, at, torch.stack([k, v]))
            k, v = cache[:, :, :, : mask.shape[-1]]  # only what the mask speaks of is attended to
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.wo(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = Linear(config.dim, config.hidden, bias=False)
        self.w3 = Linear(config.dim, config.hidden, bias=False)
        self.w2 = Linear(config.hidden, config.dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x, table, mask, cache, at):
        x = x + self.attention(self.attention_norm(x), table, mask, cache, at)
        return x + self.feed_forward(self.ffn_norm(x))


class CaptionEmbedding(nn.Module):
    """LlamaGen's: text features to prefix embeddings; holds the features that stand for "no caption" in guidance."""

    def __init__(self, config):
        super().__init__()
        self.uncond_embedding = nn.Parameter(torch.randn(config.prefix, config.caption_dim) / config.caption_dim**0.5)
        inside, outside = (Linear(width, config.dim, bias=False) for width in (config.caption_dim, config.dim))
        self.cap_proj = nn.Sequential(OrderedDict(fc1=inside, gelu=nn.GELU("tanh"), fc2=outside))

    def forward(self, features, text_mask, guided):
        """(B, T, C) to (B, T, dim); with `guided` (2B, T, dim), the unconditional half last."""
        if guided:
            features = torch.cat([features, self.uncond_embedding[-features.shape[1] :].expand_as(features)])
        return self.cap_proj(features)


class PromptEmbedding(nn.Module):
    """Janus': words of a prompt (B, T) to prefix embeddings. "No caption" keeps a prompt's first and last word and has pad words
    between them, which are attended to."""

    def __init__(self, config):
        super().__init__()
        self.pad = config.pad
        # Never trained: most words get no gradient in a run, and weight decay would shrink them all the same.
        self.embed_tokens = nn.Embedding(config.words, config.dim).requires_grad_(False)

    def forward(self, words, text_mask, guided):
        """(B, T) to (B, T, dim); with `guided` (2B, T, dim), the unconditional half last."""
        if guided:
            ends = text_mask & ~F.pad(text_mask[:, :-1], (1, 0))  # the first real word
            ends[:, -1] = True
            words = torch.cat([words, words.where(ends, self.pad)])
        return self.embed_tokens(words)


def llamagen_parts(c):
    """Prefix embedding, code embedding, output, rotary embedding, under LlamaGen's entry names."""
    return CaptionEmbedding(c), nn.Embedding(c.codes, c.dim), Linear(c.dim, c.codes, bias=False), GridRotary(c)


def janus_parts(c, code_size=8):
    """The same of Janus, under its entry names."""
    aligner = nn.Sequential(Linear(code_size, c.dim), nn.GELU(), Linear(c.dim, c.dim))
    gen_aligner = nn.Sequential(OrderedDict(layers=aligner))
    codes = nn.Sequential(OrderedDict(gen_embed=nn.Embedding(c.codes, code_size), gen_aligner=gen_aligner))
    head = {"output_mlp_projector": Linear(c.dim, c.dim), "gelu": nn.GELU(), "vision_head": Linear(c.dim, c.codes)}
    return PromptEmbedding(c), codes, nn.Sequential(OrderedDict(gen_head=nn.Sequential(OrderedDict(head)))), LineRotary(c)


class Policy(nn.Module):
    """The transformer. Attribute names are LlamaGen's entry names."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        parts = janus_parts(config) if config.words else llamagen_parts(config)
        self.cls_embedding, self.tok_embeddings, self.output, self.rotary = parts
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)

    def initialize(self, generator):
        """LlamaGen's start of training: every matrix N(0, 0.02), "no caption" as large as a caption, the output zero."""
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02, generator=generator)
        nn.init.normal_(self.cls_embedding.uncond_embedding, std=self.config.caption_dim**-0.5, generator=generator)
        nn.init.zeros_(self.output.weight)
        return self

    def forward(self, x, table, mask, cache=None, at=None, recompute=False):
        """Embeddings (R, L, dim) to last hidden states of the same shape.

        `table` (R, L, head_size / 2, 2) is of `rotary`. `mask` (R, 1, L, keys) is true where a position may look; None is causal.
        `cache`, from `new_cache`, is written at positions `at` (L,) and read up to the mask's keys. With `recompute` only the
        layers' inputs are kept for the backward pass (gradient checkpointing).
        """
        x = x.float()  # whatever autocast makes of embeddings: sampling and scoring must add up in the same precision
        for i, layer in enumerate(self.layers):
            x = run(layer, x, table, mask, None if cache is None else cache[i], at, recompute=recompute)
        return self.norm(x)

    def new_cache(self, rows, positions):
        """Room for the keys and values of `rows` sequences: (layers, 2, rows, heads, positions, head_size)."""
        c, weight = self.config, self.norm.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        # Zeros: a recorded step looks past what is filled, and a masked key of leftover NaN would still be NaN.
        return torch.zeros((c.layers, 2, rows, c.dim // c.head_size, positions, c.head_size), device=weight.device, dtype=dtype)


# ---- text and masks ----------------------------------------------------------------------------------------------------

# LlamaGen's captions were cleaned before flan-t5 read them, by rules made for captions off the web. These are the ones that change
# an ordinary caption, in their order; those for addresses, file names, product codes and markup are left out.
CLEANING = [
    ('["`´«»“”¨]', '"'),
    ("[‘’]", "'"),
    ("[\"']{2,}", '"'),
    (r"[.]{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
    (r"\b\s+:\s+", ": "),
    (r"(\D[,.])\b", r"\1 "),  # "red,green" and "street.a dog" miss a space
    (r"\s+", " "),
    ("^[\"'](.+)[\"']$", r"\1"),
    ("^['_,:;-]|['_,:+-]$", ""),
]


def clean_caption(text):
    """A caption as LlamaGen's text encoder was given it: lower case, plain quotes and dashes, one space."""
    for _ in range(2):  # theirs runs twice; what the first pass uncovers at the ends, the second takes off
        text = html.unescape(unquote_plus(text)).strip().lower()
        text = re.sub("[-\u2010-\u2015]+", "-", text)
        if len(re.findall("[-_]", text)) > 3:  # this-is-a-cat-with-a-hat
            text = re.sub("[-_]", " ", text)
        for pattern, replacement in CLEANING:
            text = re.sub(pattern, replacement, text)
        text = text.strip()
    return text


@torch.no_grad()
def t5_features(folder, captions, prefix, device, autocast, batch=32):
    """Yields for each caption its features (n, C), float32, on the CPU, from the T5 encoder in `folder`; n ≤ `prefix` tokens.

    Needs the package transformers; the encoder is gone from memory when the generator ends.
    """
    from transformers import AutoTokenizer, T5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = T5EncoderModel.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    for start in range(0, len(captions), batch):
        texts = [clean_caption(text) for text in captions[start : start + batch]]
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=prefix, return_tensors="pt").to(device)
        with autocast:
            features = encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        for rows, length in zip(features, tokens.attention_mask.sum(1)):
            yield rows[:length].float().cpu()


class JanusPrompts:
    """A caption to the words (n,) of Janus' prompt, by the tokenizer in its folder; the pair's name, if it has one, says nothing here.
    Needs the package transformers.

    Raises KeyError where the tokenizer lacks one of the words that the prompt or guidance needs.
    """

    def __init__(self, folder):
        from transformers import PreTrainedTokenizerFast

        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(folder) / "tokenizer.json"))
        known = self.tokenizer.get_vocab()
        self.begin, self.pad, self.image = (
            known[word] for word in ("<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>", "<begin_of_image>")
        )

    def __call__(self, caption, name=None):
        words = lambda text: self.tokenizer.encode(text, add_special_tokens=False)
        end = [*words("\n\n<|Assistant|>:"), self.image]
        prompt = words(f"<|User|>: {caption.strip()}\n\n<|Assistant|>:<begin_of_image>")
        if len(prompt) >= LONGEST_PROMPT:  # a caption's tail is cut, not what follows it
            prompt = [*prompt[: LONGEST_PROMPT - 1 - len(end)], *end]
        return torch.tensor([self.begin, *prompt])


LONGEST_PROMPT = 512  # words; Janus itself would take 16,384


def left_pad(features, prefix):
    """Stacks captions' features, each (n, C) or words (n,), n ≤ `prefix` = T, into (B, T, …) and a mask (B, T), true where text is.

    LlamaGen saw its captions in the *last* n positions; padded on the right it reads a different sentence.
    """
    for rows in features:
        if not 0 < len(rows) <= prefix:
            raise ValueError(f"a caption has {len(rows)} text features; the policy takes 1 to {prefix}")
    padded = torch.stack([torch.cat([rows.new_zeros(prefix - len(rows), *rows.shape[1:]), rows]) for rows in features])
    lengths = torch.tensor([len(rows) for rows in features])
    return padded, torch.arange(prefix) >= prefix - lengths[:, None]


def without_padding(features, text_mask):
    """Both without the positions that are padding in every row: no row looks at them, so nothing but time depends on them."""
    longest = text_mask.sum(1).amax()
    return features[:, -longest:], text_mask[:, -longest:]


def attention_mask(text_mask, tokens):
    """(R, 1, T + tokens, T + tokens), true where a position (row) may look at a key (column).

    Causal over text and image; padding is no key, but every position sees itself, or a padded row would have no key at all.
    """
    keys = F.pad(text_mask, (0, tokens), value=True)  # (R, T + tokens)
    length = keys.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=keys.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=keys.device)
    return (causal & keys[:, None, :] | itself)[:, None]


# ---- sampling and scoring ----------------------------------------------------------------------------------------------


def log_distribution(logits, guidance=1.0, temperature=1.0, top_k=0):
    """Log-probabilities of the next code, float32, from logits (…, V); with guidance ≠ 1 the first axis holds 2R rows.

    Classifier-free guidance: u + s (c − u), c the first half of the rows and u the second. `top_k` = 0 keeps all codes;
    `top_k` = 1 is greedy decoding.
    """
    logits = logits.float()
    if guidance != 1:
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + guidance * (conditional - unconditional)
    logits = logits / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits.log_softmax(-1)


def draw_code(log_probs, noise):
    """Codes (R,) from log-probabilities (R, V) by inverting the distribution function at `noise` (R,), uniform in [0, 1).

    One number a token, where the Gumbel trick needs V: noise is small enough to be an argument, so that two policies can
    be compared on the same draw and a row's randomness does not depend on its neighbours.
    """
    # In float64: a GPU's parallel sum wobbles, and in float32 a code of probability 0 is drawn a few times in a million.
    cumulative = log_probs.exp().cumsum(-1, dtype=torch.float64)
    code = torch.searchsorted(cumulative, noise[:, None] * cumulative[:, -1:], right=True)
    return code.squeeze(1).clamp_max(log_probs.shape[-1] - 1)  # rounding may leave the last sum a hair below the noise


@torch.no_grad()
def sample(policy, features, text_mask, noise, guidance=1.0, temperature=1.0, top_k=0):
    """Draws G image token sequences for each of B captions.

    features (B, T, C), or words (B, T), and text_mask (B, T) from `left_pad`; noise (B, G, N) uniform in [0, 1).
    Returns codes (B, G, N) and the log-probabilities (B, G, N) of the distribution they were drawn from.
    """
    B, G, N = noise.shape
    policy = in_autocasts_precision(policy)
    features, text_mask = without_padding(features, text_mask)
    T, guided = features.shape[1], guidance != 1
    noise = noise.flatten(0, 1)
    x = policy.cls_embedding(features, text_mask, guided)
    text_mask = text_mask.repeat(2, 1) if guided else text_mask
    table, mask = policy.rotary(text_mask, N - 1), attention_mask(text_mask, N - 1)

    # The caption is read once and its keys and values are shared by its G rollouts.
    prefix = policy.new_cache(len(text_mask), T)
    hidden = policy(x, table[:, :T], mask[:, :, :T, :T], prefix, torch.arange(T, device=noise.device))
    cache = policy.new_cache(len(text_mask) * G, T + N - 1)
    cache[:, :, :, :, :T].unflatten(2, (-1, G)).copy_(prefix.unsqueeze(3))
    hidden, table, mask = (tensor.repeat_interleave(G, 0) for tensor in (hidden[:, -1:], table, mask))  # R or 2R rows

    codes = torch.empty(B * G, N, dtype=torch.long, device=noise.device)
    chosen = torch.empty(B * G, N, device=noise.device)
    n = torch.zeros(1, dtype=torch.long, device=noise.device)  # the token's place; a recorded step must read it where it lies

    def draw():
        log_probs = log_distribution(policy.output(hidden[:, 0]), guidance, temperature, top_k)  # (R, V)
        code = draw_code(log_probs, noise.index_select(1, n)[:, 0])[:, None]  # (R, 1)
        codes.index_copy_(1, n, code)
        chosen.index_copy_(1, n, log_probs.gather(1, code))
        return code

    def step(seen):
        """Draws a token from `hidden` and reads it, looking at the first `seen` positions; nothing here waits for the device."""
        x, at = policy.tok_embeddings(draw()), T + n
        x = torch.cat([x, x]) if guided else x  # (R or 2R, 1, dim)
        hidden.copy_(policy(x, table.index_select(1, at), mask.index_select(2, at)[..., :seen], cache, at))
        n.add_(1)

    repeat(step, T, N - 1, noise.is_cuda)
    draw()
    return codes.view(B, G, N), chosen.view(B, G, N)


def repeat(step, prefix, tokens, record, stretch=128):
    """Calls step(seen) for each of `tokens` tokens. With `record`, on a GPU, where a step is a thousand small kernels and starting
    them takes longer than they do, the step is recorded as a CUDA graph and replayed.

    A graph's shapes are fixed, so it looks at all positions of its `stretch` of tokens; each stretch has a graph of its own.
    """
    for first in range(0, tokens, stretch):
        last = min(first + stretch, tokens)
        if not record:
            for n in range(first, last):
                step(prefix + n + 1)
            continue
        step(prefix + last)  # loads kernels and makes workspaces, which a recording cannot
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads, a loader's say, may go on meanwhile
            step(prefix + last)
        for _ in range(first + 1, last):
            graph.replay()


def in_autocasts_precision(policy):
    """`policy` with its matrices in the precision that autocast would cast them to at every token; as it is, where autocast is off."""
    kind = policy.norm.weight.device.type
    if not torch.is_autocast_enabled(kind):
        return policy
    dtype = torch.get_autocast_dtype(kind)
    cast = [weight for module in policy.modules() if isinstance(module, nn.Linear) for weight in module.parameters()]
    known = {id(weight): weight for weight in policy.parameters()}  # what deepcopy takes for copied: the rest is shared
    known |= {id(weight): nn.Parameter(weight.to(dtype), requires_grad=False) for weight in cast}
    return copy.deepcopy(policy, known)


def token_log_probs(policy, features, text_mask, codes, guidance=1.0, temperature=1.0, recompute=False, chunk=64):
    """Log-probabilities (R, N) of given codes (R, N) in one teacher-forced pass; features (R, T, C) or words (R, T), text_mask (R, T).

    The default scores the unguided policy, as the paper does although it samples with guidance; with the sampler's guidance and
    temperature it scores what was sampled, but for top-k: a code outside the reference's top k would have an infinite KL.
    Logits exist for `chunk` tokens at a time: (R, N, V) floats are 67 MB a row at N = 1024, and softmax takes several.
    """
    features, text_mask = without_padding(features, text_mask)
    T, N, guided = features.shape[1], codes.shape[1], guidance != 1
    x, inputs = policy.cls_embedding(features, text_mask, guided), policy.tok_embeddings(codes[:, :-1])
    if guided:
        inputs, text_mask = inputs.repeat(2, 1, 1), text_mask.repeat(2, 1)
    # Where no row is padded the mask is merely causal, and a kernel that knows that needs none.
    mask = None if text_mask.all() else attention_mask(text_mask, N - 1)
    hidden = policy(torch.cat([x, inputs], 1), policy.rotary(text_mask, N - 1), mask, recompute=recompute)
    hidden = hidden[:, T - 1 :]  # (R or 2R, N, dim); the last prefix position predicts the first code

    def score(hidden, codes):
        return log_distribution(policy.output(hidden), guidance, temperature).gather(2, codes[..., None])[..., 0]

    pieces = zip(hidden.split(chunk, 1), codes.split(chunk, 1))
    return torch.cat([run(score, *piece, recompute=recompute) for piece in pieces], 1)


# ---- files -------------------------------------------------------------------------------------------------------------


def count_layers(entries, prefix):
    return 1 + max((int(name.removeprefix(prefix).split(".")[0]) for name in entries if name.startswith(prefix)), default=-1)


def policy_from_entries(entries, grid, head_size=None):
    """A policy from a LlamaGen state dict; sizes from the shapes, `grid` from the image size, `head_size` from the width.

    Raises KeyError for a missing entry and RuntimeError (PyTorch's, naming each) for missing, surplus or misshapen ones.
    """
    entries = {name: value for name, value in entries.items() if name != "freqs_cis"}  # older files keep the rotary table
    codes, dim = entries["tok_embeddings.weight"].shape
    prefix, caption_dim = entries["cls_embedding.uncond_embedding"].shape
    layers = count_layers(entries, "layers.")
    hidden = entries["layers.0.feed_forward.w1.weight"].shape[0]
    head_size = head_size or {3200: 100, 4096: 128}.get(dim, 64)  # LlamaGen's 3B and 7B; all others 64
    config = PolicyConfig(dim, layers, head_size, hidden, codes, prefix, caption_dim, grid)
    if dim % config.head_size or config.head_size % 4:
        raise ValueError(f"width {dim} does not divide into heads of {config.head_size}; name the head size with --head-size")
    with torch.device("meta"):
        policy = Policy(config)
    policy.load_state_dict(entries, strict=True, assign=True)
    policy.rotary = GridRotary(config)
    return policy.float()


# Our names as Janus has them, by patterns; * is q, k and v, which are one matrix here.
JANUS_NAMES = {
    r"^(tok_embeddings|output)\.": "",
    r"^(layers\.|norm\.)": r"language_model.model.\1",
    r"^cls_embedding\.": "language_model.model.",
    r"attention\.wqkv": "self_attn.*_proj",
    r"attention\.wo": "self_attn.o_proj",
    r"feed_forward\.w1": "mlp.gate_proj",
    r"feed_forward\.w3": "mlp.up_proj",
    r"feed_forward\.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
# What else its file holds: for understanding pictures, for writing text, and the tokenizer.
JANUS_OTHERS = ("vision_model.", "aligner.", "language_model.lm_head.", "gen_vision_model.")


def janus_names(name):
    """The one or three entries in Janus' file that hold our entry `name`."""
    for ours, theirs in JANUS_NAMES.items():
        name = re.sub(ours, theirs, name)
    return [name.replace("*", part) for part in "qkv"] if "*" in name else [name]


def swap_pairs(weight, head_size, back=False):
    """Rows of a q or k matrix from Janus' order, where row i turns with row i + head_size / 2 of its head, to ours, neighbours."""
    sizes = (head_size // 2, 2) if back else (2, head_size // 2)
    return weight.unflatten(0, (-1, *sizes)).transpose(1, 2).flatten(0, 2)


def janus_from_entries(entries, sizes, pad, grid):
    """A policy from Janus' entries; `sizes` is its config.json, which may leave sizes out, and `pad` the tokenizer's pad word.

    Raises like `policy_from_entries`; entries that are not of image generation are left out.
    """
    # Older files keep the rotary table.
    others = lambda name: name.startswith(JANUS_OTHERS) or name.endswith("rotary_emb.inv_freq")
    entries = {name: value for name, value in entries.items() if not others(name)}
    words, dim = entries["language_model.model.embed_tokens.weight"].shape
    layers = count_layers(entries, "language_model.model.layers.")
    language = sizes.get("language_config", {})
    if language.get("rope_theta", 10000) != 10000 or language.get("rope_scaling"):
        raise ValueError("its config.json asks for another rotary embedding than Janus-Pro's, base 10000 without scaling")
    config = PolicyConfig(
        dim, layers, dim // language["num_attention_heads"] if "num_attention_heads" in language else 128,
        hidden=entries["language_model.model.layers.0.mlp.gate_proj.weight"].shape[0], codes=len(entries["gen_embed.weight"]),
        prefix=LONGEST_PROMPT, caption_dim=0, grid=grid, norm_eps=language.get("rms_norm_eps", 1e-6), words=words, pad=pad,
    )  # fmt: skip
    with torch.device("meta"):
        policy = Policy(config)
    ours = {}
    for name in policy.state_dict():
        parts = [entries.pop(theirs) for theirs in janus_names(name)]
        if parts[1:]:
            parts[:2] = (swap_pairs(part, config.head_size) for part in parts[:2])
        ours[name] = torch.cat(parts) if parts[1:] else parts[0]
    policy.load_state_dict(ours | entries, strict=True, assign=True)  # what is left is surplus, and named
    policy.rotary = LineRotary(config)
    return policy.float()


def janus_entries(state, head_size):
    """A policy's state dict in Janus' names and row order: `janus_from_entries` backwards."""
    entries = {}
    for name, value in state.items():
        names = janus_names(name)
        parts = list(value.chunk(len(names)))
        if parts[1:]:
            q, k, v = parts  # a view's file would hold the whole matrix, so v is copied
            parts = [swap_pairs(q, head_size, back=True), swap_pairs(k, head_size, back=True), v.clone()]
        entries |= zip(names, parts)
    return entries


# ---- benchmark ---------------------------------------------------------------------------------------------------------

MODELS = {
    "XL": PolicyConfig(1280, 36, 64, 3584, 16384, 120, 2048, 16),
    "L": PolicyConfig(1024, 24, 64, 2816, 16384, 120, 2048, 16),
    "B": PolicyConfig(768, 12, 64, 2048, 16384, 120, 2048, 16),
    "tiny": PolicyConfig(),
}


@torch.no_grad()
def sample_naively(policy, features, text_mask, tokens, guidance):
    """Greedy codes (B, tokens) without a cache: everything is computed again for every token. What `sample` is measured against."""
    codes = torch.empty(len(features), 0, dtype=torch.long, device=features.device)
    x, text_mask = policy.cls_embedding(features, text_mask, True), text_mask.repeat(2, 1)
    for n in range(tokens):
        inputs = torch.cat([x, policy.tok_embeddings(codes).repeat(2, 1, 1)], 1)
        hidden = policy(inputs, policy.rotary(text_mask, n), attention_mask(text_mask, n))
        best = log_distribution(policy.output(hidden[:, -1]), guidance).argmax(1, keepdim=True)
        codes = torch.cat([codes, best], 1)
    return codes


def seconds(function, device, times=1, warm_up=None):
    """Time of a call, after one of it, or of `warm_up`."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    (warm_up or function)()
    wait()
    start = time.perf_counter()
    for _ in range(times):
        function()
    wait()
    return (time.perf_counter() - start) / times


def machine(device, dtype, read, width):
    """Prints what this machine is and returns what it reads (bytes/s) and multiplies (FLOP/s) in the same run: on a CPU by a plain
    matrix-vector product over `read` bytes, on a GPU by a copy of 1 GB, read and written."""
    side = 8192 if device == "cuda" else 2048
    square = torch.randn(side, side, device=device, dtype=dtype)
    flops = 2 * side**3 / seconds(lambda: square @ square, device, 3)
    if device == "cuda":
        name, how = torch.cuda.get_device_name(), "copying 1 GB, read and written"
        source, target = (torch.empty(2**30, dtype=torch.uint8, device=device) for _ in range(2))
        bandwidth = 2 * 2**30 / seconds(lambda: target.copy_(source), device, 10)
    else:
        name, how = f"{torch.get_num_threads()} threads of {cpu_name()}", "a matrix-vector product over as many bytes"
        matrix = torch.ones(read // dtype.itemsize // width, width, dtype=dtype)
        bandwidth = read / seconds(lambda: torch.mv(matrix, matrix[0]), device, 3)
    print(
        f"{name}, torch {torch.__version__}: multiplies {side}³ at {flops / 1e12:.2f} TFLOP/s, reads {bandwidth / 1e9:.1f} GB/s ({how})"
    )
    return bandwidth, flops


def peak_memory(device):
    """Bytes: of the GPU since the last reset, or of this process since it began."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def bench(model, batches, dtype, device, tokens):
    """Prints how fast random weights of a model's shape sample, captions of full length and their reading included."""
    c, generator = MODELS[model], torch.Generator().manual_seed(0)
    policy = Policy(c).initialize(generator).to(device)
    weights = sum(weight.numel() for part in (policy.layers, policy.output) for weight in part.parameters())
    print(f"{model}, {dtype}: {weights * dtype.itemsize / 1e9:.2f} GB of weights a token")
    bandwidth, flops = machine(device, dtype, weights * dtype.itemsize, c.dim)

    autocast = torch.autocast(device, dtype, enabled=dtype != torch.float32)
    uniform = lambda *sizes: torch.rand(sizes, generator=generator).to(device)
    prompts = lambda batch: (
        uniform(batch, c.prefix, c.caption_dim),
        torch.ones(batch, c.prefix, dtype=torch.bool, device=device),
    )
    print("\ncaptions  guided  tokens/s  ms a step   GB/s  of reading  of multiplying  images/s  peak GB")
    for batch, guidance in [(1, 1.0), *((batch, 7.5) for batch in batches)]:
        inputs, noise = prompts(batch), uniform(batch, 1, tokens)
        draw = lambda noise: sample(policy, *inputs, noise, guidance, 1.0, 1000)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with autocast:
            step = seconds(lambda: draw(noise), device, warm_up=lambda: draw(noise[..., :2])) / tokens
        rows = batch if guidance == 1 else 2 * batch
        cached = rows * (c.prefix + tokens / 2) * 2 * c.layers * c.dim  # keys and values, on average
        read, multiplied = (weights + cached) * dtype.itemsize / step, 2 * weights * rows / step
        images = f"{batch / step / tokens:8.3f}" if tokens == c.grid**2 else "       –"
        print(
            f"{batch:8d}  {'no' if guidance == 1 else 'yes':>6}  {batch / step:8.1f}  {1e3 * step:9.2f}  {read / 1e9:5.1f}  "
            f"{read / bandwidth:10.0%}  {multiplied / flops:14.1%}  {images}  {peak_memory(device) / 1e9:7.1f}"
        )
    few, more = min(tokens, 4), min(tokens, 64)
    with autocast:
        naive = seconds(lambda: sample_naively(policy, *prompts(2), few, 7.5), device) / few
        ours = seconds(lambda: sample(policy, *prompts(2), uniform(2, 1, more), 7.5, top_k=1), device) / more
    print(f"\n2 captions, guided, tokens/s: {2 / naive:.2f} without a cache (first {few}), ", end="")
    print(f"{2 / ours:.2f} with it (first {more}), {naive / ours:.1f} times as many")


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor() or "CPU")


def main():
    parser = argparse.ArgumentParser("policy.py", description="bench: how fast random weights of a model's shape sample")
    parser.add_argument("command", choices=["bench"])
    parser.add_argument("--model", choices=MODELS, default="XL")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="captions at a time [1 8]")
    parser.add_argument("--dtype", choices=["float32", "bf16"], default="bf16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, help="tokens a picture, at most the model's grid, which is the default")
    given = parser.parse_args()
    most = MODELS[given.model].grid ** 2
    if min(given.batch) < 1 or not 2 <= (given.tokens or most) <= most:
        parser.error(f"--batch takes numbers from 1, --tokens one from 2 to {most}")
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16}[given.dtype]
    bench(given.model, given.batch, dtype, given.device, given.tokens or most)


if __name__ == "__main__":
    main()
