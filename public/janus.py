"""Janus-Pro's generation side (Chen et al. 2025, arXiv 2501.17811): its modules, tokenizer, and file, both ways.

Its layers are `policy.Policy`'s; what differs is how a caption and a token become embeddings, the output layer
and the rotary embedding:

    file            n_layer  n_head   dim  vocab_size  cls_token_num  parameters
    Janus-Pro-1B/        24      16  2048       16384          ≤ 512      1485 M, 210 M of them words

The rotary embedding pairs neighbouring channels of a head in LlamaGen, its first half with its second in Janus:
rows of Janus' q and k matrices are reordered at load and save.
"""

import json
import re
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from files.disk import atomic_save, expect, make_folder, reading
from files.weights import build, count_layers, load, load_state_dict, save_networks
from policy import GPTConfig, Policy, left_pad, rope_1d
from vq import load_vq

FILES = ()  # options that name files, beside --ckpt
# The authors' settings for Janus-Pro-1B, where they differ from LlamaGen-XL's. Their script accumulates two
# batches of 2 captions, which is our batch of 4; their code drops the first of the two.
PRESET = """--out runs/janus --image-size 384 --cfg-scale 5 --policy-lr 1e-4 --lambda-d 0.05 --lambda-c 5
--tau-steps 936"""


class PromptEmbedder(nn.Module):
    """Janus': words to prefix embeddings; "no caption" has pad words between the first and last word."""

    def __init__(self, text_vocab_size, dim, pad_id):
        super().__init__()
        self.pad_id = pad_id
        # Never trained: most words get no gradient in a run, and weight decay would shrink them all the same.
        self.embed_tokens = nn.Embedding(text_vocab_size, dim).requires_grad_(False)

    def unconditional(self, input_ids, cond_mask):
        """What stands for "no caption" in the place of these prompts (B, T)."""
        keep = cond_mask & ~F.pad(cond_mask[:, :-1], (1, 0))  # the first real word
        keep[:, -1] = True  # and the last; pad words between them are attended to, as in Janus
        return input_ids.where(keep, self.pad_id)

    def forward(self, input_ids, cond_mask, use_cfg):
        """(B, T) and mask (B, T) to (B, T, dim) and mask; `use_cfg` appends B unconditional rows."""
        if use_cfg:
            input_ids = torch.cat([input_ids, self.unconditional(input_ids, cond_mask)])
            cond_mask = cond_mask.repeat(2, 1)
        return self.embed_tokens(input_ids), cond_mask


class JanusPolicy(Policy):
    """The transformer with Janus' own modules, named as in Janus' file."""

    def __init__(self, config, text_vocab_size, pad_id):
        super().__init__(config)
        dim, vocab_size = config.dim, config.vocab_size
        self.cls_embedding = PromptEmbedder(text_vocab_size, dim, pad_id)
        aligner = nn.Sequential(OrderedDict(layers=nn.Sequential(nn.Linear(8, dim), nn.GELU(), nn.Linear(dim, dim))))
        gen_embed, vision_head = nn.Embedding(vocab_size, 8), nn.Linear(dim, vocab_size)
        head = OrderedDict(output_mlp_projector=nn.Linear(dim, dim), gelu=nn.GELU(), vision_head=vision_head)
        self.tok_embeddings = nn.Sequential(OrderedDict(gen_embed=gen_embed, gen_aligner=aligner))
        self.output = nn.Sequential(OrderedDict(gen_head=nn.Sequential(head)))

    def freqs_cis(self, cond_mask, n):
        """As `Policy`'s, but one-dimensional, and positions are counted from a row's first real word."""
        return rope_1d(F.pad(cond_mask, (0, n), value=True).cumsum(1) - 1, self.config.head_dim)


class JanusTokenizer:
    """Janus' prompts as words, by the tokenizer.json in its folder. Needs the package transformers."""

    MAX_LENGTH = 512  # words; Janus itself would take 16,384

    def __init__(self, folder, device):
        from transformers import PreTrainedTokenizerFast

        self.device = device
        with reading(f"{folder}/tokenizer.json", "Janus-Pro's tokenizer"):
            self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json")
            words = ("<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>", "<begin_of_image>")
            self.bos_id, self.pad_id, self.image_id = (self.tokenizer.get_vocab()[word] for word in words)

    def __call__(self, captions):
        end = [*self.tokenizer.encode("\n\n<|Assistant|>:", add_special_tokens=False), self.image_id]
        rows = []
        for caption in captions:
            text = f"<|User|>: {caption.strip()}\n\n<|Assistant|>:<begin_of_image>"
            prompt = self.tokenizer.encode(text, add_special_tokens=False)
            if len(prompt) >= self.MAX_LENGTH:  # a caption's tail is cut, not what follows it
                prompt = [*prompt[: self.MAX_LENGTH - 1 - len(end)], *end]
            rows.append(torch.tensor([self.bos_id, *prompt], device=self.device))
        return left_pad(rows, max(map(len, rows)))


# Our names as Janus has them, by patterns; * is q, k and v, which are one matrix here:
# layers.3.attention.wqkv.weight ↔ language_model.model.layers.3.self_attn.q_proj.weight, …k_proj…, …v_proj….
JANUS_NAMES = {
    r"^(tok_embeddings|output|cls_embedding)\.": "",
    r"^(layers|norm|embed_tokens)\.": r"language_model.model.\1.",
    r"attention\.wqkv": "self_attn.*_proj",
    r"attention\.wo": "self_attn.o_proj",
    r"feed_forward\.w1": "mlp.gate_proj",
    r"feed_forward\.w3": "mlp.up_proj",
    r"feed_forward\.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


# What else its file holds: image understanding, text output, the tokenizer; in older files a rotary table.
JANUS_UNUSED = r"(vision_model|aligner|language_model\.lm_head|gen_vision_model)\.|.*rotary_emb\.inv_freq$"


def janus_names(name):
    """The one or three entries in Janus' file that hold our entry `name`."""
    for pattern, replacement in JANUS_NAMES.items():
        name = re.sub(pattern, replacement, name)
    return [name.replace("*", part) for part in "qkv"] if "*" in name else [name]


def permute(weight, *pairs):
    """Reorders the rows of a q or k matrix, head by head, for the other layout of rotary pairs.

    `pairs` = 2, head_dim / 2 joins Janus' pairs, rows i and i + head_dim / 2; swapped, it parts them again.
    """
    return weight.unflatten(0, (-1, *pairs)).transpose(1, 2).flatten(0, 2)


def load_janus(state_dict, config, pad_id, grid_size):
    """A policy from Janus' state dict, without the entries that do not serve image generation.

    `config` is its config.json, which may leave sizes out; `pad_id` is its tokenizer's. Raises InputError for
    another rotary embedding or q, k, v that are not square; otherwise like `load_llamagen`.
    """
    state_dict = {name: x for name, x in state_dict.items() if not re.match(JANUS_UNUSED, name)}
    text_vocab_size, dim = state_dict["language_model.model.embed_tokens.weight"].shape
    language = config.get("language_config", {})
    head_dim = dim // language["num_attention_heads"] if "num_attention_heads" in language else 128
    same_rope = language.get("rope_theta", 10000) == 10000 and not language.get("rope_scaling")
    expect(same_rope, "its config.json asks for another rotary embedding than Janus-Pro's, base 10000, unscaled")
    policy_config = GPTConfig(
        dim=dim,
        n_layer=count_layers(state_dict, "language_model.model.layers."),
        head_dim=head_dim,
        ffn_dim=len(state_dict["language_model.model.layers.0.mlp.gate_proj.weight"]),
        vocab_size=len(state_dict["gen_embed.weight"]),
        cls_token_num=JanusTokenizer.MAX_LENGTH,
        caption_dim=dim,
        grid_size=grid_size,
        norm_eps=language.get("rms_norm_eps", 1e-6),
    )
    with torch.device("meta"):
        names = JanusPolicy(policy_config, text_vocab_size, pad_id).state_dict()
    ours = {}
    for name in names:
        parts = [state_dict.pop(theirs) for theirs in janus_names(name)]
        if len(parts) == 3:  # q, k and v
            expect({part.shape for part in parts} == {(dim, dim)}, f"{janus_names(name)}: expected {dim} × {dim} each")
            q, k, v = parts
            parts = [permute(q, 2, head_dim // 2), permute(k, 2, head_dim // 2), v]
        ours[name] = torch.cat(parts)
    return build(
        lambda: JanusPolicy(policy_config, text_vocab_size, pad_id), ours | state_dict
    )  # what is left is surplus, and named


def janus_state_dict(state_dict, head_dim):
    """A policy's state dict in Janus' names and row order: `load_janus` backwards."""
    theirs = {}
    for name, value in state_dict.items():
        names = janus_names(name)
        parts = value.chunk(len(names))
        if len(names) == 3:  # a view's file would hold the whole matrix, so v is copied
            q, k, v = parts
            parts = [permute(q, head_dim // 2, 2), permute(k, head_dim // 2, 2), v.clone()]
        theirs.update(zip(names, parts))
    return theirs


def preset(reward, sampling):
    """The authors' settings as words of a command line; they draw the images that they measure at another top-k."""
    words = PRESET.split()
    if reward == "hpsv2":
        words += ["--kl-coef", "0.01"]
    if sampling:
        words += ["--top-k", "50"]
    return words


def public_name(ckpt):
    """The repository OWNER/NAME that a checkpoint names; "" where it is a path."""
    path = Path(ckpt)
    is_path = path.exists() or path.suffix in (".bin", ".pt", ".pth", ".safetensors")
    return "" if is_path or len(path.parts) != 2 or Path(path.parts[0]).exists() else ckpt


def load_pretrained(cfg):
    """Policy, tokenizer and text encoder, on the device. Raises InputError for files that are not Janus-Pro's."""
    vq, text_encoder = load(cfg.ckpt, load_vq), JanusTokenizer(cfg.ckpt, cfg.device)
    with reading(f"{cfg.ckpt}/config.json", "Janus-Pro's"):
        config = json.loads(Path(cfg.ckpt, "config.json").read_text("utf-8-sig"))
    size = config.get("vision_config", {}).get("params", {}).get("image_size", cfg.image_size)
    expect(size == cfg.image_size, f"--image-size {cfg.image_size}: {cfg.ckpt}/config.json says {size}")
    policy = load(cfg.ckpt, load_janus, config, text_encoder.pad_id, vq.config.grid_size(cfg.image_size))
    V, codebook_size = policy.config.vocab_size, vq.config.codebook_size
    expect(V == codebook_size, f"--ckpt {cfg.ckpt} has {V} codes, its tokenizer {codebook_size}")
    return policy.to(cfg.device), vq.to(cfg.device), text_encoder


def saver(cfg):
    """The function that saves networks in Janus-Pro's layout: policy/ with the decoder trained with it, policy_ema/
    with the EMAs, and the discriminator. What it needs of the base is read now: a save must not fail for it.
    """
    original = load_state_dict(cfg.ckpt)  # mapped from the file, not in memory
    # Config, tokenizer, processor; no .index.json.
    texts = {file.name: file.read_bytes() for file in Path(cfg.ckpt).glob("*[!x].json")}

    def save(out, networks):
        for policy, vq in (("policy", "vq"), ("policy_ema", "vq_ema")):
            ours = janus_state_dict(networks[policy].state_dict(), networks[policy].config.head_dim)
            ours |= {f"gen_vision_model.{key}": x for key, x in networks[vq].state_dict().items()}
            merged = dict(original)
            for key, x in ours.items():  # what did not change is saved as it was, in its own precision
                if key in original and not torch.equal(original[key].float(), x.cpu()):
                    merged[key] = x.cpu()
            make_folder(out / policy)
            atomic_save(out / policy / "pytorch_model.bin", lambda file: torch.save(merged, file))
            for name, text in texts.items():
                atomic_save(out / policy / name, lambda target: target.write(text))
        save_networks(out, {"discriminator": networks["discriminator"]})

    return save
