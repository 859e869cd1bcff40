"""LlamaGen's text-to-image models: what they read, captions cleaned and encoded by flan-t5-xl; their files."""

import html
import re
from urllib.parse import unquote_plus

import torch

from files import weights
from files.disk import expect, reading
from policy import load_llamagen
from vq import load_vq

FILES = ("vq", "t5")  # options that name files, beside --ckpt
PUBLIC = "llamagen_xl.pt, t2i_XL_stage1_256.pt, t2i_XL_stage2_512.pt, or Janus-Pro as deepseek-ai/Janus-Pro-1B"

# LlamaGen's captions were cleaned before flan-t5 read them, by rules for captions off the web. In order,
# those that change an ordinary caption; left out: those for addresses, file names, product codes and markup.
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
    return text.strip()


class T5Encoder:
    """LlamaGen's text encoder, flan-t5-xl, from its folder; in bf16 on a GPU, 2.4 GB.

    `dim` is C, `max_length` the largest T. LlamaGen was trained with `padding` on the left, a caption in the *last*
    positions; the authors train and draw COCO's images with it on the right. Needs the package transformers.
    Raises InputError for a folder that is not whole, or another encoder's.
    """

    def __init__(self, folder, dim, max_length, device, encoder_device, padding="left"):
        from transformers import AutoTokenizer, T5EncoderModel

        self.max_length, self.device, self.padding = max_length, device, padding
        dtype = torch.bfloat16 if torch.device(encoder_device).type == "cuda" else torch.float32
        with reading(folder, "the folder of flan-t5-xl, whole"):
            self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=padding, local_files_only=True)
            options = {"dtype": dtype, "local_files_only": True, "output_loading_info": True}
            self.encoder, info = T5EncoderModel.from_pretrained(folder, **options)
        self.encoder.to(encoder_device).eval().requires_grad_(False)
        expect(not info["missing_keys"], f"{folder}: lacks the weights {sorted(info['missing_keys'])[:3]}")
        # Without its files transformers silently makes an empty tokenizer, which reads every word as <unk>.
        known = self.tokenizer.unk_token_id not in self.tokenizer("a photo of two red dogs").input_ids
        expect(known, f"{folder}: its tokenizer does not know ordinary words; expected flan-t5-xl's, whole")
        width = self.encoder.config.d_model
        expect(width == dim, f"{folder}: has features {width} wide; the policy takes {dim}")

    @torch.no_grad()
    def __call__(self, captions):
        # On the right always to max_length: LlamaGen's first image token is predicted at a fixed position.
        padding = "longest" if self.padding == "left" else "max_length"
        options = {"padding": padding, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        inputs = self.tokenizer([clean_caption(text) for text in captions], **options).to(self.encoder.device)
        cond = self.encoder(inputs.input_ids, inputs.attention_mask).last_hidden_state
        cond, cond_mask = cond.float().to(self.device), inputs.attention_mask.bool().to(self.device)
        return cond * cond_mask[..., None], cond_mask


def preset(reward, sampling):
    """What the authors set otherwise than the defaults, which are theirs for CLIP: words of a command line."""
    return "--lambda-d 0.1 --tau-steps 468".split() if reward == "hpsv2" else "--tau-steps 936".split()


def public_name(ckpt):
    """Where a checkpoint that is no path is published; "" for others."""
    name = "t2i_XL_stage1_256.pt" if ckpt == "llamagen_xl.pt" else ckpt
    return f"peizesun/llamagen_t2i/{name}" if name in PUBLIC.split(", ") else ""


def load_pretrained(cfg):
    """Policy, tokenizer and text encoder, on the device. Raises InputError, also where two do not fit."""
    vq = weights.load(cfg.vq, load_vq)
    policy = weights.load(cfg.ckpt, load_llamagen, vq.config.grid_size(cfg.image_size))
    V, codebook_size = policy.config.vocab_size, vq.config.codebook_size
    expect(V == codebook_size, f"--ckpt {cfg.ckpt} has {V} codes, --vq {codebook_size}; give a pair")
    width, length = policy.config.caption_dim, policy.config.cls_token_num
    text_encoder = T5Encoder(cfg.t5, width, length, cfg.device, cfg.t5_device or cfg.device, cfg.padding)
    return policy.to(cfg.device), vq.to(cfg.device), text_encoder


def saver(cfg):
    """The function that saves networks in LlamaGen's layout, a file each."""
    return weights.save_networks
