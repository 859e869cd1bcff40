"""Each test names what would be wrong in the world if it failed. `pytest` runs all of them in minutes on two cores.

testdata/reference.npz holds outputs of the public programs (LlamaGen, its VQ tokenizer, Janus, pytorch-fid, clean-fid, LPIPS) on weights
that are a function of their names, so that no weights need to be stored; testdata/manifests.json the names and shapes of
public checkpoints.
"""

import argparse
import contextlib
import copy
import functools
import io
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import metrics
import policy as policies
import rankee
import train
import vq as tokenizers
from scenes import world

HERE = Path(__file__).parent
REFERENCE = np.load(HERE / "testdata" / "reference.npz")
META = json.loads(str(REFERENCE["meta"]))
MANIFESTS = json.loads((HERE / "testdata" / "manifests.json").read_text())


OFF = torch.autocast("cpu", enabled=False)


def reference(name):
    return torch.from_numpy(REFERENCE[name])


def fill(shapes, scale=None):
    """Entries by name, as the reference values were computed with: a random stream seeded by the name."""
    entries = {}
    for name, shape in shapes.items():
        x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(int(np.prod(shape)), dtype=np.float32).reshape(shape)
        if name.endswith("running_var"):
            x = 1 + 0.1 * np.abs(x)
        elif len(shape) <= 1:
            x = 1 + 0.1 * x if name.endswith("weight") else 0.02 * x
        else:
            x = x * np.sqrt((2 if len(shape) == 4 else 1) / np.prod(shape[1:]), dtype=np.float32)
        entries[name] = torch.from_numpy(np.asarray(x, dtype=np.float32)) * (scale or {}).get(name, 1.0)
    return entries


@pytest.fixture(scope="module")
def llamagen():
    meta = META["llamagen"]
    policy = policies.policy_from_entries(fill(meta["shapes"], meta["scale"]), grid=4, head_size=16)
    return policy, reference("llamagen.caption_features"), reference("llamagen.caption_mask").bool()


@pytest.fixture(scope="module")
def janus():
    """Prompts of 6, 3 and 9 words in one batch."""
    meta = META["janus"]
    entries, sizes = fill(meta["shapes"], meta["scale"]), {"language_config": meta["language_config"]}
    policy = policies.janus_from_entries(entries, sizes, meta["pad_id"], grid=4)
    return policy, *policies.left_pad([torch.tensor(words) for words in meta["prompt_ids"]], 12)


@pytest.fixture(params=["llamagen", "janus"])
def backbone(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def llamagen_vq():
    return tokenizers.vq_from_entries(fill(META["vq"]["shapes"]))


# ---- the public programs' numbers --------------------------------------------------------------------------------------


def test_policy_scores_like_the_public_program(request, backbone):
    """Else a public checkpoint would be post-trained as another model than the one its authors sample from."""
    (policy, features, mask), name = backbone, request.node.callspec.params["backbone"]
    tokens = reference(f"{name}.tokens")
    log_probs = policies.token_log_probs(policy, features, mask, tokens)
    torch.testing.assert_close(log_probs, reference(f"{name}.logprobs"), atol=1e-4, rtol=0)
    x = torch.cat([policy.cls_embedding(features, mask, guided=False), policy.tok_embeddings(tokens[:, :-1])], 1)
    hidden = policy(x, policy.rotary(mask, 15), policies.attention_mask(mask, 15))
    torch.testing.assert_close(policy.output(hidden[:, 11:]), reference(f"{name}.logits"), atol=1e-4, rtol=0)


def test_policy_samples_like_the_public_program(request, backbone):
    """Else rollouts would come from a model that no published number describes."""
    name = request.node.callspec.params["backbone"]
    for guidance, expected in ((1.0, "greedy_tokens"), (META[name]["cfg_scale"], "greedy_tokens_cfg")):
        codes, _ = policies.sample(*backbone, torch.rand(3, 1, 16), guidance, top_k=1)
        assert torch.equal(codes[:, 0], reference(f"{name}.{expected}"))


def test_janus_goes_back_as_it_came(janus):
    """Else what is saved is no Janus: its own program would turn the wrong halves of a head, or meet other names."""
    meta = META["janus"]
    entries = fill(meta["shapes"], meta["scale"])
    back = policies.janus_entries(janus[0].state_dict(), 16)
    assert set(back) == {name for name in entries if not name.startswith(policies.JANUS_OTHERS)}
    assert all(torch.equal(value, entries[name]) for name, value in back.items())
    vq = tokenizers.vq_from_entries(train.under("gen_vision_model.", entries))
    torch.testing.assert_close(vq.decode(reference("janus.tokens")), reference("janus.decoded"), atol=1e-4, rtol=0)


def test_janus_pro_1b_has_the_entries_we_expect():
    """Else the real file would be refused after its download. Names are those of the reference's small model, repeated for 24
    layers; sizes are the published ones. The tokenizer is that of `vq_ds16_t2i.pt`."""
    dim, hidden, words = 2048, 5632, 102400
    sizes = {64: dim, 176: hidden, 100: words, 128: 16384}  # the small model's → Janus-Pro-1B's
    entries = {}
    for name, shape in META["janus"]["shapes"].items():
        if not name.startswith("gen_vision_model.") and ".layers.1." not in name:
            shape = [sizes.get(size, size) for size in shape]
            copies = (
                [name.replace(".layers.0.", f".layers.{i}.") for i in range(24)]
                if "language_model.model.layers" in name
                else [name]
            )
            entries |= dict.fromkeys(copies, shape)
    entries |= {f"gen_vision_model.{name}": shape for name, shape in MANIFESTS["vq_ds16_t2i.pt"].items()}
    entries |= {"vision_model.vision_tower.pos_embed": [1, 576, 1024], "aligner.layers.0.weight": [dim, 1024]}
    with torch.device("meta"):
        tensors = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in entries.items()}
        policy = policies.janus_from_entries(tensors, {}, 100002, 24)
        vq = tokenizers.vq_from_entries(train.under("gen_vision_model.", tensors))
    ours = policies.janus_entries(policy.state_dict(), 128) | {f"gen_vision_model.{n}": v for n, v in vq.state_dict().items()}
    rest = {name for name in entries if name.startswith(("vision_model.", "aligner.", "language_model.lm_head."))}
    assert {name: list(value.shape) for name, value in ours.items()} == {n: s for n, s in entries.items() if n not in rest}
    assert (policy.config.layers, policy.config.head_size, policy.config.codes) == (24, 128, 16384)
    assert sum(p.numel() for p in policy.parameters()) == pytest.approx(1.48e9, rel=0.01)


def test_tokenizer_is_llamagens(llamagen_vq):
    """Else decoded pictures, and the codes of real ones, would be another tokenizer's."""
    image = reference("vq.image")
    close = lambda value, name: torch.testing.assert_close(value, reference(name), atol=1e-4, rtol=0)
    close(llamagen_vq.decode(reference("vq.codes")), "vq.decoded")
    close(llamagen_vq.latents(image), "vq.pre_quant")
    assert torch.equal(llamagen_vq.encode(image), reference("vq.encoded_codes"))
    close(llamagen_vq.decode(llamagen_vq.encode(image)), "vq.reconstruction")


def test_autocast_leaves_codes_alone(llamagen_vq):
    """Else on a GPU the decoder is trained on codes that real pictures do not have: bf16 takes one code for its neighbour."""
    latents = llamagen_vq.latents(reference("vq.image"))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(llamagen_vq.quantize.nearest(latents), reference("vq.encoded_codes"))


@pytest.mark.parametrize("file, sizes", [("vq_ds16_t2i.pt", ()), ("t2i_XL_stage1_256.pt", (16,))])
def test_public_files_have_the_entries_we_expect(file, sizes):
    """Else the real file would be refused after hours of download, or sizes read from its shapes would be wrong."""
    with torch.device("meta"):
        entries = {name: torch.empty(shape) for name, shape in MANIFESTS[file].items()}
        build = policies.policy_from_entries if sizes else tokenizers.vq_from_entries
        model = build(entries, *sizes)
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == MANIFESTS[file]


def test_inception_is_the_fid_variant():
    """Else every FID would be off from the published ones by the pools' treatment of padding, or by the resize."""
    shapes = MANIFESTS["pt_inception-2015-12-05-6726825d.pth"]
    network = metrics.inception_from_entries(fill(shapes))
    pictures = REFERENCE["fid.images"]
    clean = metrics.prepare_for_inception(pictures, "clean")
    sample = (clean[0] * 128 + 128).permute(1, 2, 0)[::23, ::23]
    torch.testing.assert_close(sample, reference("fid.resized_clean_sample"), atol=1e-3, rtol=0)  # of 0 … 255
    with torch.no_grad():
        torch.testing.assert_close(network(clean), reference("fid.features_clean"), atol=1e-4, rtol=0)
        other = network(metrics.prepare_for_inception(pictures, "pytorch-fid"))
    torch.testing.assert_close(other, reference("fid.features"), atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", range(3))
def test_frechet_distance_is_pytorch_fids(case):
    """Else FIDs would not compare; case 2 has fewer samples than dimensions, where a general matrix root goes complex."""
    a, b = (metrics.feature_statistics(reference(f"frechet.{side}{case}").split(50))[:2] for side in "xy")
    distance = metrics.frechet_distance(*a, *b)
    assert distance == pytest.approx(REFERENCE["frechet.expected"][case], rel=1e-6)
    assert metrics.frechet_distance(*b, *a) == pytest.approx(distance, rel=1e-9)
    assert 0 <= metrics.frechet_distance(*a, *a) < 1e-6


def test_frechet_distance_needs_two_samples():
    """Else the covariance of one picture is NaN, and so is a number in somebody's table."""
    with pytest.raises(metrics.BadInput, match="at least 2"):
        metrics.feature_statistics([torch.zeros(1, 4)])


def test_lpips_is_the_one_llamagen_trained_with():
    """Else both anchors would hold the decoder to another notion of similar."""
    vgg = fill(MANIFESTS["vgg16-397923af.pth (features only)"])
    linear = {name: value.abs() for name, value in fill(MANIFESTS["vgg_lpips.pth (linear layers)"]).items()}
    distance = tokenizers.lpips_from_entries(vgg, linear)(reference("lpips.a"), reference("lpips.b"))
    torch.testing.assert_close(distance, reference("lpips.distance"), atol=1e-4, rtol=0)


# ---- metrics -----------------------------------------------------------------------------------------------------------


def measured(*arguments):
    """What `metrics.py` prints, called without a process of its own: the first line's numbers by name, and everything."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["metrics.py", *map(str, arguments), "--workers", "0", "--device", "cpu"])
        metrics.main()
    words = out.getvalue().splitlines()[0].split("   ")
    return {name: float(value) for name, value in (word.rsplit(" ", 1) for word in words)}, out.getvalue() + err.getvalue()


def metrics_refuses(monkeypatch, capsys, *arguments):
    """The one line with which `python metrics.py` ends, with status 2."""
    monkeypatch.setattr(sys, "argv", ["metrics.py", *map(str, arguments), "--workers", "0", "--device", "cpu"])
    with pytest.raises(SystemExit) as stopped:
        metrics.main()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("metrics.py: ")]
    assert stopped.value.code == 2 and len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def two_folders(tmp_path_factory):
    """Folders of 7 and 6 pictures, nested and in three formats, and Inception's file filled by name."""
    folder = tmp_path_factory.mktemp("fid")
    torch.save(fill(MANIFESTS["pt_inception-2015-12-05-6726825d.pth"]), folder / "inception.pth")
    rng = np.random.default_rng(0)
    for side, count in (("a", 7), ("b", 6)):
        (folder / side / "more").mkdir(parents=True)
        for i in range(count):
            coarse = train.Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            path = folder / side / ("more" if i > 3 else ".") / f"{i}.{['png', 'jpg', 'webp'][i % 3]}"
            coarse.resize((64, 64)).save(path)
    return folder


@pytest.mark.parametrize("preprocess", ["clean", "pytorch-fid"])
def test_fid_command_is_the_distance_of_the_pictures(two_folders, tmp_path, preprocess):
    """Else the number in a table is not what a slow reading of the definition gives: all pictures at once, np.cov."""
    options = ["--weights", two_folders / "inception.pth", "--preprocess", preprocess]
    numbers, printed = measured("fid", two_folders / "a", two_folders / "b", *options)
    network = metrics.inception_from_entries(torch.load(two_folders / "inception.pth"))
    sides = []
    for side in "ab":
        pictures = [np.asarray(train.Image.open(path).convert("RGB")) for path in metrics.list_pictures(two_folders / side)]
        features = network(metrics.prepare_for_inception(np.stack(pictures), preprocess)).double().numpy()
        sides += [features.mean(0), np.cov(features, rowvar=False)]
    assert numbers["FID"] == pytest.approx(metrics.frechet_distance(*sides), rel=1e-4)
    assert (
        "7 pictures" in printed
        and "against 6 pictures of" in printed
        and preprocess in printed
        and "sha256" in printed
        and "biased" in printed
    )
    if preprocess == "clean":  # the command itself, with its worker processes; saved statistics stand for the folder
        arguments = ["fid", two_folders / "a", two_folders / "b", *options, "--device", "cpu"]
        done = subprocess.run([sys.executable, HERE / "metrics.py", *arguments], capture_output=True, text=True)
        assert done.returncode == 0 and float(done.stdout.split()[1]) == pytest.approx(numbers["FID"], rel=1e-4), done.stderr
        measured("statistics", two_folders / "a", tmp_path / "a.npz", *options)
        with np.load(tmp_path / "a.npz") as saved:  # what pytorch-fid reads
            np.testing.assert_allclose(saved["mu"], sides[0], atol=1e-5)
            np.testing.assert_allclose(saved["sigma"], sides[1], atol=1e-5)


def test_larger_pictures_are_measured_as_if_saved_at_256_px():
    """Else Janus-Pro's pictures of 384 px are measured at a size that the paper's figures are not of."""
    picture = train.Image.fromarray(np.random.default_rng(0).integers(0, 256, (384, 400, 3), dtype=np.uint8))
    saved = train.to_picture(metrics.square(256, picture))
    ours = metrics.inception_input("clean", 256, picture)
    assert torch.equal(ours, metrics.inception_input("clean", 0, saved)) and torch.equal(
        ours, metrics.inception_input("clean", 256, saved)
    )


def test_a_distance_from_itself_is_zero(two_folders, tmp_path):
    """Else rounding of a singular covariance (12 samples in 64 dimensions) makes a distance of its own."""
    mean, covariance, count = metrics.feature_statistics([torch.randn(12, 64, generator=torch.Generator().manual_seed(0))])
    np.savez(tmp_path / "x.npz", mu=mean, sigma=covariance)
    numbers, printed = measured("fid", tmp_path / "x.npz", tmp_path / "x.npz", "--weights", two_folders / "inception.pth")
    assert 0 <= numbers["FID"] < 1e-6 and "? pictures" in printed


def test_fid_is_pytorch_fids_own(two_folders, monkeypatch):
    """Else our FID is another number than that of the program whose name tables cite: its package on the same folders."""
    inception = pytest.importorskip("pytorch_fid.inception", reason="pip install pytorch-fid compares with the package itself")
    score = pytest.importorskip("pytorch_fid.fid_score")
    entries = torch.load(two_folders / "inception.pth")
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: entries)
    network = inception.InceptionV3([3])
    theirs = [
        value
        for side in "ab"
        for value in score.calculate_activation_statistics(metrics.list_pictures(two_folders / side), network, 4)
    ]
    distance = metrics.fid(
        two_folders / "a",
        two_folders / "b",
        weights=two_folders / "inception.pth",
        preprocess="pytorch-fid",
        workers=0,
        device="cpu",
    )
    assert distance[0]["FID"] == pytest.approx(metrics.frechet_distance(*theirs), rel=1e-3)


def test_unreadable_pictures_are_named_and_left_out(two_folders, tmp_path):
    """Else a cut download counts as a picture, or ends an hour's work."""
    shutil.copytree(two_folders / "a", tmp_path / "a")
    (tmp_path / "a" / "cut.png").write_bytes((two_folders / "a" / "0.png").read_bytes()[:200])
    options = ["--weights", two_folders / "inception.pth"]
    numbers, printed = measured("statistics", tmp_path / "a", tmp_path / "a.npz", *options)
    assert "cut.png" in printed and "(1 so far)" in printed and numbers["pictures"] == 7


def test_metrics_refuse_what_does_not_fit(two_folders, tmp_path, monkeypatch, capsys):
    """Else a wrong folder or file ends in a traceback, or in a number."""
    weights, a = ["--weights", two_folders / "inception.pth"], two_folders / "a"
    says = lambda *arguments: metrics_refuses(monkeypatch, capsys, *arguments)
    (tmp_path / "empty").mkdir()
    assert "no pictures" in says("fid", a, tmp_path / "empty", *weights)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.png").write_bytes(b"no picture")
    assert "none of its 1 pictures can be read" in says("fid", tmp_path / "bad", a, *weights)
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(64), sigma=np.eye(64))
    assert "has 64 features" in says("fid", tmp_path / "narrow.npz", a, *weights)
    np.savez(tmp_path / "other.npz", mean=np.zeros(64))
    assert "expected a .npz with mu (F,)" in says("fid", tmp_path / "other.npz", a, *weights)
    np.savez(tmp_path / "nan.npz", mu=np.full(2048, np.nan), sigma=np.eye(2048))
    assert "not finite" in says("fid", tmp_path / "nan.npz", a, *weights)
    assert "its folder is not there" in says("statistics", a, tmp_path / "nowhere" / "a.npz", *weights)
    assert "expected Inception" in says("fid", a, a, "--weights", world.FOLDER / "policy.pt")
    assert "there are clean and pytorch-fid" in says("fid", a, a, *weights, "--preprocess", "none")
    assert "--image-size -5: give the pixels" in says("fid", a, a, *weights, "--image-size", "-5")
    write_scorer(tmp_path / "scorer.safetensors", True, 64)
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    says_clip = lambda captions: says("clip", a, "--captions", captions, "--weights", tmp_path / "scorer.safetensors")
    assert "has 2 lines; expected a caption for each of the 7 pictures" in says_clip(tmp_path / "two.txt")
    (tmp_path / "some.json").write_text('{"0.png": "a dog"}')
    assert "has no entry" in says_clip(tmp_path / "some.json")
    (tmp_path / "lists.json").write_text(json.dumps({path.stem: ["a dog"] for path in metrics.list_pictures(a)}))
    assert "expected a caption for each" in says_clip(tmp_path / "lists.json")
    np.save(tmp_path / "codes.npy", np.array([[1, 16384]]))
    assert "from 0 to 16383" in says("shift", tmp_path / "codes.npy", tmp_path / "codes.npy")
    np.save(tmp_path / "float.npy", np.zeros(4))
    assert "expected a .npy of codes" in says("shift", tmp_path / "float.npy", tmp_path / "codes.npy")


@pytest.mark.parametrize("command, quick_gelu, width, prefix", [("clip", True, 64, "A photo depicts "), ("hpsv2", False, 80, "")])
def test_clip_commands_are_open_clip_on_the_files(two_folders, tmp_path, command, quick_gelu, width, prefix):
    """Else the published protocol is not the one measured: the caption's prefix, the resize, or a caption of another picture."""
    write_scorer(tmp_path / "scorer.pt", quick_gelu, width)
    paths = metrics.list_pictures(two_folders / "a")
    captions = [f"{i} dogs and a red bus" for i in range(len(paths))]
    (tmp_path / "lines.txt").write_text("\n".join(captions))
    names = [str(path.relative_to(two_folders / "a").with_suffix("")) for path in paths]
    (tmp_path / "names.json").write_text(json.dumps(dict(reversed(list(zip(names, captions))))))
    options = ["--weights", tmp_path / "scorer.pt", "--captions"]
    numbers, printed = measured(command, two_folders / "a", *options, tmp_path / "lines.txt")
    assert measured(command, two_folders / "a", *options, tmp_path / "names.json")[0] == numbers
    scorer = metrics.clip_from_entries(train.read_entries(tmp_path / "scorer.pt"), quick_gelu, width)
    prepare = metrics.open_clip.image_transform(scorer.model.visual.image_size, is_train=False)  # its mean and std
    with torch.no_grad():
        pictures = torch.stack([prepare(train.Image.open(path).convert("RGB")) for path in paths])
        text = scorer.model.encode_text(scorer.tokenize([prefix + caption for caption in captions]), normalize=True)
        expected = 100 * (scorer.model.encode_image(pictures, normalize=True) * text).sum(1).mean().item()
    assert next(iter(numbers.values())) == pytest.approx(expected, abs=1e-3)
    assert "7 pictures" in printed and "sha256" in printed


def test_shift_command_is_the_closed_form(tmp_path):
    """Else the paper's latent covariate shift is another number: every code once against one code only, smoothed by one."""
    np.save(tmp_path / "all.npy", np.arange(16, dtype=np.int16))
    np.save(tmp_path / "one.npy", np.zeros((2, 8), np.int64))
    numbers, _ = measured("shift", tmp_path / "all.npy", tmp_path / "one.npy", "--codes", 16)
    first, rest = 17 / 32, 1 / 32
    assert numbers["token KL"] == pytest.approx(sum(math.log(1 / 16 / q) / 16 for q in [first] + [rest] * 15), abs=1e-4)
    assert numbers["reverse KL"] == pytest.approx(sum(q * math.log(16 * q) for q in [first] + [rest] * 15), abs=1e-4)
    assert numbers["entropy"] == pytest.approx(4, abs=1e-4)


def test_shift_of_pictures_is_that_of_their_codes(tmp_path):
    """Else pictures are encoded in another size or order than the tokenizer was trained for."""
    pictures = world.draw(world.random_attributes(8, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1))
    vq = tokenizers.vq_from_entries(train.read_entries(world.FOLDER / "vq.pt"))
    for i, picture in enumerate(pictures):
        (tmp_path / f"{i % 2}").mkdir(exist_ok=True)
        train.to_picture(picture).save(tmp_path / f"{i % 2}" / f"{i}.png")
    numbers, _ = measured("shift", tmp_path / "0", tmp_path / "1", "--vq", world.FOLDER / "vq.pt", "--image-size", 32)
    saved = (pictures + 1).mul(127.5).round() / 127.5 - 1
    a, b = (metrics.token_histogram(vq.encode(saved[i::2]), vq.config.codes) for i in range(2))
    assert numbers["token KL"] == pytest.approx(metrics.token_kl(a, b), abs=1e-4)


# ---- sampling and scoring ----------------------------------------------------------------------------------------------


def test_sampled_and_scored_log_probabilities_agree(backbone):
    """Else π_old is not the policy that sampled: ratios start away from 1 and the gradient is that of another model. The
    captions differ in length, so a mask that differs between the two paths shows."""
    policy, features, mask = backbone
    noise = torch.rand(3, 2, 16, generator=torch.Generator().manual_seed(0))
    rows = lambda x: x.repeat_interleave(2, 0)
    for guidance, temperature in ((1.0, 1.0), (3.0, 0.7)):
        codes, sampled = policies.sample(policy, features, mask, noise, guidance, temperature)
        scored = policies.token_log_probs(policy, rows(features), rows(mask), codes.flatten(0, 1), guidance, temperature)
        torch.testing.assert_close(scored, sampled.flatten(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_cached_sampling_equals_recomputation(backbone, guidance):
    """Else a stale or misplaced cache entry changes tokens, which no loss would ever show."""
    policy, features, mask = backbone
    noise = torch.rand(3, 1, 16, generator=torch.Generator().manual_seed(1))
    fast, _ = policies.sample(policy, features, mask, noise, guidance, top_k=50)
    codes = torch.empty(3, 0, dtype=torch.long)
    with torch.no_grad():
        for n in range(16):
            logits = []
            for text in policy.cls_embedding(features, mask, guided=True).chunk(2):
                x = torch.cat([text, policy.tok_embeddings(codes)], 1)
                logits.append(policy.output(policy(x, policy.rotary(mask, n), policies.attention_mask(mask, n)))[:, -1])
            logits = logits[1] + guidance * (logits[0] - logits[1])
            kept = logits.argsort(1, descending=True)[:, :50]
            chances = torch.zeros_like(logits).scatter(1, kept, logits.gather(1, kept).softmax(1))
            drawn = [int((chance.cumsum(0) > u).nonzero()[0]) for chance, u in zip(chances, noise[:, 0, n])]
            codes = torch.cat([codes, torch.tensor(drawn)[:, None]], 1)
    assert torch.equal(fast[:, 0], codes)


def test_a_recorded_stretch_draws_the_same(backbone, monkeypatch):
    """Else a GPU, where a recorded step looks at all positions of its stretch, draws other tokens than a CPU: from what is not there yet."""
    noise = torch.rand(3, 2, 16, generator=torch.Generator().manual_seed(3))
    codes, log_probs = policies.sample(*backbone, noise, 2.0)

    def as_recorded(step, prefix, tokens, record, stretch=6):
        for n in range(tokens):
            step(prefix + min((n // stretch + 1) * stretch, tokens))

    monkeypatch.setattr(policies, "repeat", as_recorded)
    again, same = policies.sample(*backbone, noise, 2.0)
    assert torch.equal(codes, again)
    torch.testing.assert_close(log_probs, same, atol=1e-5, rtol=0)


def test_a_step_is_replayed_as_often_as_there_are_tokens(monkeypatch):
    """Else on a GPU a token is drawn twice or left out at a stretch's end, where no other test can look. The recorder is a stand-in."""
    ran, recording = [], []

    @contextlib.contextmanager
    def record(graph, **options):
        recording.append(graph)
        yield
        recording.pop()

    class Graph:
        def replay(self):
            ran.append(self.seen)

    def step(seen):
        if recording:
            recording[-1].seen = seen
        else:
            ran.append(seen)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    policies.repeat(step, 10, 7, True, stretch=3)
    assert ran == [13, 13, 13, 16, 16, 16, 17]
    ran.clear()
    policies.repeat(step, 10, 7, False, stretch=3)
    assert ran == list(range(11, 18))


def test_nothing_in_sampling_waits_for_the_device(backbone, monkeypatch):
    """Else every token stops the GPU, and a step cannot be recorded: tensors without contents refuse whatever needs to know them."""
    policy, features, mask = backbone
    monkeypatch.setattr(policies, "without_padding", lambda *both: both)  # once a call, before the first token
    with FakeTensorMode(allow_non_fake_inputs=True):
        codes, _ = policies.sample(policy, features, mask, torch.rand(3, 2, 16), 3.0, 1.0, 50)
        assert codes.shape == (3, 2, 16)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            codes.sum().item()  # as any such step would


def test_matrices_cast_once_are_those_autocast_casts(backbone, monkeypatch):
    """Else rollouts on a GPU come from another policy than the one that is trained."""
    noise = torch.rand(3, 2, 16, generator=torch.Generator().manual_seed(4))
    with torch.autocast("cpu", torch.bfloat16):
        copied = policies.in_autocasts_precision(backbone[0])
        linear = [module for module in copied.modules() if isinstance(module, torch.nn.Linear)]
        assert all(module.weight.dtype == torch.bfloat16 for module in linear) and copied.norm.weight is backbone[0].norm.weight
        once = policies.sample(*backbone, noise, 2.0)
        monkeypatch.setattr(policies, "in_autocasts_precision", lambda policy: policy)
        each = policies.sample(*backbone, noise, 2.0)
    assert torch.equal(once[0], each[0]) and torch.equal(once[1], each[1])
    assert all(module.weight.dtype == torch.float32 for module in backbone[0].modules() if isinstance(module, torch.nn.Linear))


@pytest.mark.parametrize("rows", [1, 2, 3, 64, 65])
def test_few_rows_are_multiplied_alike(rows):
    """Else guidance, which makes one row two, would change a linear layer, or its gradient."""
    torch.manual_seed(0)
    x, layer = torch.randn(rows, 1, 24, requires_grad=True), policies.Linear(24, 40)
    y, expected = layer(x), x @ layer.weight.T + layer.bias
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)
    for ours, plain in zip(*(torch.autograd.grad(out.square().sum(), [x, layer.weight, layer.bias]) for out in (y, expected))):
        torch.testing.assert_close(ours, plain, atol=1e-3, rtol=0)


def test_bench_prints_its_table(capsys, monkeypatch):
    """Else nobody can tell whether a change made sampling slower."""
    monkeypatch.setattr(
        sys, "argv", ["policy.py", "bench", "--model", "tiny", "--batch", "2", "--tokens", "3", "--device", "cpu"]
    )
    policies.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if line[:8].strip().isdigit()] == [["1", "no"], ["2", "yes"]]
    assert "times as many" in lines[-1] and "GB/s" in lines[1]


def test_a_row_does_not_depend_on_its_neighbours(backbone):
    """Else a caption's picture would change with the batch it is in, and no evaluation could be repeated."""
    policy, features, mask = backbone
    noise = torch.rand(3, 2, 16, generator=torch.Generator().manual_seed(2))
    together, _ = policies.sample(policy, features, mask, noise, 2.0)
    for row in range(3):
        alone, _ = policies.sample(policy, features[row : row + 1], mask[row : row + 1], noise[row : row + 1, 1:], 2.0)
        assert torch.equal(alone[0, 0], together[row, 1])


def test_padding_is_never_read(backbone):
    """Else the number of padded positions would speak in every caption's prediction."""
    policy, features, mask = backbone
    codes = reference("llamagen.tokens") % 128
    rubbish = features.where(mask.view(*mask.shape, *[1] * (features.dim() - 2)), 99)
    clean, dirty = (policies.token_log_probs(policy, f, mask, codes) for f in (features, rubbish))
    torch.testing.assert_close(clean, dirty, atol=1e-6, rtol=0)


def test_captions_are_padded_on_the_left():
    """Else a model trained with text in the last positions reads holes (the authors' scripts pad on the right)."""
    features, mask = policies.left_pad([torch.ones(2, 3), torch.ones(4, 3)], 4)
    assert mask.tolist() == [[False, False, True, True], [True] * 4]
    assert features[0, :, 0].tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="5 text features"):
        policies.left_pad([torch.ones(5, 3)], 4)


def test_draws_follow_the_distribution():
    """Else rollouts are biased samples of π_θ and the policy gradient is wrong in expectation."""
    chances = torch.tensor([0.0, 0.2, 0.5, 0.0, 0.3, 0.0])
    noise = (torch.arange(1000) + 0.5) / 1000
    codes = policies.draw_code(chances.log().expand(1000, -1), noise)
    assert torch.bincount(codes, minlength=6).tolist() == [0, 200, 500, 0, 300, 0]
    edges = policies.draw_code(chances.log().expand(2, -1), torch.tensor([0.0, 1 - 2**-24]))
    assert edges.tolist() == [1, 4]  # never a code of probability 0


# ---- the paper's equations ---------------------------------------------------------------------------------------------


def test_group_advantages():
    """Else the policy is pushed by a caption's difficulty, or by rounding noise where all its samples are equally good."""
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0 + 1e-5]])
    advantages = rankee.group_advantages(rewards)
    std = math.sqrt((4 + 1 + 0 + 9) / 3)
    torch.testing.assert_close(advantages[0], torch.tensor([-2.0, -1.0, 0.0, 3.0]) / std)
    assert advantages[1].tolist() == [0, 0, 0, 0]
    outlier = torch.zeros(1, 64).index_fill(1, torch.tensor([3]), 100.0)
    assert rankee.group_advantages(outlier).max() == 5


def test_policy_loss_is_the_clipped_surrogate():
    """Else updates are unbounded, or clipped on the wrong side of the sign of A."""
    log_probs = torch.tensor([[0.5, -0.5, 0.05], [0.5, -0.5, 0.05]])
    loss, clipped = rankee.policy_loss(log_probs, torch.zeros(2, 3), torch.tensor([[2.0], [-1.0]]), 0.2)
    terms = []
    for row, a in zip(log_probs.exp().tolist(), (2.0, -1.0)):
        terms += [min(ratio * a, min(max(ratio, 0.8), 1.2) * a) for ratio in row]
    assert loss.item() == pytest.approx(-sum(terms) / 6)
    assert clipped.item() == pytest.approx(4 / 6)


def test_kl_anchor():
    """Else a policy equal to its reference would be pulled somewhere."""
    x = torch.randn(2, 3, requires_grad=True)
    assert rankee.kl_anchor(x, x.detach()).item() == 0
    assert rankee.kl_anchor(torch.full((2, 3), 1.5), torch.ones(2, 3)).item() == pytest.approx(0.125)


def test_rank_weights():
    """Else the size of the GAN's gradient depends on rewards (mean ≠ 1), or worse samples weigh more than better ones."""
    rewards = torch.tensor([[20.0, 23.0, 21.0, 22.0], [30.0, 30.0, 10.0, 29.0]])
    weights = rankee.rank_weights(rewards, tau=2.0, keep=3)
    assert (weights > 0).sum(1).tolist() == [3, 3] and weights[0, 0] == 0 and weights[1, 2] == 0
    torch.testing.assert_close(weights.sum(1), torch.tensor([3.0, 3.0]))
    assert weights[0].argsort().tolist() == rewards[0].argsort().tolist()
    assert (weights[0, 1] / weights[0, 3]).item() == pytest.approx(math.exp(0.5))
    assert sorted(rankee.rank_weights(rewards[:1], 1.0, keep=1)[0].tolist()) == [0, 0, 0, 1]
    torch.testing.assert_close(rankee.rank_weights(rewards, 1e9, keep=4), torch.ones(2, 4))
    assert (rankee.rank_weights(rewards * 100, 1.0, keep=4) > 0).all()  # kept, though exp(−1000) is 0
    spread = rankee.rank_weights(rewards * 50 + 7, 1.0, keep=4, by="zscore")
    torch.testing.assert_close(spread, rankee.rank_weights(rewards, 1.0, keep=4, by="zscore"))


def test_adversarial_losses():
    """Else the discriminator or the decoder pulls the wrong way, or "uniform" and "rank" mean something else."""
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 1.0])
    assert rankee.discriminator_loss(real, True).item() == pytest.approx(0.5 * (0 + 0.5 + 2) / 3)
    assert rankee.discriminator_loss(fake, False).item() == pytest.approx(0.5 * (0 + 1 + 2) / 3)
    assert rankee.rank_gan_loss(fake, torch.tensor([0.5, 0.5, 2.0])).item() == pytest.approx(-(-1 + 0 + 2) / 3)
    assert rankee.reward_loss(real, torch.tensor([1.0, 1.0, 1.0])).item() == pytest.approx(-0.5)


def test_adaptive_weight_balances_gradients():
    """Else the GAN term drowns the reconstruction anchor, or does nothing."""
    layer = torch.tensor([3.0, 4.0], requires_grad=True)
    weight = rankee.adaptive_weight((layer * layer).sum(), 0.5 * layer.sum(), layer)
    assert weight.item() == pytest.approx(10 / (0.5 * math.sqrt(2) + 1e-4), rel=1e-5)
    assert rankee.adaptive_weight((1e9 * layer).sum(), layer.sum(), layer).item() == 1e4
    assert not weight.requires_grad


def test_tau_is_annealed_by_a_half_cosine():
    """Else soft ranking starts as best-of-G, or stays soft."""
    tau = lambda step: rankee.annealed_tau(step, 100, 4.0, 1.0, 0.2)
    assert (tau(0), tau(10), tau(20), tau(99)) == (4.0, pytest.approx(2.5), pytest.approx(1.0), 1.0)
    assert tau(5) == pytest.approx(1 + 3 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_ema():
    """Else "EMA decoder" is the online one, or never moves."""
    model, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for weight, value in ((model.weight, 1.0), (ema.weight, 0.0)):
        torch.nn.init.constant_(weight, value)
    for _ in range(3):
        rankee.ema_update(ema, model, 0.9)
    assert ema.weight.item() == pytest.approx(1 - 0.9**3)


def test_token_statistics():
    """Else the covariate shift is reported with the wrong sign, base or smoothing."""
    p = metrics.token_histogram(torch.tensor([[0, 0], [0, 1]]), 4)
    assert p.tolist() == [4 / 8, 2 / 8, 1 / 8, 1 / 8]
    q = torch.full((4,), 0.25, dtype=torch.float64)
    assert metrics.token_entropy(p) == pytest.approx(1.75)
    assert metrics.token_kl(p, q) == pytest.approx((2 - 1.75) * math.log(2))
    assert metrics.token_kl(p, p) == 0


# ---- the two stages ----------------------------------------------------------------------------------------------------

TINY = train.parse_settings(["--captions", "2", "--rollouts", "4", "--real-images", "4", "--micro-batch", "3", "--rounds", "10"])


@pytest.fixture(scope="module")
def base():
    policy = policies.policy_from_entries(train.read_entries(world.FOLDER / "policy.pt"), 8, world.HEAD_SIZE)
    vq = tokenizers.vq_from_entries(train.read_entries(world.FOLDER / "vq.pt"))
    judges = train.read_checkpoint(world.FOLDER / "judges.pt")
    return policy, vq, world.Scenes(judges, replaced(samples=256), policy.config, vq, "cpu")


def players(base, settings, scorer=None):
    policy, vq, scenes = copy.deepcopy(base[0]), copy.deepcopy(base[1]), base[2]
    return rankee.Players(
        policy, vq, copy.deepcopy(scenes.discriminator), scorer or scenes.scorer, scenes.perceptual, settings, OFF
    )


def play(base, settings, rounds=1, scorer=None, p=None):
    """Players after some rounds, with the last round's log and rollouts."""
    p, generator = p or players(base, settings, scorer), torch.Generator().manual_seed(3)
    for step in range(rounds):
        captions, features, mask, images = base[2].batch(generator)
        noise = torch.rand(2, settings.rollouts, 64, generator=generator)
        log, r = rankee.one_round(p, settings, step, captions[:2], features[:2], mask[:2], images, noise)
    return p, log, r, images


def changed(before, after):
    return {name for name, value in before.state_dict().items() if not torch.equal(value, after.state_dict()[name])}


def replaced(**changes):
    return train.dataclasses.replace(TINY, **changes)


def test_stage_1_moves_the_policy_alone(base):
    """Else "standard RL" is not the frozen-decoder arm that RankE is compared with."""
    p, *_ = play(base, replaced(arm="policy", warmup=0))
    assert changed(base[0], p.policy) and changed(base[0], p.policy_ema)
    assert not changed(base[1], p.vq) and not changed(base[1], p.vq_ema) and not changed(base[2].discriminator, p.discriminator)


def test_stage_2_moves_the_decoder_alone(base):
    """Else tokens change their meaning under the policy: encoder and codebook define them."""
    p, *_ = play(base, replaced(arm="decoder"))
    moved = changed(base[1], p.vq)
    assert moved == {name for name in base[1].state_dict() if name.startswith(("decoder.", "post_quant_conv."))}
    assert changed(base[1], p.vq_ema) and changed(base[2].discriminator, p.discriminator)
    assert not changed(base[0], p.policy) and not changed(base[0], p.policy_ema)


def test_gan_start_holds_the_verdict_back(base):
    """Else a discriminator that knows nothing yet steers the decoder for its first rounds."""
    quiet = replaced(arm="decoder", gan_start=5, lambda_d=0.0, lambda_c=0.0, lambda_r=0.0, lambda_g=1.0, weight_decay=0.0)
    p, log, *_ = play(base, quiet)
    assert "rank_gan" not in log and log["decoder_grad"] == 0 and not changed(base[1], p.vq)
    assert changed(base[2].discriminator, p.discriminator)
    assert changed(base[1], play(base, replaced(**{**vars(quiet), "gan_start": 0}))[0].vq)


def test_reward_reaches_the_decoders_last_layer(base):
    """Else the reward term of stage 2 is a constant (as through a PIL image), and λ_d changes nothing. The encoder and codebook
    get no gradient."""
    p, _, r, _ = play(base, TINY)
    rankee.reward_loss(p.scorer(p.vq.decode(r.codes), r.text), torch.ones(len(r.codes))).backward()
    assert p.vq.decoder.conv_out.weight.grad.abs().max() > 0
    assert all(w.grad is None for module in (p.vq.encoder, p.vq.quant_conv, p.vq.quantize) for w in module.parameters())


class Brightness(torch.nn.Module):
    """A reward with a known direction: a picture's mean red, ×100."""

    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def embed_text(self, captions):
        return torch.zeros(len(captions), 1)

    def forward(self, images, text):
        return self.slope * 100 * images[:, 0].mean((1, 2))


def test_equal_rewards_do_not_move_the_policy(base):
    """Else the ranking term has a direction of its own."""
    p, log, *_ = play(base, replaced(arm="policy", beta=0.0, weight_decay=0.0, warmup=0), scorer=Brightness(0.0))
    assert log["policy_grad"] == 0 and not changed(base[0], p.policy)


@pytest.mark.parametrize("slope", [1.0, -1.0])
def test_stage_2_follows_preferences_and_its_anchor_pulls_back(base, slope):
    """Else the decoder co-evolves with something other than the reward, or without limit."""

    def red(lambda_c):
        s = replaced(arm="decoder", gan="none", gan_weight=0.0, lambda_r=0.0, lambda_d=0.05, lambda_c=lambda_c, ema_decoder=1.0)
        p, _, r, _ = play(base, s, rounds=6, scorer=Brightness(slope))
        return (p.vq.decode(r.codes) - base[1].decode(r.codes))[:, 0].mean().item() * slope

    free, anchored = red(0.0), red(50.0)
    assert free > 0.02 and anchored < 0.5 * free


def test_rank_gan_favours_preferred_samples(base):
    """Else Rank-GAN and the uniform GAN are one, and the ablation shows nothing."""
    grads = {}
    for gan in ("rank", "uniform", "none"):
        s = replaced(arm="decoder", gan=gan, lambda_d=0.0, lambda_c=0.0, lambda_r=0.0, clip_grad=1e9, keep=2, tau_start=0.5)
        log = play(base, s)[1]
        grads[gan] = log["decoder_grad"]
    assert grads["none"] == 0 and grads["rank"] > 0 and abs(grads["rank"] - grads["uniform"]) > 1e-6


def test_micro_batches_change_memory_not_gradients(base):
    """Else an accumulated gradient misses a scale, and results depend on the GPU's size. Plain gradient descent shows it; Adam
    would hide a scale. The reconstruction term is left out: its adaptive GAN weight is a micro-batch's own."""
    gradients = {}
    for size in (3, 8):
        settings = replaced(micro_batch=size, lambda_r=0.0, clip_grad=1e9)
        p = players(base, settings)
        p.policy_optimizer = torch.optim.SGD(p.policy.parameters(), lr=1.0)
        p.decoder_optimizer = torch.optim.SGD(p.vq.moving_parameters(), lr=1.0)
        log = play(base, settings, p=p)[1]
        before = [*base[0].parameters(), *base[1].moving_parameters()]
        after = [*p.policy.parameters(), *p.vq.moving_parameters()]
        gradients[size] = log, [x.detach() - y.detach() for x, y in zip(before, after)]
    (log_a, a), (log_b, b) = gradients.values()
    assert log_a == pytest.approx(log_b, rel=1e-3, abs=1e-5)
    for x, y in zip(a, b):
        assert (x - y).norm() <= 1e-3 * y.norm() + 1e-5


def test_score_gap_is_zero_only_for_what_was_sampled(base):
    """Else the log hides that guided samples are scored by the unguided policy."""
    assert abs(play(base, replaced(score_guided=True, top_k=0))[1]["score_gap"]) < 1e-5
    assert abs(play(base, replaced(score_guided=False))[1]["score_gap"]) > 1e-3


def test_an_update_that_is_not_finite_is_not_made(base):
    """Else NaN spreads into every weight and the run ends days later with nothing. The discriminator has a finite one."""
    p, log, *_ = play(base, replaced(warmup=0), scorer=Brightness(float("nan")))
    assert math.isnan(log["reward"]) and math.isnan(log["policy_grad"]) and math.isnan(log["decoder_grad"])
    assert not changed(base[0], p.policy) and not changed(base[1], p.vq) and changed(base[2].discriminator, p.discriminator)
    assert not p.policy_optimizer.state and all(w.grad is None for w in p.policy.parameters())


def half_a_round(rank, folder, processes):
    """What one of `processes` does of a round of 4 captions, with plain gradient descent: Adam would blow rounding up."""
    torch.set_num_threads(1)
    if processes > 1:
        rankee.dist.init_process_group("gloo", f"file://{folder}/meeting", world_size=processes, rank=rank)
    policy = policies.policy_from_entries(train.read_entries(world.FOLDER / "policy.pt"), 8, world.HEAD_SIZE)
    vq = tokenizers.vq_from_entries(train.read_entries(world.FOLDER / "vq.pt"))
    s = replaced(captions=4, real_images=0, micro_batch=2, samples=8, gan_start=0, clip_grad=0.1)
    scenes = world.Scenes(train.read_checkpoint(world.FOLDER / "judges.pt"), s, policy.config, vq, "cpu")
    p = rankee.Players(policy, vq, scenes.discriminator, scenes.scorer, scenes.perceptual, s, OFF)
    p.policy_optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    p.decoder_optimizer = torch.optim.SGD(vq.moving_parameters(), lr=1.0)
    p.discriminator_optimizer = torch.optim.SGD(p.discriminator.parameters(), lr=1.0)
    generator = torch.Generator().manual_seed(3)
    own = slice(rank * 4 // processes, (rank + 1) * 4 // processes)
    captions, features, mask, images = (x[own] for x in scenes.batch(generator))
    noise = torch.rand(4, 4, 64, generator=generator)[own]
    log, _ = rankee.one_round(p, s, 20, captions, features, mask, images, noise)
    weights = [x.detach() for part in (policy, vq, p.discriminator) for x in part.parameters()]
    torch.save((weights, log["policy_grad"], log["decoder_grad"]), Path(folder) / f"{processes}-{rank}.pt")


def test_two_processes_make_one_update(tmp_path):
    """Else more GPUs train another model: 2 processes × 2 captions equal 1 process × 4 captions, in all three networks."""
    half_a_round(0, tmp_path, 1)
    torch.multiprocessing.spawn(half_a_round, (tmp_path, 2), nprocs=2)
    one, *two = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert one[1] > 0.1 and one[2] > 0.1  # both are clipped, which they would be otherwise before the average
    for other in two:
        assert other[1:] == pytest.approx(one[1:], rel=1e-4)
        for x, y in zip(one[0], other[0], strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=0)


# ---- the embedded world ------------------------------------------------------------------------------------------------


def test_scenes_show_their_captions(base):
    """Else rewards, accuracy and pictures speak of different things: the shipped judges read what `draw` draws."""
    _, vq, scenes = base
    attributes, captions = scenes.attributes, scenes.captions
    images = world.draw(attributes, torch.Generator().manual_seed(4))
    measured = scenes.measure(vq.encode(images), images)
    assert measured["accuracy"] > 0.95 and measured["token_kl"] < 0.1
    other_colours = scenes.measure(vq.encode(images), images.flip(1))
    assert other_colours["accuracy"] < 0.9 and other_colours["frechet"] > 3 * measured["frechet"]
    right, wrong = (scenes.scorer(images, scenes.scorer.embed_text(c)).mean() for c in (captions, captions[::-1]))
    assert right > wrong + 30
    assert captions[0] == world.caption(attributes[0]) and len(captions[0].split()) == 8


def test_reward_reads_every_word(base):
    """Else reinforcement learning cannot mend what the reward does not see; position was invisible to a plain small CLIP."""
    scenes = base[2]
    attributes, captions, images = scenes.attributes, scenes.captions, scenes.real
    right = scenes.scorer(images, scenes.scorer.embed_text(captions))
    cost = {}
    for i, name in enumerate(world.ATTRIBUTES):
        other = attributes.clone()
        other[:, i] = (other[:, i] + 1) % world.COUNTS[i]
        cost[name] = (
            (right - scenes.scorer(images, scenes.scorer.embed_text([world.caption(row) for row in other]))).mean().item()
        )
    assert min(cost["vertical"], cost["horizontal"]) > 0.25 * cost["colour"]
    assert min(cost.values()) > 2


# ---- the command -------------------------------------------------------------------------------------------------------

SMALL = ["--rounds", "2", "--captions", "2", "--rollouts", "2", "--real-images", "2", "--samples", "32", "--device", "cpu"]


def command(*arguments):
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    return subprocess.run(
        [sys.executable, HERE / "train.py", *map(str, arguments)], capture_output=True, text=True, env=environment
    )


def finished(*arguments):
    done = command(*arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "a"
    return out, finished(*SMALL, "--out", out).stdout


def test_a_run_leaves_what_it_promises(small_run):
    """Else a user waits for results that are not there."""
    out, printed = small_run
    rows = json.loads((out / "results.json").read_text())
    assert [(row["arm"], row["seed"], row["round"]) for row in rows] == [("base", 0, 0), ("RankE", 0, 2)]
    assert all(math.isfinite(row[name]) for row in rows for name in ("clip", "frechet", "accuracy", "token_kl", "token_entropy"))
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["round"] for line in log] == [1, 2]
    for name in ("reward", "reward_spread", "kl", "clip_fraction", "policy_grad", "decoder_grad", "discriminator", "seconds"):
        assert name in log[0], name
    assert printed.count("\nround ") + printed.startswith("round ") == 2 and "frechet" in printed
    assert train.Image.open(out / "pictures-000002.png").size == (190 + 4 * 100, 24 + 8 * 100)  # 8 captions, 4 columns


def test_one_seed_one_result(small_run, tmp_path):
    """Else no figure in the README can be reproduced."""
    out, _ = small_run
    finished(*SMALL, "--out", tmp_path / "again")
    finished(*SMALL, "--out", tmp_path / "other", "--seed", "1")
    results = [(folder / "results.json").read_text() for folder in (out, tmp_path / "again", tmp_path / "other")]
    assert results[0] == results[1]
    assert [row["clip"] for row in json.loads(results[0])] != [row["clip"] for row in json.loads(results[2])]


def write_miniature(folder):
    """A policy and a tokenizer in the public files' layout, with what LlamaGen leaves in them; widths cut."""
    vq = tokenizers.VQModel(tokenizers.VQConfig(multipliers=(1, 1, 1, 1, 1), blocks=2, latent=32, codes=64))
    config = policies.PolicyConfig(dim=128, layers=2, head_size=64, hidden=256, codes=64, prefix=12, caption_dim=48, grid=2)
    policy = policies.Policy(config).initialize(torch.Generator().manual_seed(0))
    entries = {"module." + name: value for name, value in policy.state_dict().items()}
    entries |= {"module.freqs_cis": torch.zeros(16, 32, 2)}
    training = {"optimizer": {"state": {}}, "steps": 7, "args": argparse.Namespace(lr=1.0)}
    torch.save({"model": entries} | training, folder / "policy.pt")
    torch.save({"model": vq.state_dict()}, folder / "vq_ds16_t2i.pt")
    return policy, vq


def write_scorer(path, quick_gelu, head_width):
    """An open_clip ViT whose shapes are cut; half precision under state_dict as HPSv2's, or a bare .safetensors."""
    torch.manual_seed(0)
    vision = world.CLIPVisionCfg(layers=2, width=2 * head_width, head_width=head_width, patch_size=14, image_size=28)
    model = world.CLIP(32, vision, world.CLIPTextCfg(layers=1, width=64, heads=1), quick_gelu)
    entries = model.state_dict()
    if path.suffix == ".safetensors":
        metrics.safetensors.torch.save_file(entries, path)
    else:
        torch.save({"epoch": 1, "state_dict": {name: value.half() for name, value in entries.items()}}, path)
    return model.eval()


CAPTIONS = ["a red bus", "two cats, asleep", "a boat on a lake", "an old clock"]


def write_pairs(folder):
    """Four images of different shapes, with captions, and what a download leaves: an unreadable image and one without a text."""
    folder.mkdir()
    for i, caption in enumerate(CAPTIONS):
        pixels = np.random.default_rng(i).integers(0, 256, (40 + 8 * i, 60, 3), dtype=np.uint8)
        train.Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    (folder / "broken.jpg").write_bytes((folder / "0.png").read_bytes()[:900])
    (folder / "broken.txt").write_text("half a picture")
    (folder / "mute.png").write_bytes((folder / "0.png").read_bytes())


def write_features(folder, names, width=48):
    """Text features as LlamaGen's extraction tool writes them."""
    for name in names:
        path = folder / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        np.save(path, rng.standard_normal((1, 1 + len(name) % 5, width), dtype=np.float32))


@pytest.fixture(scope="module")
def public_files(tmp_path_factory):
    """Every public file beside a policy, in its true layout, shapes cut where they are free; and pairs with their features."""
    folder = tmp_path_factory.mktemp("public")
    write_miniature(folder)
    write_scorer(folder / "open_clip_model.safetensors", True, 64)
    write_scorer(folder / "HPS_v2.1_compressed.pt", False, 80)
    vgg = {name: 0.05 * torch.randn(shape) for name, shape in MANIFESTS["vgg16-397923af.pth (features only)"].items()}
    vgg |= {"classifier.0.weight": torch.zeros(2, 2)}  # the file has a classifier; nothing here needs it
    torch.save(vgg, folder / "vgg16-397923af.pth", _use_new_zipfile_serialization=False)
    linear = {name: value.abs() for name, value in fill(MANIFESTS["vgg_lpips.pth (linear layers)"]).items()}
    torch.save(linear, folder / "vgg.pth", _use_new_zipfile_serialization=False)
    write_pairs(folder / "pairs")
    write_features(folder / "t5", ["0", "1", "2", "3", "broken"])
    return folder


def public_run(folder, *more):
    data = ["--data", folder / "pairs", "--t5-features", folder / "t5", "--image-size", 32]
    return ["--ckpt", folder / "policy.pt", *data, *SMALL[:-4], "--gan-start", 0, "--device", "cpu", *more]


@pytest.mark.parametrize("reward", ["clip", "hpsv2"])
def test_public_files_are_post_trained_and_come_back(public_files, tmp_path, reward):
    """Else `--ckpt` is a code path and not a run: miniatures of every public file go through the command, and what is saved
    loads strictly, by the public names, with encoder and codebook untouched, and paints the run's own picture."""
    out = tmp_path / "run"
    printed = finished(*public_run(public_files, "--reward", reward, "--out", out))
    assert "skipped mute: no caption" in printed.stderr and printed.stderr.count("skipped broken: ") <= 1
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(log) == 2 and all(math.isfinite(value) for line in log for value in line.values())
    assert log[0]["decoder_reward"] != 0 and log[0]["reward_spread"] > 0

    before = policies.policy_from_entries(train.read_entries(public_files / "policy.pt"), 2)
    after = policies.policy_from_entries(train.read_entries(out / "policy.pt"), 2)
    assert set(train.read_entries(out / "policy.pt")) == set(before.state_dict()) and changed(before, after)
    entries = {name: train.read_entries(path) for name, path in (("was", public_files / "vq_ds16_t2i.pt"), ("is", out / "vq.pt"))}
    assert set(entries["was"]) == set(entries["is"])  # codebook_used too: LlamaGen's sampler loads strictly
    was, now, ema = (tokenizers.vq_from_entries(e) for e in (*entries.values(), train.read_entries(out / "vq_ema.pt")))
    assert {name.split(".")[0] for name in changed(was, now)} == {"decoder", "post_quant_conv"}

    # The last column of the run's picture, from the saved files alone.
    s = train.parse_settings([str(x) for x in public_run(public_files)])
    features_of = functools.partial(train.saved_features, public_files / "t5", 12)
    stream = train.Pairs(train.list_pairs(s.data)[0], features_of, 32, 0)
    captions, features, _ = zip(*(stream[i][0] for i in range(8)))
    noise = torch.rand(8, 1, 4, generator=torch.Generator().manual_seed(10**6))
    codes, _ = policies.sample(after, *policies.left_pad(features, 12), noise, s.guidance, 1.0, s.top_k)
    with torch.no_grad():
        images = ema.decode(codes[:, 0])
    train.save_grid(tmp_path / "grid.png", {name: images for name in ("real", "before", "frozen decoder", "RankE")}, captions)
    saved, again = (
        np.asarray(train.Image.open(path))[24:, 190 + 3 * 100 :] for path in (out / "pictures-000002.png", tmp_path / "grid.png")
    )
    assert np.abs(saved.astype(int) - again).max() <= 1

    if reward == "clip":  # once is enough
        finished(
            "--ckpt", out / "policy.pt", "--data", "scenes", "--image-size", 32, *SMALL, "--out", tmp_path / "on"
        )  # a run's files are a base


def write_janus(folder, weights="pytorch_model.bin"):
    """Janus-Pro's folder with every kind of entry, in bfloat16 as the public one; widths cut. A tokenizer trained on a few words."""
    tokenizers_package = pytest.importorskip("tokenizers")
    meta = META["janus"]
    folder.mkdir()
    torch.manual_seed(0)
    vq = tokenizers.VQModel(tokenizers.VQConfig(multipliers=(1, 1, 1, 1, 1), blocks=2, latent=32, codes=128))
    shapes = {name: shape for name, shape in meta["shapes"].items() if not name.startswith("gen_vision_model.")}
    shapes = {n: [400 if size == 100 else size for size in shape] for n, shape in shapes.items()}  # a vocabulary of bytes
    entries = fill(shapes, meta["scale"]) | {f"gen_vision_model.{name}": value for name, value in vq.state_dict().items()}
    entries |= {"vision_model.vision_tower.pos_embed": torch.randn(1, 4, 8), "aligner.layers.0.weight": torch.randn(8, 8)}
    entries = {name: value.bfloat16().contiguous() for name, value in entries.items()}
    if weights == "pytorch_model.bin":
        torch.save(entries, folder / weights)
    else:  # shards with an index
        places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(entries)}
        for file in set(places.values()):
            metrics.safetensors.torch.save_file({name: entries[name] for name in places if places[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(
        json.dumps({"language_config": {"num_attention_heads": 4}, "model_type": "multi_modality"})
    )
    special = ["<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>", "<begin_of_image>", "<|User|>", "<|Assistant|>"]
    tokenizer = tokenizers_package.Tokenizer(tokenizers_package.models.BPE())
    tokenizer.pre_tokenizer = tokenizers_package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers_package.decoders.ByteLevel()
    alphabet = tokenizers_package.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers_package.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return entries


def test_janus_is_post_trained_and_comes_back(public_files, tmp_path, capsys, monkeypatch):
    """Else the paper's second backbone is a code path and not a run: a miniature of its folder goes through the command, and what is
    saved is a folder in the same layout, every entry that was not trained as it was, from which --sample paints."""
    pytest.importorskip("transformers")
    was, out = write_janus(public_files / "Janus-Pro-1B"), tmp_path / "run"
    data = ["--data", public_files / "pairs", "--image-size", 32, *SMALL[:-4], "--gan-start", 0, "--device", "cpu"]
    finished("--ckpt", public_files / "Janus-Pro-1B", *data, "--out", out)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(log) == 2 and all(math.isfinite(value) for line in log for value in line.values()) and log[0]["reward_spread"] > 0
    settings = json.loads((out / "settings.json").read_text())
    assert [settings[name] for name in ("guidance", "top_k", "lr_policy", "lambda_d", "lambda_c")] == [5.0, 0, 1e-4, 0.05, 5.0]

    now = train.read_entries(out / "policy")
    assert set(now) == set(was) and (out / "policy_ema" / "tokenizer.json").exists()
    moved = {name for name in now if not torch.equal(now[name], was[name])}
    kept = ("vision_model.", "aligner.", "language_model.lm_head.", "language_model.model.embed_tokens.")
    kept += ("gen_vision_model.encoder.", "gen_vision_model.quant")
    assert moved and not any(name.startswith(kept) for name in moved)
    assert all(now[name].dtype == torch.bfloat16 for name in set(now) - moved)
    assert any("self_attn" in name for name in moved) and any("gen_vision_model.decoder" in name for name in moved)
    state = train.read_checkpoint(out / "state-000002.pt")
    s = train.parse_settings([str(x) for x in ("--ckpt", out, "--image-size", 32, "--device", "cpu")])
    assert s.ckpt == str(out / "policy")
    policy, vq, *_ = train.load_pair(s)
    for module, saved in ((policy, state["policy"]), (vq, state["vq_ema"])):
        assert all(torch.equal(value, saved[name]) for name, value in module.state_dict().items())

    arguments = ["--ckpt", out, "--image-size", 32, "--device", "cpu", "--sample", "a red bus", "--out", tmp_path / "seen"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    train.main()
    capsys.readouterr()
    assert (tmp_path / "seen" / "00000 a red bus.png").exists()
    assert "t5: is LlamaGen's" in refused(capsys, monkeypatch, *arguments, "--t5", tmp_path)
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    assert "pip install transformers, which reads Janus-Pro's tokenizer" in refused(capsys, monkeypatch, *arguments)


def test_janus_folders_that_cannot_be_used(tmp_path, capsys, monkeypatch):
    """Else a half-downloaded or foreign folder is post-trained, or fails with a page of PyTorch's own words. Shards are one whole."""
    pytest.importorskip("transformers")
    entries, shards = write_janus(tmp_path / "one"), tmp_path / "shards"
    write_janus(shards, "shards")
    a, b = (metrics.read_entries(folder) for folder in (tmp_path / "one", shards))
    assert set(a) == set(b) == set(entries) and all(torch.equal(a[name], b[name]) for name in a)
    says = lambda: refused(
        capsys, monkeypatch, "--ckpt", tmp_path / "one", "--sample", "a", "--out", tmp_path / "x", "--device", "cpu"
    )
    save = lambda content: torch.save(content, tmp_path / "one" / "pytorch_model.bin")
    save(entries | {"language_model.model.layers.0.self_attn.q_norm.weight": torch.zeros(16)})
    assert "language_model.model.layers.0.self_attn.q_norm.weight" in says()
    save({name: value for name, value in entries.items() if "layers.1.self_attn.k_proj" not in name})
    assert "has no entry 'language_model.model.layers.1.self_attn.k_proj.weight'" in says()
    save(entries)
    tokenizer = (tmp_path / "one" / "tokenizer.json").read_text()
    (tmp_path / "one" / "tokenizer.json").write_text(tokenizer.replace("<｜▁pad▁｜>", "<pad>"))
    assert "has no entry '<｜▁pad▁｜>'" in says()
    (tmp_path / "one" / "tokenizer.json").unlink()
    assert "tokenizer.json" in says()
    weights = ["--sample", "a", "--device", "cpu"]
    part = tmp_path / "one" / "pytorch_model.bin"
    assert "name the folder" in refused(capsys, monkeypatch, "--ckpt", part, *weights)
    (tmp_path / "half").mkdir()
    assert "neither a run's folder nor Janus-Pro's" in refused(capsys, monkeypatch, "--ckpt", tmp_path / "half", *weights)
    config = tmp_path / "one" / "config.json"
    sizes = json.loads(config.read_text())
    (tmp_path / "one" / "tokenizer.json").write_text(tokenizer)
    config.write_text(json.dumps({"language_config": sizes["language_config"] | {"rope_theta": 5e5}}))
    assert "another rotary embedding" in says()
    config.write_text(json.dumps(sizes))
    (tmp_path / "one" / "pytorch_model.bin").unlink()
    assert "without model.safetensors or pytorch_model.bin" in says()
    next(shards.glob("model-00002*")).unlink()
    assert "model-00002-of-00002.safetensors: no such file" in refused(
        capsys, monkeypatch, "--ckpt", shards, "--sample", "a", "--device", "cpu"
    )


def test_janus_prompts(tmp_path):
    """Else Janus reads another prompt than it was trained on, and a caption as long as a page ends a run for want of memory."""
    transformers = pytest.importorskip("transformers")
    write_janus(tmp_path / "janus")
    prompts = policies.JanusPrompts(tmp_path / "janus")
    words = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "janus" / "tokenizer.json"))
    assert words.decode(prompts("a red bus")) == "<｜begin▁of▁sentence｜><|User|>: a red bus\n\n<|Assistant|>:<begin_of_image>"
    long = prompts("bus " * 1000)
    assert len(long) == 512 and words.decode(long).endswith("bus\n\n<|Assistant|>:<begin_of_image>")
    assert pickle.loads(pickle.dumps(prompts))("a")[0] == prompts.begin  # loader workers get a copy


def test_what_is_missing_is_said_at_once(tmp_path, capsys, monkeypatch):
    """Else a user downloads the files one by one, a failed start at a time."""
    arguments = ["--ckpt", tmp_path / "x.pt", "--vgg", "nowhere.pth", "--out", tmp_path / "run"]
    text = refused(capsys, monkeypatch, *arguments, lines=8)
    assert not (tmp_path / "run").exists()
    for option, file in {"ckpt": "t2i_XL_stage1_256.pt", "vq": "vq_ds16_t2i.pt", "t5": "flan-t5-xl", "data": "captions"}.items():
        assert any(f"--{option} " in line and file in line for line in text.splitlines()), option
    for word in (
        "--reward-weights   open_clip_model",
        "--vgg              nowhere.pth: no such file",
        "--lpips",
        "huggingface.co",
        "pytorch.org",
    ):
        assert word in text, word
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    assert "pip install transformers" in refused(capsys, monkeypatch, *arguments, lines=9)
    write_miniature(tmp_path)  # not the embedded world's, so it is not measured on that
    text = refused(capsys, monkeypatch, "--evaluate", tmp_path / "policy.pt", "--out", tmp_path / "run", lines=6)
    assert "--inception " in text and "--data " in text
    assert "--ckpt " in refused(capsys, monkeypatch, "--data", tmp_path, "--out", tmp_path / "run", lines=8)


def test_scorers_are_open_clips_own(tmp_path):
    """Else the reward is not CLIP's or HPSv2's: activation, head width or preprocessing differ, and no error says so."""
    image = torch.rand(2, 3, 40, 40) * 2 - 1
    for file, options in (("clip.safetensors", (True, 64)), ("hps.pt", (False, 80))):
        model = write_scorer(tmp_path / file, *options)
        scorer = metrics.clip_from_entries(train.read_entries(tmp_path / file), *options)
        tokens = metrics.open_clip.get_tokenizer("ViT-H-14")(CAPTIONS[:2])
        pixels = torch.nn.functional.interpolate((image + 1) / 2, (28, 28), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (
            torch.tensor(x).view(3, 1, 1) for x in (metrics.open_clip.OPENAI_DATASET_MEAN, metrics.open_clip.OPENAI_DATASET_STD)
        )
        with torch.no_grad():
            picture, text = model.encode_image((pixels - mean) / std), model.encode_text(tokens)
        expected = 100 * torch.cosine_similarity(picture, text)
        torch.testing.assert_close(
            scorer(image, scorer.embed_text(CAPTIONS[:2])), expected, atol=0.2 if "hps" in file else 1e-4, rtol=0
        )


@pytest.mark.parametrize("options", [(True, 64), (False, 80)])
def test_public_rewards_reach_the_decoder_alone(llamagen, llamagen_vq, tmp_path, options):
    """Else λ_d moves nothing with a real reward, or moves what defines the tokens."""
    write_scorer(tmp_path / "scorer.safetensors", *options)
    scorer = metrics.clip_from_entries(train.read_entries(tmp_path / "scorer.safetensors"), *options)
    vq = rankee.Players(llamagen[0], copy.deepcopy(llamagen_vq), torch.nn.Linear(1, 1), scorer, None, TINY, None).vq
    scorer(vq.decode(reference("vq.codes")), scorer.embed_text(CAPTIONS[:2])).sum().backward()
    assert vq.decoder.conv_out.weight.grad.abs().max() > 0
    assert all(w.grad is None or not w.grad.any() for part in (vq.encoder, vq.quant_conv, vq.quantize) for w in part.parameters())


def test_recomputed_and_chunked_passes_change_memory_not_gradients(llamagen):
    """Else gradient checkpointing trains another model."""
    policy, features, mask = llamagen
    results = []
    for recompute, chunk in ((False, 16), (True, 16), (True, 5), (False, 7)):
        policy.zero_grad()
        scored = policies.token_log_probs(policy, features, mask, reference("llamagen.tokens"), 3.0, 0.9, recompute, chunk)
        scored.square().sum().backward()
        results.append([scored.detach(), *(w.grad.clone() for w in policy.parameters())])
    policy.zero_grad()
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            torch.testing.assert_close(x, y, atol=1e-5 * max(1, x.abs().max().item()), rtol=1e-5)


def test_recomputing_keeps_less(llamagen):
    """Else the option that fits XL into a GPU does nothing."""
    policy, features, mask = llamagen

    def kept(recompute):
        sizes = {}
        note = lambda x: sizes.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            loss = policies.token_log_probs(policy, features, mask, reference("llamagen.tokens"), recompute=recompute).sum()
        weights = {w.untyped_storage().data_ptr() for w in policy.parameters()}
        return sum(size for at, size in sizes.items() if at not in weights), loss

    assert kept(True)[0] < 0.3 * kept(False)[0]


# ---- data --------------------------------------------------------------------------------------------------------------


def four_layouts(folder):
    """The same four pairs as a folder, COCO's files, LlamaGen's list and a tar: source → names of the pairs."""
    write_pairs(folder / "pairs")
    (folder / "annotations").mkdir()
    images = [{"id": 10 + i, "file_name": f"{i}.png"} for i in range(4)]
    notes = [{"id": 20 + i, "image_id": 10 + i, "caption": caption} for i, caption in enumerate(CAPTIONS)]
    coco = folder / "annotations" / "captions_pairs.json"  # COCO's own places: annotations/captions_val2014.json and val2014/
    coco.write_text(json.dumps({"images": images, "annotations": notes}))
    lines = [{"image_path": f"pairs/{i}.png", "text": [caption, "a longer one"]} for i, caption in enumerate(CAPTIONS)]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(folder / "shards" / f"{shard}.tar", "w") as tar:
            for i in (2 * shard, 2 * shard + 1):
                tar.add(folder / "pairs" / f"{i}.txt", f"{i}.txt")
                tar.add(folder / "pairs" / f"{i}.png", f"{i}.png")
    return {
        folder / "pairs": ["0", "1", "2", "3"],
        coco: ["20", "21", "22", "23"],
        folder / "list.jsonl": [f"list/{i}" for i in range(4)],
        folder / "shards": ["0/0", "0/1", "1/2", "1/3"],
    }


def test_every_data_layout_gives_the_same_pairs(tmp_path):
    """Else a picture is trained on under another picture's caption, stretched, or in another range."""
    for source, names in four_layouts(tmp_path).items():
        pairs, _ = train.list_pairs(source)
        pairs = [pair for pair in pairs if pair[0] != "broken"]
        assert [(name, caption) for name, _, caption in pairs] == list(zip(names, CAPTIONS)), source
        write_features(tmp_path / "t5", names)
        stream = train.Pairs(pairs, functools.partial(train.saved_features, tmp_path / "t5", 12), 32, 0)
        for i, pair in enumerate(pairs):
            caption, features, image = stream.read(*pair)
            pixels = train.Image.open(tmp_path / "pairs" / f"{i}.png")
            side = min(pixels.size)
            left, top = (pixels.width - side) / 2, (pixels.height - side) / 2
            square = pixels.resize((32, 32), train.Image.Resampling.LANCZOS, (left, top, left + side, top + side))
            expected = torch.from_numpy(np.array(square)).permute(2, 0, 1) / 127.5 - 1
            torch.testing.assert_close(image, expected)
            assert caption == CAPTIONS[i] and features.shape == (1 + len(pair[0]) % 5, 48)


def test_a_caption_may_hold_any_separator(tmp_path):
    """Else one web caption with U+2028 in it moves all after it to another picture, or refuses a list of millions."""
    captions = ["a red\u2028bus", "two\x85cats"]
    lines = [json.dumps({"image_path": f"{i}.png", "text": text}, ensure_ascii=False) for i, text in enumerate(captions)]
    (tmp_path / "list.jsonl").write_text("\n".join([lines[0], "", lines[1], ""]), "utf-8")
    assert [(name, text) for name, _, text in train.list_pairs(tmp_path / "list.jsonl")[0]] == [
        ("list/0", captions[0]),
        ("list/2", captions[1]),
    ]
    (tmp_path / "captions.txt").write_text("\n".join(captions) + "\n", "utf-8")
    assert metrics.read_captions(tmp_path / "captions.txt", tmp_path, ["0.png", "1.png"]) == captions
    assert train.read_prompts(train.parse_settings(["--prompts", str(tmp_path / "captions.txt")]))[0] == captions


def test_data_order_is_a_function_of_seed_and_position(tmp_path):
    """Else a resumed run trains on other pictures, an epoch leaves some out, or two seeds are one."""
    write_pairs(tmp_path / "pairs")
    write_features(tmp_path / "t5", ["0", "1", "2", "3", "broken"])
    pairs, skipped = train.list_pairs(tmp_path / "pairs")
    assert skipped == ["mute: no caption, or not in UTF-8"]
    features_of = functools.partial(train.saved_features, tmp_path / "t5", 12)
    stream = lambda seed: train.Pairs(pairs, features_of, 32, seed)
    readable = train.Pairs([pair for pair in pairs if pair[0] != "broken"], features_of, 32, 0)
    names = [readable[i][0][0] for i in range(12)]
    assert all(sorted(names[i : i + 4]) == sorted(CAPTIONS) for i in (0, 4, 8)) and names[:4] != names[4:8]
    assert [stream(0)[i][0][0] for i in (7, 3, 11)] == [[stream(0)[i][0][0] for i in range(12)][i] for i in (7, 3, 11)]
    assert [stream(0)[i][0][0] for i in range(20)] != [stream(1)[i][0][0] for i in range(20)]
    items = [stream(0)[i] for i in range(5)]  # one epoch: the unreadable one is named once and never seen
    assert sum("broken" in line for _, skipped in items for line in skipped) == 1 and all(item for item, _ in items)


def test_data_that_cannot_be_used(public_files, capsys, monkeypatch, tmp_path):
    """Else a run starts on nothing, on half of a shard, or on another caption's features."""
    four_layouts(tmp_path)
    shard = tmp_path / "shards" / "0.tar"
    shard.write_bytes(shard.read_bytes()[:-9000])
    (tmp_path / "empty").mkdir()
    (tmp_path / "silent").mkdir()
    for name, text in (("a", b""), ("b", b"caf\xe9"), ("c", b" \n")):
        shutil.copy(tmp_path / "pairs" / "0.png", tmp_path / "silent" / f"{name}.png")
        (tmp_path / "silent" / f"{name}.txt").write_bytes(text)
    (tmp_path / "bad.json").write_text("[1, 2]")
    (tmp_path / "latin.jsonl").write_bytes(b'{"image_path": "a.png", "text": "caf\xe9"}')
    (tmp_path / "note.txt").write_text("")
    for name, says in {
        "shards": "0.tar: ", "empty": "no image with a caption", "silent": "no image with a caption", "bad.json": "expected a file that is whole",
        "latin.jsonl": "expected a file that is whole", "note.txt": "not a data source", "nowhere": "no such file",
    }.items():  # fmt: skip
        line = refused(capsys, monkeypatch, *public_run(public_files, "--out", tmp_path / "run", "--data", tmp_path / name))
        assert says in line, line
        assert not (tmp_path / "run").exists()
    line = refused(capsys, monkeypatch, *public_run(public_files, "--out", tmp_path / "run", "--image-size", 40))
    assert "--image-size 40 is no multiple of the tokenizer's factor 16" in line
    write_features(tmp_path / "narrow", ["0", "1", "2", "3", "broken"], width=40)
    line = refused(
        capsys, monkeypatch, *public_run(public_files, "--t5-features", tmp_path / "narrow", "--out", tmp_path / "run")
    )
    assert "text features 40 wide; the policy takes 48" in line
    (tmp_path / "narrow" / "captions.json").write_text(json.dumps({"1": "three dogs"}))
    line = refused(
        capsys, monkeypatch, *public_run(public_files, "--t5-features", tmp_path / "narrow", "--out", tmp_path / "run")
    )
    assert "the features of 1 are of another caption" in line


# ---- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "caption, cleaned",
    [
        ("  A man's dog — “happy”, and wet...  ", 'a man\'s dog - "happy", and wet'),
        ("red,green and blue.A dog (small) runs", "red, green and blue. a dog small runs"),
        ("a 4-year-old, black-and-white dog-like thing", "a 4 year old, black and white dog like thing"),
        ("'quoted caption'", "quoted caption"),
        ("salt &amp; pepper; 50% off,", "salt pepper; 50% off"),
        ("two  cats\nand a+b", "two cats and a b"),
    ],
)
def test_captions_are_cleaned_as_llamagens_were(caption, cleaned):
    """Else the text encoder reads other tokens than in the policy's own training. Expected values: LlamaGen's cleaning, by hand run."""
    assert policies.clean_caption(caption) == cleaned


@pytest.fixture(scope="module")
def small_t5(tmp_path_factory):
    """A T5 encoder with random weights and a real tokenizer.json of the captions' words."""
    transformers = pytest.importorskip(
        "transformers", reason="the text encoder runs through transformers, which is not installed"
    )
    import tokenizers as tokenizers_library
    from tokenizers import models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("t5") / "flan-t5-xl"
    words = ["<pad>", "</s>", "<unk>", *sorted({word for text in CAPTIONS for word in text.replace(",", " ,").split()})]
    tokenizer = tokenizers_library.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(words), d_model=48, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    transformers.T5EncoderModel(config).save_pretrained(folder)
    return folder


def test_text_features_do_not_depend_on_the_batch(small_t5):
    """Else a caption's features change with its neighbours' lengths. A caption of n words has n + 1 tokens, </s> the last."""
    together = list(policies.t5_features(small_t5, CAPTIONS, 12, "cpu", OFF, batch=4))
    alone = list(policies.t5_features(small_t5, CAPTIONS, 12, "cpu", OFF, batch=1))
    assert [len(rows) for rows in together] == [4, 5, 6, 4] and together[0].shape[1] == 48
    for x, y in zip(together, alone):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=0)
    assert len(next(policies.t5_features(small_t5, ["a " * 50], 12, "cpu", OFF))) == 12


def test_text_features_are_computed_once_and_kept(public_files, small_t5, tmp_path):
    """Else every start waits for the text encoder, or a picture of --sample is made for no caption at all."""
    write_pairs(tmp_path / "pairs")
    arguments = public_run(public_files, "--t5", small_t5, "--data", tmp_path / "pairs", "--t5-features", tmp_path / "made")
    finished(*arguments, "--rounds", 1, "--arm", "policy", "--out", tmp_path / "a")
    kept = {path.name: np.load(path) for path in (tmp_path / "made").glob("*.npy")}
    assert set(kept) == {"0.npy", "1.npy", "2.npy", "3.npy", "broken.npy"} and kept["1.npy"].shape == (1, 5, 48)
    settings = train.parse_settings([str(x) for x in [*arguments, "--t5", "gone"]])
    config = policies.policy_from_entries(train.read_entries(public_files / "policy.pt"), 2).config
    pairs, _ = train.list_pairs(settings.data)
    assert train.complete_features(settings, pairs, config, "cpu", OFF) == tmp_path / "made"  # no encoder is looked for
    with pytest.raises(train.BadInput, match="--t5 .*gone: no such file"):
        train.complete_features(settings, [("new", None, "a new one"), *pairs], config, "cpu", OFF)
    files = [
        "--ckpt",
        public_files / "policy.pt",
        "--t5",
        small_t5,
        "--image-size",
        32,
        "--device",
        "cpu",
        "--out",
        tmp_path / "seen",
    ]
    finished(*files, "--sample", "a red bus", "an old clock")
    pictures = sorted((tmp_path / "seen").glob("*.png"))
    assert [path.name for path in pictures] == ["00000 a red bus.png", "00001 an old clock.png"]
    first, second = (np.asarray(train.Image.open(path)) for path in pictures)
    assert first.shape == (32, 32, 3) and (first != second).any()


def test_evaluation_is_what_the_metrics_say_of_its_pictures(public_files, two_folders, tmp_path, capsys, monkeypatch):
    """Else the table is of other pictures than those in the folder, or an interrupted evaluation ends with another number."""
    write_pairs(tmp_path / "pairs")
    notes = [{"id": i, "image_id": i % 4, "caption": f"{CAPTIONS[i % 4]} {i}"} for i in range(6)]
    notes.append({"id": 6, "image_id": 0, "caption": " "})
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(4)]
    (tmp_path / "pairs" / "captions_val.json").write_text(json.dumps({"images": images, "annotations": notes}))
    write_features(tmp_path / "t5", [str(i) for i in range(6)])
    write_scorer(tmp_path / "b32.safetensors", True, 64)
    out = tmp_path / "seen"
    arguments = [
        "--evaluate",
        public_files / "policy.pt",
        "--vq",
        public_files / "vq_ds16_t2i.pt",
        "--image-size",
        32,
        "--count",
        3,
    ]
    arguments += ["--data", tmp_path / "pairs" / "captions_val.json", "--t5-features", tmp_path / "t5", "--device", "cpu"]
    arguments += [
        "--clip-b32",
        tmp_path / "b32.safetensors",
        "--inception",
        two_folders / "inception.pth",
        "--out",
        out,
        "--workers",
        0,
    ]
    done = finished(*arguments)
    printed = done.stdout
    assert "skipped 6: no caption" in done.stderr and "(1 so far)" in done.stderr  # said and counted, not drawn
    table = printed.replace("token KL", "shift").replace("reverse KL", "reverse").strip().split("\n")
    names, values = (line.split() for line in table[:2])
    samples = sorted((out / "samples").glob("*.png"))
    assert len(samples) == 3 and len(list((out / "real").glob("*.png"))) == 3
    captions = json.loads((out / "captions.json").read_text())
    assert len({int(name) % 4 for name in captions}) == 3  # three images, not three captions of one
    options = {"workers": 0, "device": "cpu"}
    expected = {
        "CLIP": metrics.clip(out / "samples", captions=out / "captions.json", weights=tmp_path / "b32.safetensors", **options),
        "shift": metrics.shift(out / "samples", out / "real", codes=64, **options),
    }
    for name, (numbers, _) in expected.items():
        assert float(values[names.index(name)]) == pytest.approx(next(iter(numbers.values())), abs=2e-3)
    assert printed.count("middle squares at 32 px, Lanczos") == 2  # as FID is published, at 256 px at most
    assert "3 pictures" in printed and "guidance 6.0" in printed and "Lanczos" in printed and printed.count("sha256") == 4

    # What is there stays, what lacks comes back as it was; other settings do not mix with it.
    pixels = lambda: np.asarray(train.Image.open(samples[1])).astype(int)
    was = pixels()
    samples[1].unlink()
    times = samples[0].stat().st_mtime_ns, (out / "real" / samples[0].name).stat().st_mtime_ns
    monkeypatch.setattr(train.metrics, "fid", lambda *_, **__: ({"FID": 0.0}, []))  # seconds of eigenvalues, measured above
    train.evaluate(train.parse_settings([str(x) for x in arguments]))
    assert np.abs(pixels() - was).max() <= 1  # a smaller batch may round otherwise
    assert times == (samples[0].stat().st_mtime_ns, (out / "real" / samples[0].name).stat().st_mtime_ns)
    capsys.readouterr()
    assert "drawn with --guidance 6.0" in refused(capsys, monkeypatch, *arguments, "--guidance", 2)
    assert "drawn with --count 3" in refused(capsys, monkeypatch, *arguments, "--count", 2)
    with pytest.raises(train.BadInput, match="drawn with --ckpt policy.pt sha256"):  # the file's contents, not its name
        monkeypatch.setattr(train.metrics, "file_hash", lambda file: "other")
        train.claim_pictures(train.parse_settings([str(x) for x in arguments]))


def test_a_run_on_scenes_is_evaluated_as_it_measured_itself(small_run, tmp_path):
    """Else `--evaluate` takes another decoder than the run's own: the EMA, with the policy beside it."""
    out, _ = small_run
    row = json.loads((out / "results.json").read_text())[-1]
    printed = finished("--evaluate", out, "--samples", 32, "--device", "cpu", "--out", tmp_path).stdout
    names, values = (line.split() for line in printed.strip().split("\n")[:2])
    assert {name: float(value) for name, value in zip(names[1:], values[1:])} == {name: round(row[name], 3) for name in names[1:]}
    assert "own feature net" in printed


def test_prompts_are_drawn_in_genevals_layout(tmp_path):
    """Else its evaluator finds no picture: DIR/00000/metadata.jsonl, the prompt's own line, and samples/0000.png to 0003.png."""
    captions = ["large red plain circle middle center on white", "small blue plain ring top left on black"]
    lines = [json.dumps({"tag": "single_object", "prompt": caption}) for caption in captions]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    out = tmp_path / "geneval"
    finished("--prompts", tmp_path / "prompts.jsonl", "--layout", "geneval", "--out", out, "--device", "cpu")
    assert [(out / f"{i:05d}" / "metadata.jsonl").read_text() for i in range(2)] == lines
    pictures = [(out / f"{i:05d}" / "samples" / f"{k:04d}.png").read_bytes() for i in range(2) for k in range(4)]
    assert len(set(pictures)) == 8
    ground = [np.asarray(train.Image.open(out / f"{i:05d}" / "samples" / "0000.png"))[-3, -3].mean() for i in range(2)]
    assert ground[0] > 150 > 100 > ground[1]


def test_sample_draws_scenes(tmp_path, capsys, monkeypatch):
    """Else nobody can ask the embedded world for one picture."""
    caption = "large red plain circle middle center on white"
    done = finished("--sample", caption, "--out", tmp_path, "--device", "cpu")
    picture = np.asarray(train.Image.open(done.stdout.strip()))
    assert picture.shape == (32, 32, 3) and picture[2, 2].min() > 180  # white ground
    for text in ("a bus", "", caption + " on white"):
        assert f"--sample {text!r}: the embedded" in refused(capsys, monkeypatch, "--sample", text, "--out", tmp_path)


class Bomb:
    def __reduce__(self):
        return print, ("this pickle ran code",)


def refused(capsys, monkeypatch, *arguments, lines=1):
    """What the command prints when it refuses, one line unless it lists files."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and len(err.strip().splitlines()) == lines and out == "", (out, err)
    return err


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--gudance", "3"], "unknown option --gudance; the nearest is --guidance"),
        (["--keep", "9"], "--keep 9 keeps more than the 8 rollouts"),
        (["--guidance", "0.5"], "--guidance 0.5 is not possible; it must be at least 1"),
        (["--beta1-decoder", "1"], "--beta1-decoder 1.0 is not possible; it must be from 0 to 0.9999"),
        (["--seed", "99999999999999"], "--seed 99999999999999 is not possible"),
        (["--out", __file__], "cannot be used (File exists)"),
        (["--lr-policy", "nan"], "--lr-policy nan is not possible"),
        (["--rollouts", "1"], "--rollouts 1 is not possible; it must be at least 2"),
        (["--gan", "ranked"], "argument --gan: invalid choice: 'ranked'"),
        (["--rounds", "many"], "argument --rounds: invalid int value: 'many'"),
        (["--vq", "vq.pt"], "--vq without --ckpt"),
        (["--evaluate", "a.pt", "--ckpt", "b.pt"], "--evaluate and --ckpt both name a checkpoint"),
        (["--reward", "hpsv2"], "--reward: the embedded world has its own"),
        (["--image-size", "64"], "--image-size 64: the embedded world's pictures have 32 pixels"),
    ],
)
def test_settings_that_cannot_be_meant(capsys, monkeypatch, tmp_path, arguments, says):
    """Else a typing mistake costs a night: it is ignored, or found after the model is loaded."""
    assert says in refused(capsys, monkeypatch, "--device", "cpu", "--out", tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


def test_files_that_cannot_be_used(capsys, monkeypatch, tmp_path):
    """Else training starts from random weights, from another model's, or from somebody's code."""
    write_miniature(tmp_path)
    good_policy, good_vq = tmp_path / "policy.pt", tmp_path / "vq_ds16_t2i.pt"
    entries = train.read_entries(good_policy)
    bad = {
        "truncated.pt": good_policy.read_bytes()[:-2000],
        "empty.pt": b"",
        "noise.pt": b")}.noise",
        "bomb.pt": pickle.dumps(Bomb()),
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({name: value for name, value in entries.items() if name != "norm.weight"}, tmp_path / "missing.pt")
    torch.save(entries | {"extra.weight": torch.zeros(1)}, tmp_path / "surplus.pt")
    torch.save(entries | {"norm.weight": torch.zeros(127)}, tmp_path / "shape.pt")
    torch.save(entries | {"output.weight": torch.zeros(65, 128)}, tmp_path / "codes.pt")
    torch.save(entries | {"norm.weight": torch.full((128,), torch.nan)}, tmp_path / "nan.pt")
    expected = {
        "nowhere.pt": "no such file", "folder": "policy.pt: no such file", "list.pt": "holds no state dict",
        "truncated.pt": "expected an undamaged checkpoint", "empty.pt": "expected an undamaged checkpoint",
        "noise.pt": "expected an undamaged checkpoint", "bomb.pt": "Weights only load failed",
        "vq_ds16_t2i.pt": "has no entry 'tok_embeddings.weight'", "nan.pt": "norm.weight holds numbers that are not finite",
        "missing.pt": "norm.weight", "surplus.pt": "extra.weight", "shape.pt": "norm.weight", "codes.pt": "output.weight",
    }  # fmt: skip
    run = ["--data", "scenes", "--image-size", 32, "--out", tmp_path / "run"]
    for name, says in expected.items():
        line = refused(capsys, monkeypatch, "--ckpt", tmp_path / name, "--vq", good_vq, *run)
        assert says in line and str(tmp_path / name) in line, line
        assert not (tmp_path / "run").exists()
    assert "has no entry" in refused(capsys, monkeypatch, "--ckpt", good_policy, "--vq", good_policy, *run)
    assert "a folder without model.safetensors" in refused(
        capsys, monkeypatch, "--ckpt", good_policy, "--vq", tmp_path / "folder", *run
    )


def test_a_run_is_not_overwritten(small_run, capsys, monkeypatch):
    """Else the second command of the day deletes the result of the first, or two runs mix in one folder."""
    out, _ = small_run
    before = (out / "results.json").read_bytes()
    assert "holds a run already" in refused(capsys, monkeypatch, *SMALL, "--out", out)
    assert (out / "results.json").read_bytes() == before
    with pytest.raises(train.BadInput, match="File exists"):
        train.make_folder(out, "log.jsonl")  # the other one came between the check and the claim


# ---- runs that survive -------------------------------------------------------------------------------------------------

LONG = [
    "--rounds",
    "6",
    "--save-every",
    "2",
    "--captions",
    "2",
    "--rollouts",
    "2",
    "--real-images",
    "2",
    "--samples",
    "8",
    "--device",
    "cpu",
]


def altered(change, *arguments, launcher=()):
    """The command with some code run before it, in a process of its own."""
    code = f"import os, signal, sys, time\nimport torch\nimport metrics, rankee, train\n{change}\nsys.argv[0] = 'train.py'\ntrain.main()"
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    if launcher:
        script = Path(arguments[-1]).parent / "altered.py"
        script.write_text(code)
    run = [*launcher, script] if launcher else [sys.executable, "-c", code]
    return subprocess.Popen(
        [str(x) for x in (*run, *arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_run(a, b):
    """Weights, EMA, moments, settings, rounds, log and results, bit for bit; only the folder's name and the seconds may differ."""
    x, y = (torch.load(out / "state-000006.pt") for out in (a, b))
    x["settings"]["out"] = y["settings"]["out"]
    assert same(x, y)
    logs = [[json.loads(line) | {"seconds": 0} for line in (out / "log.jsonl").read_text().splitlines()] for out in (a, b)]
    assert logs[0] == logs[1] and len(logs[0]) == 6
    for name in ("results.json", "pictures-000006.png"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    for name in train.NETWORKS:
        assert same(train.read_entries(a / f"{name}.pt"), train.read_entries(b / f"{name}.pt"))
    assert not [path for path in b.iterdir() if path.name.startswith(".")]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    finished(*LONG, "--out", out)
    return out


KILLS = {
    # in the fourth round, after the policy moved and before the decoder did
    "round": """
stage = rankee.decoder_stage
rankee.decoder_stage = lambda p, m, r, step, x: os.kill(os.getpid(), 9) if step == 3 else stage(p, m, r, step, x)""",
    # with half of the second checkpoint on the disk
    "write": """
write = torch.save
def half(value, path):
    write(value, path)
    if "state-000004" in str(path):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), 9)
torch.save = half""",
    # with the last checkpoint in place and one of the four networks written
    "exports": """
rename, done = os.replace, []
def few(a, b):
    rename(a, b)
    done.append(str(b))
    if sum("state" in name for name in done) == 3 and done[-1].endswith("policy.pt"):
        os.kill(os.getpid(), 9)
os.replace = few""",
}


@pytest.mark.parametrize("where, left", [("round", 2), ("write", 2), ("exports", 6)])
def test_a_killed_run_goes_on_bit_for_bit(whole_run, tmp_path, where, left):
    """Else a night's crash costs the run, or the resumed one is another run and nobody notices."""
    out = tmp_path / "run"
    killed = altered(KILLS[where], *LONG, "--out", out)
    killed.communicate()
    assert killed.returncode == -9
    assert max(out.glob("state-*.pt")).name == f"state-{left:06d}.pt"
    finished(*LONG, "--out", out, "--resume")
    assert_same_run(whole_run, out)


def test_a_killed_run_on_data_goes_on_with_the_next_pictures(public_files, tmp_path):
    """Else a resumed run sees the first pictures twice and the last ones never."""
    arguments = [*public_run(public_files), "--rounds", "4", "--save-every", "2", "--workers", "1", "--out"]
    finished(*arguments, tmp_path / "whole")
    killed = altered(KILLS["round"], *arguments, tmp_path / "run")
    killed.communicate()
    assert killed.returncode == -9
    finished(*arguments, tmp_path / "run", "--resume")
    x, y = (torch.load(tmp_path / name / "state-000004.pt") for name in ("whole", "run"))
    x["settings"]["out"] = y["settings"]["out"]
    assert same(x, y)


def test_a_damaged_checkpoint_leaves_the_one_before(whole_run, tmp_path, capsys, monkeypatch):
    """Else one bad block ends the run; and settings that changed would go unseen."""
    out = tmp_path / "run"
    shutil.copytree(whole_run, out)
    assert sorted(path.name for path in out.glob("state-*")) == ["state-000004.pt", "state-000006.pt"]
    os.truncate(out / "state-000006.pt", 5000)
    done = finished(*LONG[:-2], "--device", "cpu", "--out", out, "--resume", "--changed")  # another --out than it was made with
    assert "state-000006.pt: " in done.stderr and "the one before it is used" in done.stderr
    assert_same_run(whole_run, out)
    line = refused(capsys, monkeypatch, *LONG, "--out", out, "--resume", "--beta", "0.1", "--keep", "1")
    assert "was made with --beta 0.05, --keep 0; give that again" in line
    for path in out.glob("state-*"):
        os.truncate(path, 5000)
    log = (out / "log.jsonl").read_bytes()
    text = refused(capsys, monkeypatch, *LONG, "--out", out, "--resume", lines=2)
    assert "there is no other in" in text and (out / "log.jsonl").read_bytes() == log


def test_changed_rates_reach_the_optimizers(monkeypatch):
    """Else `--resume --changed --lr-decoder` goes on at the old rate, and settings.json says the new one."""
    m = train.parse_settings(["--lr-decoder", "0.5", "--weight-decay", "0.25"])

    def players(m):
        p = rankee.Players(*(torch.nn.Linear(2, 2) for _ in range(5)), m, None)
        p.policy(torch.ones(2)).sum().backward()
        p.policy_optimizer.step()
        return p

    monkeypatch.setattr(torch.nn.Linear, "moving_parameters", torch.nn.Linear.parameters, raising=False)
    before, after = players(train.parse_settings([])), players(m)
    train.load_state(after, {name: getattr(before, name).state_dict() for name in train.STATE})
    (group,) = after.decoder_optimizer.param_groups
    assert group["lr"] == 0.5 and group["weight_decay"] == 0.25
    assert same(after.policy.state_dict(), before.policy.state_dict())
    assert same(after.policy_optimizer.state_dict()["state"], before.policy_optimizer.state_dict()["state"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_round_and_saves(tmp_path, number):
    """Else Ctrl-C, or a cluster's notice, costs everything since the last checkpoint."""
    out = tmp_path / "run"
    process = altered("", *LONG, "--rounds", "2000", "--save-every", "9000", "--out", out)
    while not (out / "log.jsonl").exists() or not (out / "log.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    rounds = len((out / "log.jsonl").read_text().splitlines())
    assert process.returncode == 128 + number and f"stopped after round {rounds}" in printed
    assert torch.load(out / f"state-{rounds:06d}.pt")["round"] == rounds


def test_a_second_interrupt_stops_at_once(tmp_path):
    """Else a run that hangs in its round can only be killed by its number."""
    slow = "train.one_round = lambda *a: (print('here', flush=True), time.sleep(60))"
    process = altered(slow, *LONG, "--out", tmp_path / "run")
    while process.stdout.readline() != "here\n":
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == -signal.SIGINT


def test_numbers_that_stay_wrong_end_the_run(tmp_path):
    """Else it burns a week on a reward model that overflowed. What it says is the term, and what it leaves is finite."""
    out = tmp_path / "run"
    broken = """
one_round, score = train.one_round, metrics.CLIPScore.forward
def overflow(p, m, step, *more):
    metrics.CLIPScore.forward = lambda *a: score(*a) * (float("nan") if step in (1, 3, 4, 5) else 1)
    return one_round(p, m, step, *more)
train.one_round = overflow"""
    process = altered(broken, *LONG, "--patience", "3", "--out", out)
    printed, errors = process.communicate()
    assert process.returncode == 1 and "Traceback" not in errors
    assert (
        "round 6: reward" in errors
        and "not finite, 3 times in a row" in errors
        and "NO UPDATE (1 in a row): reward" in printed
        and "NO UPDATE (2 in a row): reward" in printed
    )
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["reward"] is None for line in log] == [False, True, False, True, True]
    state = train.read_checkpoint(out / "state-000004.pt")
    assert all(value.isfinite().all() for name in train.NETWORKS for value in state[name].values())


def test_a_full_disk_leaves_what_was_saved(whole_run, tmp_path):
    """Else the save that fails takes the checkpoint before it along."""
    out = tmp_path / "run"
    shutil.copytree(whole_run, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    full = "import resource\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))"
    process = altered(full, *LONG, "--rounds", "8", "--resume", "--changed", "--out", out)
    _, errors = process.communicate()
    assert process.returncode == 1 and "state-000008.pt: cannot be written" in errors and "Traceback" not in errors
    assert all((out / name).read_bytes() == content for name, content in before.items() if name.endswith((".pt", ".png")))
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc_per_node=2",
    "--master_port=0",
    "--rdzv-backend=c10d",
    "--rdzv-endpoint=localhost:0",
]


def test_a_process_that_dies_ends_the_others(tmp_path):
    """Else a dead GPU leaves the others waiting, and paid for, until somebody looks. Until then both wrote one run."""
    out = tmp_path / "run"
    dies = """
stage = rankee.decoder_stage
def decoder_stage(p, m, r, step, x):
    if step == 4 and os.environ["RANK"] == "1":
        os._exit(3)
    if step == 4:
        print("died", time.time(), flush=True)
    return stage(p, m, r, step, x)
rankee.decoder_stage = decoder_stage"""
    process = altered(dies, *LONG, "--out", out, launcher=TORCHRUN)
    printed, errors = process.communicate(timeout=200)
    assert process.returncode != 0 and time.time() - float(printed.split("died ")[1].split()[0]) < 60, errors
    assert [json.loads(line)["round"] for line in (out / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert torch.load(out / "state-000004.pt")["round"] == 4 and not list(out.glob(".*"))


# ---- all arms beside each other ----------------------------------------------------------------------------------------


def test_a_comparison_survives_a_stop_and_adds_up(tmp_path, monkeypatch):
    """Else an hour of runs is lost to one signal, or the table mixes up arms: a policy with its own decoder must measure in the
    swap matrix what its run measured, and the arm that moves no decoder must equal the base's."""
    pytest.importorskip("matplotlib", reason="the figures need it")
    monkeypatch.setenv(
        "OMP_NUM_THREADS", "1"
    )  # as the runs have; two threads round otherwise, and draw another code now and then
    out = tmp_path / "compare"
    arguments = [*SMALL, "--compare", "--rounds", 1, "--seed", 3, "--out", out]
    first = subprocess.Popen([sys.executable, HERE / "train.py", *map(str, arguments)], stdout=-3, stderr=-3, cwd=HERE)
    while not list(out.glob("seed-3/*/log.jsonl")):
        assert first.poll() is None
        time.sleep(0.1)
    first.terminate()
    assert first.wait(60) == 128 + signal.SIGTERM and not (out / "pareto.png").exists()
    printed = finished(*arguments, "--resume").stdout

    rows = json.loads((out / "results.json").read_text())
    runs, swaps = [row for row in rows if "arm" in row], [row for row in rows if "decoder" in row]
    assert [(row["arm"], row["seed"], row["round"]) for row in runs] == [("base", 3, 0), *((arm, 3, 1) for arm in train.ARMS)]
    assert len(swaps) == 4 * 5
    base = [path.parent.name for path in out.glob("seed-3/*/results.json") if json.loads(path.read_text())[0]["round"] == 0]
    assert base == ["RankE"]  # the same in every arm: measured once
    numbers = lambda row: pytest.approx({name: row[name] for name in ("clip", "frechet", "accuracy", "token_kl")}, rel=1e-3)
    own = {row["arm"]: row for row in runs}
    for row in swaps:
        if row["policy"] == row["decoder"] or (row["policy"], row["decoder"]) == ("standard RL", "base"):
            assert {name: row[name] for name in ("clip", "frechet", "accuracy", "token_kl")} == numbers(own[row["policy"]])
    assert "minus standard RL" in printed and printed.count("RankE ") == 3
    for name in ("pareto.png", "swap.png"):
        assert train.Image.open(out / name).size[0] > 400


def test_differences_have_standard_errors(capsys):
    """Else the spread between seeds passes for the error of the mean."""
    rows = [{"arm": arm, "seed": n, "round": 1, "clip": 70.0} for n in (1, 2, 3) for arm in ("base", *train.ARMS)]
    for row, value in zip((row for row in rows if row["arm"] == "RankE"), (71.0, 72.0, 76.0)):
        row["clip"] = value
    train.print_comparison(rows)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line.startswith("RankE")] == ["RankE 73.000 ± 2.646", *["RankE 3.000 ± 1.528"] * 2]


def test_arms_differ_by_what_their_names_say():
    """Else two rows of the table are one experiment: each arm's options must be known and change what they claim."""
    base = vars(train.parse_settings([]))
    settings = {arm: vars(train.parse_settings(options.split())) for arm, options in train.ARMS.items()}
    changed = {arm: {name: s[name] for name in s if s[name] != base[name]} for arm, s in settings.items()}
    assert (
        changed["RankE"] == {} and changed["standard RL"] == {"arm": "policy"} and changed["decoder only"] == {"arm": "decoder"}
    )
    assert changed["uniform GAN"] == {"gan": "uniform"}
    assert changed["real images"] == {"arm": "decoder", "lambda_d": 0, "lambda_c": 0, "gan": "none", "fakes": "reconstruction"}
