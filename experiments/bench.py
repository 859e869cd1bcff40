"""Speed and memory, with random weights of a model's shape: nothing is downloaded.

    python -m experiments.bench                            sampling at XL's shape; on a CPU take --model B
    python -m experiments.bench --step                     whole training steps, part by part, on a GPU
    python -m experiments.bench --step -- --rank-k 4       what follows -- are options of train.py

Sampling is shown beside the machine's reading speed, measured in the same run by a matrix-vector product over
as many bytes as the weights have: a decoding step reads all weights and the KV cache (GB/s counts both), and
with few rows cannot be faster than that. Captions have their full length. On a CPU images have 64 tokens, and
the peak of memory is that of the whole process.
"""

import importlib.util
import itertools
import time
from resource import RUSAGE_SELF, getrusage  # not on Windows
from types import SimpleNamespace

import open_clip
import torch
from torchvision.models import vgg16

import policy as policies
import train
from experiments.curves import run_script, script_parser
from files.disk import expect
from files.log import print_table
from metrics import CLIPScore
from policy import GPTConfig, Policy, Sampling, decode_n_tokens, generate
from public.sample import make_autocast
from rankee import Models, rollout, update_decoder, update_policy
from vq import VQConfig, VQModel, load_lpips, patch_discriminator

MODELS = {  # LlamaGen's; tiny is about the embedded world's
    "XL": GPTConfig(dim=1280, n_layer=36, head_dim=64, ffn_dim=3584),
    "B": GPTConfig(dim=768, n_layer=12, head_dim=64, ffn_dim=2048),
    "tiny": GPTConfig(96, 3, 16, 256, vocab_size=512, cls_token_num=8, caption_dim=64, grid_size=8),
}
CFG_SCALE, TOP_K = 7.5, 1000  # LlamaGen's
SAMPLING = "CUDA graph,captions,cfg_scale,tokens/s,ms a step,GB/s,of reading,peak GB".split(",")


def random_captions(config, B, device):
    """Captions of full length as the policy is given them: cond (B, T, C), cond_mask (B, T)."""
    cond = torch.rand(B, config.cls_token_num, config.caption_dim, device=device)
    return cond, torch.ones(cond.shape[:2], dtype=torch.bool, device=device)


def measure(function, device, times=1):
    """Seconds of a call, and the peak of memory in GB; on a CPU since the process began."""
    wait = getattr(torch, device).synchronize
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    wait()
    start = time.perf_counter()
    for _ in range(times):
        function()
    wait()
    seconds = (time.perf_counter() - start) / times
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else getrusage(RUSAGE_SELF).ru_maxrss * 1024
    return seconds, peak / 1e9


# ---- sampling --------------------------------------------------------------------------------------------------------


def measure_reading(device, dtype, width, n):
    """The machine's reading speed in bytes/s, measured on n numbers in rows of `width`."""
    matrix = torch.randn(n // width, width, device=device, dtype=dtype)
    for _ in range(2):  # the first loads kernels
        bandwidth = n * dtype.itemsize / measure(lambda: matrix @ matrix[0], device, times=3)[0]
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}: reads {bandwidth / 1e9:.1f} GB/s")
    return bandwidth


@torch.no_grad()
def bench_sampling(model, batches, cfg):
    """Prints how fast images are sampled, the reading of the captions included."""
    config, device, rows = MODELS[model], cfg.device, []
    n = config.grid_size**2 if device == "cuda" else 64
    with torch.device(device), make_autocast(cfg):
        policy = Policy(config)
        dtype = policy.new_kv_cache(1, 1).dtype
    weights = sum(weight.numel() for part in (policy.layers, policy.output) for weight in part.parameters())
    bandwidth = measure_reading(device, dtype, config.dim, weights)
    print(f"{model}, {dtype}: {weights * dtype.itemsize / 1e9:.2f} GB of weights are read a step; {n} tokens an image")

    def draw(B, cfg_scale, n):
        cond, cond_mask = random_captions(config, B, device)
        with make_autocast(cfg):
            generate(policy, cond, cond_mask, torch.rand(B, 1, n, device=device), Sampling(cfg_scale, 1.0, TOP_K))

    graphs = [False, True] if device == "cuda" else [False]
    for graph, (B, cfg_scale) in itertools.product(graphs, [(1, 1.0), *((B, CFG_SCALE) for B in batches)]):
        # What `generate` calls; left to itself it would record a graph wherever there is a GPU.
        policies.decode_n_tokens = lambda step, length, n, use_cuda_graph: decode_n_tokens(step, length, n, graph)
        draw(B, cfg_scale, 2)
        seconds, peak = measure(lambda: draw(B, cfg_scale, n), device)
        step, R = seconds / n, B if cfg_scale == 1 else 2 * B
        cached = R * (config.cls_token_num + n / 2) * 2 * config.n_layer * config.dim  # on average
        read = (weights + cached) * dtype.itemsize / step
        row = ["yes" if graph else "no", B, cfg_scale, B / step, 1e3 * step, read / 1e9, f"{read / bandwidth:.0%}"]
        rows.append(dict(zip(SAMPLING, [*row, peak])))
    print_table(rows)


# ---- a training step -------------------------------------------------------------------------------------------------


def random_models(model, cfg):
    """`Models` of the public shapes, T5's encoder too (tiny: CLIP and tokenizer are small, and no T5)."""
    tiny, sizes = model == "tiny", {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32}
    clip = open_clip.create_model("ViT-B-32-quickgelu" if tiny else "ViT-L-14-quickgelu", device=cfg.device)
    scorer = CLIPScore(clip, open_clip.tokenize, clip.visual.image_mean, clip.visual.image_std)
    with torch.device(cfg.device):
        vq = VQModel(VQConfig(32, (1, 1, 2, 2), codebook_size=512) if tiny else VQConfig())
        linear = {f"lin{i}.model.1.weight": torch.rand(width) for i, width in enumerate([64, 128, 256, 512, 512])}
        lpips, discriminator = load_lpips(vgg16(weights=None).state_dict(), linear), patch_discriminator()
        policy, t5 = Policy(MODELS[model]), None
        if not tiny and importlib.util.find_spec("transformers"):
            from transformers import T5Config, T5EncoderModel

            t5 = T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **sizes)).bfloat16().requires_grad_(False)

    def text_encoder(captions):
        cond, cond_mask = random_captions(MODELS[model], len(captions), cfg.device)
        return (t5(cond_mask.long()).last_hidden_state.float() if t5 else cond), cond_mask

    networks = {"scorer": scorer, "lpips": lpips, "discriminator": discriminator}
    world = SimpleNamespace(policy=policy, vq=vq, text_encoder=text_encoder, **networks)
    return Models(world, make_autocast(cfg), cfg)


def bench_step(model, cfg):
    """Prints seconds and memory of each part of three training steps."""
    config, models, rows = MODELS[model], random_models(model, cfg), []
    B, G, N, captions = cfg.batch_size, cfg.group_size, config.grid_size**2, ["two red dogs"] * cfg.batch_size
    side = config.grid_size * 2 ** (len(models.vq.config.ch_mult) - 1)
    images, u = (torch.rand(*shape, device=cfg.device) for shape in ((B, 3, side, side), (B, G, N)))
    print(f"{model}, {B} captions of {G} rollouts, micro-batches of {cfg.micro_batch_size}")
    for step in range(cfg.disc_start, cfg.disc_start + 3):  # the first loads kernels and makes Adam's moments
        rollouts = []
        parts = {"rollout": lambda: rollouts.append(rollout(models, captions, u, cfg))}
        parts["policy"] = lambda: update_policy(models, rollouts[0], step, cfg)
        parts["decoder"] = lambda: update_decoder(models, rollouts[0], 2 * images - 1, step, cfg)
        for part, function in parts.items():
            seconds, peak = measure(function, cfg.device)
            rows.append({"step": step - cfg.disc_start, "part": part, "seconds": seconds, "peak GB": peak})
    print_table(rows)


def bench(args, options):
    cfg = train.parse_config(["--ckpt", "random", *options])
    expect(min(args.batch) > 0, "--batch: expected 1 or more")
    expect(cfg.device == "cuda" or args.model == "tiny" or not args.step, "--step needs a GPU, or --model tiny")
    if args.step:
        bench_step(args.model, cfg)
    else:
        bench_sampling(args.model, args.batch, cfg)


def main():
    parser = script_parser("bench.py", __doc__)
    parser.add_argument("--model", choices=MODELS, default="XL", help="LlamaGen's size [%(default)s]")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="captions at a time [1 8]")
    parser.add_argument("--step", action="store_true", help="training steps; on a CPU only with --model tiny")
    run_script(parser, bench)


if __name__ == "__main__":
    main()
