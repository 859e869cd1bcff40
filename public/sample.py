"""Images of captions: those that a run watches, and --sample's, in GenEval's layout for other programs to score."""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from files.disk import atomic_save, expect, make_folder
from files.images import save_preview, to_pil
from public.data import read_prompts
from rankee import in_batches, random_stream, sample_tokens, uniform


def make_autocast(cfg):
    bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and cfg.device == "cuda")
    return torch.autocast(cfg.device, torch.bfloat16, enabled=bf16)


@torch.no_grad()
def sample_images(policy, decoders, text_encoder, captions, u, cfg):
    """Draws n captions from u (n, N) as rollouts are: tokens (n, N), their log-probabilities (n, N), and a list
    of each decoder's images (n, 3, H, W).
    """
    cond, cond_mask = text_encoder(captions)
    with make_autocast(cfg):
        tokens, logprobs = sample_tokens(policy, cond, cond_mask, u[:, None], cfg)  # (n, 1, N)
    tokens, logprobs = tokens[:, 0], logprobs[:, 0]
    return tokens, logprobs, [in_batches(vq.decode, tokens, size=cfg.micro_batch_size) for vq in decoders]


class Watched:
    """A world's captions, drawn from the same numbers before, during and after a run."""

    def __init__(self, world, cfg):
        self.world, self.cfg = world, cfg
        N = world.policy.config.grid_size**2
        self.u = uniform(random_stream(cfg.seed, "watched"), len(world.captions), N).to(cfg.device)

    def draw(self, policy, decoders, n=None):
        """Tokens (n, N) of the first n captions, and their images (n, 3, H, W) by each of the named decoders."""
        captions, u = self.world.captions[:n], self.u[:n]
        drawn = sample_images(policy, decoders.values(), self.world.text_encoder, captions, u, self.cfg)
        tokens, _, images = drawn
        return tokens, dict(zip(decoders, images))

    @torch.no_grad()
    def measure_real(self, vq):
        """The numbers of the captions' real images as `vq` reconstructs them; token KL's is its floor."""
        tokens = in_batches(vq.encode, self.world.images.to(self.cfg.device), size=self.cfg.micro_batch_size)
        images = in_batches(vq.decode, tokens, size=self.cfg.micro_batch_size)
        return [{"method": "real", "decoder": "base", "step": 0} | self.world.evaluate(tokens, images)]

    def measure(self, policy, decoders, method, step):
        """The world's numbers of all captions' images, a row a decoder."""
        tokens, images = self.draw(policy, decoders)
        where = {"method": method, "decoder": "", "step": step}
        return [where | {"decoder": name} | self.world.evaluate(tokens, x) for name, x in images.items()]


@torch.no_grad()
def save_picture(path, world, columns, rows=8):
    """Saves a sheet of real and drawn images: of the world's first n captions those whose reward rose most.

    columns: label -> images (n, 3, H, W) of these captions. The first is the base's, with which the last is compared.
    Where the last is of a run's "own decoder", the one before it is the base decoder's of the same policy.
    """
    columns = {label: images.clamp(-1, 1) for label, images in columns.items()}
    labels, n = list(columns), len(columns["base"])
    before, after, shown, note = columns["base"], columns[labels[-1]], torch.arange(n), ""
    if n > rows:
        text_emb = world.scorer.encode_text(world.captions[:n])
        old, new = (in_batches(world.scorer, x, text_emb, size=n) for x in (before, after))
        shown = (new - old).topk(rows).indices.cpu()
        note = f"Of the first {n} captions, the {rows} whose reward rose most from base to {labels[-1]}. "
    columns = {"real": world.images} | columns
    if "own decoder" in labels[-1]:
        columns["difference x 4"] = 4 * (after - columns[labels[-2]])
        note += "Difference: own decoder less base decoder, amplified, on grey."
    captions = [world.captions[i] for i in shown]
    save_preview(path, {label: images[shown] for label, images in columns.items()}, captions, note)


def drawing_settings(policy, vq, cfg):
    """What an image of --sample depends on, beside its caption: JSON. The networks are told by a checksum."""
    names = ("image_size", "cfg_scale", "temperature", "top_k", "padding", "seed")
    settings = {name: getattr(cfg, name) for name in names}
    for name, weight in {"ckpt": policy.norm.weight, "vq": vq.decoder.conv_out.weight}.items():
        settings[name] = zlib.crc32(weight.detach().cpu().numpy().tobytes())
    return json.dumps(settings).encode()


def sample(module, cfg):
    """Draws the captions of --sample with the networks of a world's `module` (train.world_of), in GenEval's layout.

    What is there already is not drawn again. A caption is in OUT/00000/metadata.jsonl, an image in
    OUT/00000/samples/0000.png, its tokens in 0000.npy. An image depends only on the files, the settings, and which
    caption and which of its images it is.
    """
    expect(os.environ.get("WORLD_SIZE", "1") == "1", "--sample runs as one process; start it without torchrun")
    out, prompts = Path(cfg.out), read_prompts(cfg.sample, cfg.num_images)
    cfg = module.resolve_files(cfg)
    policy, vq, text_encoder = module.load_pretrained(cfg)
    for name, network in {"ckpt": policy, "vq": vq}.items():
        finite = all(weight.isfinite().all() for weight in network.parameters())
        expect(finite, f"--{name} {getattr(cfg, name)}: holds weights that are not finite")

    # What is drawn of what: nothing is written before all is known to fit.
    kept = {out / "sample.json": drawing_settings(policy, vq, cfg)}
    todo = []
    for i, prompt in enumerate(prompts):
        folder = out / f"{i:05d}"
        kept[folder / "metadata.jsonl"] = json.dumps(prompt).encode()
        for k in range(cfg.per_prompt):
            path = folder / "samples" / f"{k:04d}.png"
            if not path.exists():
                todo.append((i, k, path))
    for path, content in kept.items():
        same = not path.exists() or path.read_bytes() == content
        expect(same, f"{path}: is of another caption or of other settings; name another folder with --out")

    N = policy.config.grid_size**2
    for batch in tqdm(DataLoader(todo, cfg.rollout_batch_size, collate_fn=list), unit=" batches"):
        u = torch.stack([uniform(random_stream(cfg.seed, "sample", i, k), N) for i, k, _ in batch])
        captions = [prompts[i]["prompt"] for i, _, _ in batch]
        tokens, logprobs, (images,) = sample_images(policy, [vq], text_encoder, captions, u.to(cfg.device), cfg)
        finite = logprobs.isfinite().all() and images.isfinite().all()
        expect(finite, "the networks' outputs are not finite; their weights are: try --precision float32")
        for (_, _, path), image_tokens, image in zip(batch, tokens.cpu(), images):
            make_folder(path.parent)
            for file in (out / "sample.json", path.parent.parent / "metadata.jsonl"):
                atomic_save(file, lambda target: target.write(kept[file]))
            atomic_save(path.with_suffix(".npy"), lambda file: np.save(file, image_tokens.numpy()))
            atomic_save(path, lambda file: to_pil(image).save(file, "PNG"))
    print(f"{len(todo)} of {len(prompts) * cfg.per_prompt} images drawn; the others were in {cfg.out} already")
