"""The paper's measures: Fréchet Inception distance (from scratch), CLIP scores (open_clip), token statistics.

    python metrics.py fid A B                    A, B: folders of images, or statistics (.npz)
    python metrics.py statistics A OUT.npz       statistics in pytorch-fid's layout
    python metrics.py clip DIR                   CLIP ViT-B/32 of what `train.py --sample` drew
    python metrics.py clip DIR --model ViT-H-14 --pretrained HPS_v2.1_compressed.pt --prefix ""      HPSv2
    python metrics.py token-kl A B               KL of the tokens' histograms, its floor, entropies; images need --vq

Two ways to prepare an image for Inception are in use, and they give different numbers for the same images:

    "clean"        clean-fid (Parmar et al. 2022): bicubic with anti-aliasing in float, (x − 128) / 128;
                   the published tables
    "pytorch-fid"  bilinear without anti-aliasing, x / 127.5 − 1; most older papers

EXIF orientation is ignored, as by the published tools. Transparency goes over white, 16 bits are scaled to 8.
"""

import argparse
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from files.disk import InputError, atomic_save, expect, reading, tolerant_output
from files.images import center_crop, image_batches, list_images
from files.measured import list_tokens, load_statistics, load_tokens, read_prompt
from files.weights import build, download, load, load_state_dict

# open_clip and torchvision take seconds to import, vq.py with them: they are imported where they are used.

# ---- Fréchet Inception distance --------------------------------------------------------------------------------------

INCEPTION = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth#6726825d"


def fid_inception(state_dict=None):
    """FID's network: images (B, 3, 299, 299) of `preprocess`, about [-1, 1], to pooled features (B, 2048).

    The 2015 TensorFlow graph differs from torchvision's Inception-v3 in its pools: averages leave out the
    padding, and the last block pools by maximum. Without `state_dict` the weights are fetched. Raises
    InputError where they cannot be, RuntimeError (PyTorch's, naming each) for entries of another network.
    """
    from torchvision.models import inception_v3

    if state_dict is None:
        with reading(INCEPTION, "a network to fetch it, or its file by --inception"):
            path = download(INCEPTION)
        state_dict = load_state_dict(path)
    # The norms' counters are not in the file; PyTorch starts them at 0.
    network = build(lambda: inception_v3(num_classes=1008, aux_logits=False, init_weights=False), state_dict)
    network.fc = nn.Identity()
    max_pooled = {}

    def exclude_padding(conv, inputs):
        return inputs[0] / F.avg_pool2d(torch.ones_like(inputs[0][:1, :1]), 3, 1, padding=1)

    def remember_max_pool(block, inputs):
        max_pooled["x"] = F.max_pool2d(inputs[0], 3, 1, padding=1)

    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        getattr(network, f"Mixed_{name}").branch_pool.register_forward_pre_hook(exclude_padding)
    network.Mixed_7c.register_forward_pre_hook(remember_max_pool)
    network.Mixed_7c.branch_pool.register_forward_pre_hook(lambda conv, inputs: max_pooled["x"])
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def preprocess(images, mode):
    """uint8 images (B, H, W, 3) to Inception's input (B, 3, 299, 299); the two modes are described above."""
    x = torch.tensor(images).permute(0, 3, 1, 2).float()
    if mode == "pytorch-fid":
        return F.interpolate(x / 255, (299, 299), mode="bilinear") * 2 - 1
    # What PIL's bicubic does to float channels, as in clean-fid; of whole images PIL rounds between its two passes.
    return (F.interpolate(x, (299, 299), mode="bicubic", antialias=True).clamp(0, 255) - 128) / 128


def feature_statistics(batches):
    """Of features that come as batches (b, F): mean (F,) and covariance (F, F), float64 arrays, and their number.

    Memory does not grow with them. Raises InputError for fewer than two.
    """
    n, total, products = 0, 0.0, 0.0
    for features in batches:
        features = features.double().cpu()
        n += len(features)
        total = total + features.sum(0)
        products = products + features.T @ features
    expect(n >= 2, f"a Fréchet distance needs at least 2 images on each side; one side has {n}")
    mu = total / n
    return mu.numpy(), ((products - n * mu.outer(mu)) / (n - 1)).numpy(), n


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½) (Heusel et al. 2017, arXiv 1706.08500), also for singular Σ.

    With Σ = L Lᵀ, tr (Σ₁ Σ₂)^½ is the sum of the singular values of L₁ᵀ L₂. That needs no matrix root of
    the product, which is not symmetric and has a complex root for singular Σ; and no root amplifies rounding.
    """

    def factor(sigma):
        values, vectors = torch.linalg.eigh(torch.from_numpy(sigma))  # NumPy's takes several times as long
        spanned = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        return vectors[:, spanned] * values[spanned].sqrt()  # (F, rank)

    overlap = torch.linalg.svdvals(factor(sigma1).T @ factor(sigma2)).sum()
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap
    return max(float(distance), 0.0)  # equal statistics may round to −1e-13; in this order NaN stays NaN


# ---- CLIP ------------------------------------------------------------------------------------------------------------


class CLIPScore(nn.Module):
    """100 · cosine of an open_clip model's image and text embeddings, without its logit scale.

    Differentiable to the pixels, which are resized as tensors: through PIL the "reward back-propagated to the
    decoder" would have no gradient at all.
    """

    def __init__(self, model, tokenizer, mean, std):
        from torchvision.transforms import Normalize

        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.normalize = Normalize(mean, std)

    @torch.no_grad()
    def encode_text(self, captions):
        """B captions to unit embeddings (B, dim)."""
        tokens = self.tokenizer(captions).to(self.model.logit_scale.device)
        return self.model.encode_text(tokens, normalize=True).float()

    def encode_image(self, images):
        """Images (R, 3, H, W) in [-1, 1] to unit embeddings (R, dim)."""
        x = (images.clamp(-1, 1) + 1) / 2  # a saved image has no pixel outside: nothing to gain there
        x = F.interpolate(x, self.model.visual.image_size, mode="bicubic", antialias=True).clamp(0, 1)
        return self.model.encode_image(self.normalize(x), normalize=True).float()

    def forward(self, images, text_emb):
        """Scores (R,) of images (R, 3, H, W) in [-1, 1] against text embeddings (R, dim)."""
        return 100 * (self.encode_image(images) * text_emb).sum(-1)


def open_clip_score(name, pretrained):
    """A `CLIPScore` of open_clip's model `name`; `pretrained` is one of its tags, to be fetched, or a file.

    OpenAI's weights belong to the "-quickgelu" names. Raises InputError for a wrong name or unusable weights.
    """
    import open_clip

    with reading(pretrained, f"weights of open_clip's {name}"):
        model = open_clip.create_model(name, pretrained=str(pretrained), require_pretrained=True)
    return CLIPScore(model, open_clip.get_tokenizer(name), model.visual.image_mean, model.visual.image_std)


# ---- tokens ----------------------------------------------------------------------------------------------------------


def token_histogram(tokens, size):
    """Frequencies (V,), float64, of integer tokens of any shape; one is added to all V = `size` counts."""
    counts = torch.bincount(tokens.flatten(), minlength=size).view(size).double() + 1  # fails for codes ≥ V
    return counts / counts.sum()


def token_kl(p, q):
    """KL(p ‖ q) in nats of histograms (V,), p generated and q real: the paper's latent covariate shift."""
    return (p * (p / q).log()).sum().item()


def token_entropy(p):
    """Entropy in bits of a histogram (V,); log2 V when all codes are used alike."""
    return -(p * p.log2()).sum().item()


# ---- command line ----------------------------------------------------------------------------------------------------

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def fid_transform(image, mode, image_size):
    pixels = center_crop(image, image_size) if image_size else np.asarray(image)
    return preprocess(pixels[None], mode)[0]


def compute_statistics(folder, images, line, network, args):
    """mu, sigma and a line on where they come from: of `images`, which `list_images` gave for `folder` with `line`."""
    batches = image_batches(images, partial(fid_transform, mode=args.preprocess, image_size=args.image_size))
    mu, sigma, n = feature_statistics(network(x.to(DEVICE)) for _, x in batches)
    expect(np.isfinite(mu.sum() + sigma.sum()), f"Inception's features of {folder}: not finite")
    return mu, sigma, f"{line}, {n} read, {args.preprocess} preprocessing, --image-size {args.image_size}"


def read_statistics(paths, args):
    """For each path, a .npz or a folder of images: mu, sigma and a line on where they come from."""
    statistics = {path: load_statistics(path) for path in paths if path.endswith(".npz")}
    images = {path: list_images(path) for path in paths if path not in statistics}  # refused before the work
    if images:
        network = (load(args.inception, fid_inception) if args.inception else fid_inception()).to(DEVICE)
        for path, (files, line) in images.items():
            statistics[path] = compute_statistics(path, files, line, network, args)
    return [statistics[path] for path in paths]


def print_fid(args):
    """The Fréchet distance of A and B, and by which protocol it came about."""
    (mu1, sigma1, line1), (mu2, sigma2, line2) = read_statistics([args.a, args.b], args)
    distance = frechet_distance(mu1, sigma1, mu2, sigma2)
    expect(np.isfinite(distance), f"FID of {args.a} and {args.b}: not finite")
    print(f"FID {distance:.6g}\n{line1}\nagainst {line2}")
    print("FID is biased upwards, below 2,048 images by much: compare it with the same counts only")


def save_statistics(args):
    """A's statistics, as the file B."""
    writable = args.b.endswith(".npz") and os.access(f"{Path(args.b).absolute().parent}/", os.W_OK)
    expect(writable, f"{args.b}: expected a name that ends in .npz, in a folder that can be written")
    [(mu, sigma, line)] = read_statistics([args.a], args)
    atomic_save(args.b, lambda file: np.savez(file, mu=mu, sigma=sigma))
    print(f"{args.b}: {line}")


def print_clip(args):
    """The mean CLIP score of the images that `train.py --sample` drew."""
    import open_clip

    images, line = list_images(args.a)
    prompts = {image: args.prefix + read_prompt(image) for image in images}
    score = open_clip_score(args.model, args.pretrained).to(DEVICE)
    # CLIP's own: the shorter side to the network's size by PIL's bicubic, then the middle.
    transform = open_clip.image_transform(score.model.visual.image_size, is_train=False, mean=[0.5] * 3, std=[0.5] * 3)
    scores = []
    for good, x in image_batches(images, transform):
        text_emb = score.encode_text([prompts[image] for image in good])
        scores += score(x.to(DEVICE), text_emb).tolist()
    expect(np.isfinite(scores).all(), f"CLIP scores of {args.a}: not finite")
    print(f"CLIP {np.mean(scores):.6g}, standard error {np.std(scores) / len(scores) ** 0.5:.3f}")
    print(f"{line}, {len(scores)} read; {args.model}, {args.prefix!r} before a caption")


def list_sources(folder, args):
    """The .npy files of a folder, or without any its images, which --vq encodes; and a line that counts them."""
    files = list_tokens(folder)
    if files:
        return files, f"{len(files)} .npy files of {folder}"
    images, line = list_images(folder)
    expect(args.vq, f"{folder}: no .npy files of tokens, as --sample writes; its images need --vq")
    return images, f"{line}, encoded at {args.image_size or 256} px"


def read_tokens(folder, files, vq, size, args):
    """Tokens, an int64 tensor for each of the files that `list_sources` gave."""
    if files[0].suffix == ".npy":
        return load_tokens(folder, files, size)
    tokens = []
    for _, x in image_batches(files, partial(center_crop, size=args.image_size or 256)):
        tokens += vq.encode(x.to(DEVICE).permute(0, 3, 1, 2) / 127.5 - 1).cpu()
    return tokens


def print_token_kl(args):
    """The KL of A's tokens from B's, and their entropies; and the KL that real tokens have from real ones."""
    from vq import load_vq

    files_a, line_a = list_sources(args.a, args)
    files_b, line_b = list_sources(args.b, args)  # both are refused before the work
    vq, size = None, args.vocab_size
    if args.vq:
        vq = load(args.vq, load_vq).to(DEVICE)
        size = vq.config.codebook_size
        for name, weight in vq.state_dict().items():  # the nearest code to NaN is a code
            expect(weight.isfinite().all(), f"{args.vq}: {name}: not finite")
    a = read_tokens(args.a, files_a, vq, size, args)
    b = read_tokens(args.b, files_b, vq, size, args)
    p = token_histogram(torch.cat(a), size)
    q = token_histogram(torch.cat(b), size)
    print(f"token KL {token_kl(p, q):.6g} nats, entropy {token_entropy(p):.6g} bits, of B {token_entropy(q):.6g}")
    print(f"{line_a}\nfrom {line_b}; one count added to each of {size} codes")
    print_floor(a, b, size)


def print_floor(a, b, size):
    """The floor: KL of n of B's files from B's others; and of n of A's from the same, since a KL depends on counts.

    a, b: tokens, a tensor a file. Files are taken at random with a fixed seed; n is as many as A has, or half of B's.
    """
    n = min(len(a), len(b) // 2)
    if n == 0:
        print("token KL depends on the counts; no floor of real against real: B is one file, and it takes two")
        return
    random = np.random.default_rng(0)
    random.shuffle(a)
    random.shuffle(b)
    others = token_histogram(torch.cat(b[n:]), size)
    floor = token_kl(token_histogram(torch.cat(b[:n]), size), others)
    same_counts = token_kl(token_histogram(torch.cat(a[:n]), size), others)
    print(f"floor of real against real: {floor:.6g}, by {n} files of B against its other {len(b) - n}")
    print(f"token KL depends on the counts; {n} files of A against the same others have {same_counts:.6g}")


COMMANDS = {"fid": print_fid, "statistics": save_statistics, "clip": print_clip, "token-kl": print_token_kl}


def main(argv=None):
    tolerant_output()
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("metrics.py", None, __doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("a")
    parser.add_argument("b", nargs="?", help="the other side, or the file to write; clip takes none")
    parser.add_argument(
        "--preprocess",
        choices=("clean", "pytorch-fid"),
        default="clean",
        help="how fid and statistics prepare images [clean]",
    )
    parser.add_argument("--image-size", type=int, default=0, help="crop and resize images to this; 0: as they are [0]")
    parser.add_argument("--inception", help="file of Inception's weights [fetched]")
    parser.add_argument("--model", default="ViT-B-32-quickgelu", help="clip's: a name of open_clip's [%(default)s]")
    parser.add_argument("--pretrained", default="openai", help="its weights: a tag, fetched, or a file [%(default)s]")
    parser.add_argument("--prefix", default="A photo depicts ", help="said before each caption [%(default)r]")
    parser.add_argument("--vq", help="tokenizer that encodes the images of a folder without .npy files")
    parser.add_argument("--vocab-size", type=int, default=16384, help="codes there are, without --vq [%(default)s]")
    args = parser.parse_args(argv)
    if (args.b is None) != (args.command == "clip") or args.image_size < 0:
        parser.error("fid, statistics and token-kl take two paths, clip one; --image-size a number from 0")
    try:
        COMMANDS[args.command](args)
    except InputError as error:
        parser.exit(2, f"metrics.py: {error}\n")


if __name__ == "__main__":
    main()
