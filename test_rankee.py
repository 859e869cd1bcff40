"""Each test names what would be wrong in the world if it failed. `pytest` runs all in minutes on two cores.

testdata/reference.npz holds outputs of the public programs (LlamaGen, its VQ tokenizer, Janus, pytorch-fid,
clean-fid, LPIPS) on weights that are a function of their names, so that no weights need to be stored;
testdata/manifests.json the names and shapes of public checkpoints; testdata/release_step.npz one step of the
authors' own trainers.
"""

import argparse
import ast
import contextlib
import copy
import ctypes
import hashlib
import http.server
import json
import math
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # tests fork, which CUDA does not survive: experiments/README.md

import huggingface_hub
import numpy as np
import open_clip
import pytest
import safetensors.torch
import scipy.linalg
import tokenizers
import torch
import torch.distributed.run
import transformers
from PIL import Image, ImageOps
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import Normalize

import metrics
import policy as policies
import public.world
import rankee
import train
import vq as vqs
from experiments import compare
from files.disk import InputError
from files.log import log_step
from files.images import load_image, to_pixels
from files.weights import load, load_state_dict
from policy import Sampling
from public import data, janus, llamagen
from scenes import world as scenes

HERE = Path(__file__).parent
REFERENCE = np.load(HERE / "testdata" / "reference.npz")
META = json.loads(str(REFERENCE["meta"]))
MANIFESTS = json.loads((HERE / "testdata" / "manifests.json").read_text())
CAPTIONS = ["a red bus", "two cats, asleep", "a boat on a lake", "an old clock"]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def reference(name):
    return torch.from_numpy(REFERENCE[name])


def close(value, expected, atol=1e-4, rtol=0):
    torch.testing.assert_close(value, expected, atol=atol, rtol=rtol)


def fill(shapes, scale=None, prefix=""):
    """Entries by name, as the reference values were computed with: a random stream seeded by prefix and name."""
    entries = {}
    for name, shape in shapes.items():
        x = np.random.default_rng(zlib.crc32((prefix + name).encode())).standard_normal(shape, dtype=np.float32)
        if len(shape) > 1:
            x = x * np.sqrt((2 if len(shape) == 4 else 1) / np.prod(shape[1:]), dtype=np.float32)
        else:
            factor = {"weight": 0.1, "running_var": 0.1}.get(name.rsplit(".", 1)[1], 0.02)
            x = (factor == 0.1) + factor * (np.abs(x) if name.endswith("running_var") else x)
        entries[name] = torch.from_numpy(np.asarray(x, np.float32)) * (scale or {}).get(name, 1.0)
    return entries


def filled(name):
    return fill(META[name]["shapes"], META[name].get("scale"))


def load_llamagen(entries, grid_size=4):
    return policies.load_llamagen(entries, grid_size, head_dim=16)


def load_janus(entries, grid_size=4):
    return janus.load_janus(entries, META["janus"], META["janus"]["pad_id"], grid_size)


@pytest.fixture(scope="module", params=["llamagen", "janus"])
def backbone(request):
    """Policy, three prompts of different lengths in one batch, and which of the two it is."""
    if request.param == "llamagen":
        mask = reference("llamagen.caption_mask").bool()
        return load_llamagen(filled("llamagen")), reference("llamagen.caption_features"), mask
    words = [torch.tensor(words) for words in META["janus"]["prompt_ids"]]
    return load_janus(filled("janus")), *policies.left_pad(words, 12)


# ---- miniatures of the public files ----------------------------------------------------------------------------------

F = Path(tempfile.mkdtemp(prefix="miniatures-"))
CKPT, VQ, T5 = F / "t2i_XL_stage1_256.pt", F / "vq_ds16_t2i.pt", F / "flan-t5-xl"
DRAW = f"--ckpt {CKPT} --vq {VQ} --t5 {T5} --image-size 32"
JUDGES = f"--reward-weights {F}/open_clip_model.safetensors --vgg {F}/vgg.pth --lpips {F}/lpips.pth"
SMALL = "--batch-size 2 --group-size 2 --workers 0 --save-every 2"
RUN = f"{DRAW} {JUDGES} {SMALL} --data {F}/pairs --max-steps 3 --disc-start 0 --policy-lr 1e-3"
QUICK = "--workers 2 --lambda-r 0 --lambda-c 0 --disc-weight 0"
SCENES = f"{SMALL} --max-steps 2 --rank-k 0 --real-batch-size 2 --eval-samples 16 --save-every 1 --eval-every 1"


def write_clips():
    """Small networks under open_clip's names, and weights for them."""
    vision = {"layers": 1, "width": 64, "head_width": 32, "patch_size": 14, "image_size": 28}
    text = {"layers": 1, "width": 32, "heads": 1}
    for name in ("ViT-L-14-quickgelu", "ViT-B-32-quickgelu", "ViT-H-14"):
        config = {"embed_dim": 32, "quick_gelu": "quick" in name, "vision_cfg": vision, "text_cfg": text}
        (F / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(F)
    state_dict = open_clip.create_model("ViT-H-14").state_dict()
    safetensors.torch.save_file(state_dict, F / "open_clip_model.safetensors")
    torch.save({"epoch": 1, "state_dict": {n: x.half() for n, x in state_dict.items()}}, F / "hps.pt")


def write_t5():
    """A T5 encoder with a real tokenizer.json, which knows a few words."""
    words = ["<pad>", "</s>", "<unk>", *sorted(set(re.findall(r"\w+|,", f"{CAPTIONS} a photo of two red dogs")))]
    numbers = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(T5)
    sizes = {"d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
    transformers.T5EncoderModel(transformers.T5Config(vocab_size=len(words), **sizes)).save_pretrained(T5)


def write_janus(vq):
    """Janus-Pro's folder, in bfloat16 like the public one, with a tokenizer of bytes and an unused entry."""
    entries = {name: x for name, x in filled("janus").items() if not name.startswith("gen_vision_model.")}
    entries |= {f"gen_vision_model.{name}": x for name, x in vq.items()} | {"aligner.bias": torch.randn(8)}
    entries["language_model.model.embed_tokens.weight"] = torch.randn(300, 64)
    (F / "janus").mkdir()
    torch.save({name: x.bfloat16() for name, x in entries.items()}, F / "janus" / "pytorch_model.bin")
    (F / "janus" / "config.json").write_text('{"language_config": {"num_attention_heads": 4}}')
    special = ["<｜▁pad▁｜>", "<｜begin▁of▁sentence｜>", "<begin_of_image>", "<|User|>", "<|Assistant|>"]
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(CAPTIONS, vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.save(str(F / "janus" / "tokenizer.json"))


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


TURNED = Image.Exif()
TURNED[0x0112] = 6  # "to be turned by a quarter clockwise"


def write_pairs(folder):
    """Four images of different shapes with captions, the last on its side, and what a download leaves: half
    an image, whose caption some read as two lines, and images with a blank, a foreign or no text.
    """
    folder.mkdir()
    for i, caption in enumerate(CAPTIONS):
        image = Image.fromarray(pixels(40 + 8 * i, 60, 3, seed=i))
        image.save(folder / f"{i}.png", exif=TURNED if i == 3 else None)
        (folder / f"{i}.txt").write_text(caption, "utf-8-sig" if i else "utf-8")
    for name, text in {"broken": "half a\u2028picture".encode(), "blank": b" \n", "latin": b"caf\xe9"}.items():
        (folder / f"{name}.txt").write_bytes(text)
        shutil.copy(folder / "0.png", folder / f"{name}.png")
    os.truncate(folder / "broken.png", 900)
    shutil.copy(folder / "0.png", folder / "mute.png")


@pytest.fixture(scope="session", autouse=True)
def miniatures():
    """Every public file in its true layout, with what LlamaGen leaves in its own, and pairs to train on."""
    torch.manual_seed(0)
    vq = vqs.VQModel(vqs.VQConfig(32, (1, 1, 1, 1, 1), 1, 32, 128)).state_dict()
    torch.save({"model": vq}, VQ)
    entries = policies.Policy(policies.GPTConfig(64, 2, 64, 96, 128, 12, 48, 2)).state_dict()
    entries["freqs_cis"] = torch.zeros(16, 32, 2)
    torch.save({"model": entries, "optimizer": {"state": {}}, "args": argparse.Namespace(lr=1.0)}, CKPT)
    vgg = fill(MANIFESTS["vgg16-397923af.pth (features only)"]) | {"classifier.0.bias": torch.zeros(2)}
    torch.save(vgg, F / "vgg.pth", _use_new_zipfile_serialization=False)
    linear = fill(MANIFESTS["vgg_lpips.pth (linear layers)"])
    torch.save({name: x.abs() for name, x in linear.items()}, F / "lpips.pth")
    torch.save(fill(MANIFESTS["pt_inception-2015-12-05-6726825d.pth"]), F / "inception.pth")
    write_clips()
    write_t5()
    write_janus(vq)
    write_pairs(F / "pairs")
    yield
    shutil.rmtree(F)


# ---- processes -------------------------------------------------------------------------------------------------------


def run(main, arguments, log, change):
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(log, "w", buffering=1, encoding="utf-8")
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    change()
    main(shlex.split(arguments))


def start(arguments, change=lambda: None, main=train.main):
    """The command in a process of its own, a fork, which need not import; `change` is called in it first."""
    log = Path(tempfile.mktemp(dir=F))
    process = multiprocessing.get_context("fork").Process(target=run, args=(main, arguments, log, change))
    process.start()
    process.log = log
    return process


def end(process, status=0):
    """What a process has printed when it has ended, as it must, with `status`."""
    process.join(100)
    printed = process.log.read_text("utf-8", "replace")
    assert process.exitcode == status, printed[-3000:]
    return printed


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def no_network():
    socket.socket.connect = None
    huggingface_hub.constants.HF_HUB_OFFLINE = True


@pytest.fixture(scope="session")
def data_run():
    return F / "data", end(start(f"{RUN} --out {F}/data", no_network))


@pytest.fixture(scope="session")
def scenes_run():
    return F / "scenes", end(start(f"{SCENES} --out {F}/scenes"))


# ---- whole runs ------------------------------------------------------------------------------------------------------


def changed(before, after):
    """The entries that differ; the names must be the same."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_public_files_are_post_trained_and_come_back(data_run):
    """Else `--ckpt` is a code path and not a run, or goes to the network for what lies here. What it leaves
    loads strictly, by the public names, encoder and codebook untouched, and the log has all that it promises.
    """
    out, printed = data_run
    assert all(math.isfinite(value) for line in read_log(out) for value in line.values())
    assert all(text in printed for text in ("mute.png: no caption, or not in UTF-8", "broken.png", "step 3/3"))
    assert Image.open(out / "preview-000003.png").size == (190 + 5 * 164, 48 + 8 * 164)  # 5 columns, 8 captions
    policy, vq = load_state_dict(CKPT), load_state_dict(VQ)
    policy.pop("freqs_cis")
    assert changed(policy, load_state_dict(out / "policy.pt"))
    parts = {name.split(".")[0] for name in changed(vq, load_state_dict(out / "vq.pt"))}
    assert parts == {"decoder", "post_quant_conv"}


def test_janus_is_post_trained_and_comes_back(tmp_path):
    """Else the paper's second backbone, or its second reward, is a code path and not a run: what is saved is
    a folder in the same layout, every entry that was not trained as it was, from which --sample draws.
    """
    reward = f"--reward hpsv2 --reward-weights {F}/hps.pt"
    end(start(f"{RUN} {reward} --ckpt {F}/janus --out {tmp_path} --max-steps 1 --keep-exports"))
    assert (tmp_path / "000001" / "policy_ema" / "tokenizer.json").exists() and (tmp_path / "discriminator.pt").exists()
    was, now = (load_state_dict(folder) for folder in (F / "janus", tmp_path / "policy"))
    trained = {name for name in changed(was, now) if now[name].dtype == torch.float32}
    parts = ("language_model.model.layers.", "language_model.model.norm", "gen_embed", "gen_aligner", "gen_head")
    parts += ("gen_vision_model.decoder.", "gen_vision_model.post_quant_conv")
    assert trained == changed(was, now) and {name for name in trained if "q_proj" in name}
    assert all(name.startswith(parts) for name in trained)
    end(start(f"--ckpt {tmp_path} --image-size 32 --out {tmp_path}/shown --sample 'a red bus'"))
    assert Image.open(tmp_path / "shown" / "00000" / "samples" / "0000.png").size == (32, 32)


PRESETS = {
    "--ckpt llamagen_xl.pt": {"top_k": 1000, "lambda_d": 0.01, "kl_coef": 0.05, "tau_steps": 936, "policy_lr": 1e-5},
    "--ckpt llamagen_xl.pt --reward hpsv2": {"lambda_d": 0.1, "kl_coef": 0.05, "tau_steps": 468},
    "--ckpt deepseek-ai/Janus-1.3B": {"top_k": 1000, "lambda_d": 0.05, "kl_coef": 0.05, "cfg_scale": 5.0},
    "--ckpt deepseek-ai/Janus-Pro-1B --reward hpsv2": {"lambda_d": 0.05, "kl_coef": 0.01, "image_size": 384},
    "--ckpt deepseek-ai/Janus-Pro-1B --sample x": {"top_k": 50, "out": "runs/samples"},
    "--cfg_scale=3": {"cfg_scale": 3.0, "data": "scenes", "tau_steps": 16},
}


@pytest.mark.parametrize("arguments", PRESETS)
def test_settings_are_the_authors(arguments):
    """Else a run that is called theirs has other values (scripts of 2798acc; experiments/README.md)."""
    assert vars(train.parse_config(arguments.split())).items() >= PRESETS[arguments].items()


def test_what_is_drawn_from_a_run_has_its_settings(data_run, capsys):
    """Else a run made at 32 px is drawn at 256, or its policy through a decoder that was trained with another."""
    for name, pair in {"": "policy.pt vq.pt", "policy_ema.pt": "policy_ema.pt vq_ema.pt"}.items():
        cfg = train.parse_config(["--ckpt", str(data_run[0] / name), "--sample", "x"])
        found = [Path(cfg.ckpt).name, Path(cfg.vq).name, cfg.image_size, cfg.t5]
        assert found == [*pair.split(), 32, str(T5)] and pair.replace(" ", " with ") in capsys.readouterr().out


# ---- downloads -------------------------------------------------------------------------------------------------------


COMMIT = "a" * 40


class Hub(http.server.SimpleHTTPRequestHandler):
    """The Hugging Face hub's URLs, and other files, by their last names; `cut` come in half."""

    fetched, cut = [], {"lpips.pth"}

    def translate_path(self, path):
        name = path.split("?")[0].split("/")[-1]
        name = f"data-{name}" if "/datasets/" in path and name in ("main", COMMIT) else name
        return str(next(file for file in (F / name, T5 / name) if file.exists()))

    def end_headers(self):
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{zlib.crc32(self.path.encode())}"')
        super().end_headers()

    def copyfile(self, source, outputfile):
        name, content = Path(source.name).name, source.read()
        self.fetched.extend(
            {name} - {"main", COMMIT, "data-main", f"data-{COMMIT}", "BLIP3o-60k"}
        )  # what the hub says of a repository, and of its files
        outputfile.write(content[: len(content) // 2] if name in self.cut else content)


def test_public_files_are_fetched_once(tmp_path, monkeypatch):
    """Else each start downloads gigabytes, a broken download is trained on, files are asked for one failed
    start at a time, or a machine without a network cannot use what lies there.
    """
    tree = [{"type": "file", "path": file.name, "size": 1, "oid": "0"} for file in T5.iterdir()]
    write_tar(F / "object_1.tar", {0: "x/0", 1: "x/1"})
    data = {"id": "BLIP3o/BLIP3o-60k", "sha": COMMIT, "siblings": [{"rfilename": "object_1.tar", "size": 51e9}]}
    data_tree = [{"type": "file", "path": "object_1.tar", "size": 1, "oid": "0"}]
    t5 = {"id": "google/flan-t5-xl", "sha": COMMIT, "siblings": [{"rfilename": file["path"]} for file in tree]}
    pages = {"main": t5, COMMIT: tree, "data-main": data}
    for name, content in (pages | {f"data-{COMMIT}": data_tree, "BLIP3o-60k": data}).items():
        (F / name).write_text(json.dumps(content))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, constants = f"http://127.0.0.1:{server.server_port}", huggingface_hub.constants
    template = ("HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    for module in (constants, huggingface_hub.file_download):  # huggingface_hub before 1.0 reads the second
        monkeypatch.setattr(module, *template, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    arguments = f"{SMALL} --ckpt llamagen_xl.pt --image-size 32 --max-steps 1 --out {tmp_path}/run"
    for name in ("vgg", "lpips"):
        sha256 = hashlib.sha256((F / f"{name}.pth").read_bytes()).hexdigest()
        monkeypatch.setattr(train.TrainConfig, name, f"{url}/{name}.pth#{sha256[:8]}")
        arguments += f" --{name} {url}/{name}.pth#{sha256[:8]}"
    options = ["--ckpt", "--vq", "--t5", "--reward-weights", "--vgg", "--lpips", "--data"]
    assert re.findall("\n  (--\\S+)", end(start(arguments, no_network), status=2)) == options
    with monkeypatch.context() as patch:  # what comes whole is not what was asked for; the other comes in half
        patch.setattr(train.TrainConfig, "vgg", f"{url}/vgg.pth#00000000")
        said = end(start(f"{arguments} --vgg {url}/vgg.pth#00000000"), status=2)
    assert (
        re.findall("\n  (--\\S+)", said) == ["--vgg", "--lpips"] and "BLIP3o-60k of the" in said and "51.0 GB" in said
    )
    assert f"stands for the public peizesun/llamagen_t2i/{CKPT.name}" in said
    assert len(Hub.fetched) > 5 and not [path for path in (tmp_path / "torch").rglob("*") if path.is_file()]
    Hub.cut.clear()
    for fetched in (["lpips.pth", "vgg.pth"], []):  # only what had not come whole, and that once
        Hub.fetched.clear()
        public.world.resolve_files(train.parse_config(arguments.split()))
        assert sorted(Hub.fetched) == fetched
    server.shutdown()
    end(start(arguments, no_network))


# ---- data ------------------------------------------------------------------------------------------------------------


def write_coco(file, image_ids, more=()):
    """COCO's captions, whose annotations all have one id, as tools leave them."""
    notes = [*((i, CAPTIONS[i] + "\n") for i in image_ids), *more]
    notes = [{"id": 0, "image_id": i, "caption": caption} for i, caption in notes]
    images = [{"id": i, "file_name": f"{k}.png"} for k, i in enumerate(image_ids)]
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"images": images, "annotations": notes}))


def write_tar(file, names):
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for i, name in names.items():
            tar.add(F / "pairs" / f"{i}.txt", f"{name}.txt")
            tar.add(F / "pairs" / f"{i}.png", f"{name}.png")


def test_every_data_layout_gives_the_same_pairs(tmp_path, monkeypatch, capsys):
    """Else a picture is trained on under another's caption or half of its own, stretched, on its side, or in
    another range; or a name in a tar off the web makes a file outside of it; or files are left out unseen.
    """
    shutil.copytree(F / "pairs", tmp_path / "pairs")
    shutil.copy(F / "pairs" / "0.png", tmp_path / "pairs" / "away.png")
    (tmp_path / "pairs" / "away.txt").symlink_to("nowhere")
    (tmp_path / "pairs" / "x.tar.gz").touch()
    write_tar(tmp_path / "a" / "b" / "0.tar", {0: "x/0", 1: "x/1"})
    write_tar(tmp_path / "a" / "b" / "evil.TAR", {2: "../../2", 3: "../../3"})
    write_coco(tmp_path / "annotations" / "captions_pairs.json", range(4))
    write_coco(tmp_path / "pairs" / "all.json", range(4), [(1, " ")])
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path / "annotations")
    for name in ("../pairs", "../a/b", "captions_pairs.json", "../pairs/all.json"):
        dataset = data.CaptionedImages(data.list_pairs(Path(name)), 32)
        assert len(dataset) == (5 if name == "../pairs" else 4)
        for i in range(4):
            image = ImageOps.exif_transpose(Image.open(F / "pairs" / f"{i}.png"))
            expected = ImageOps.fit(image, (32, 32), Image.Resampling.LANCZOS)
            assert dataset[i][0] == CAPTIONS[i] and (dataset[i][1] == np.asarray(expected)).all()
        if name == "../pairs":  # the place of the image that cannot be read goes to the next
            assert (dataset.pairs[4][1], dataset[4][0]) == ("half a\u2028picture", CAPTIONS[0])
            said = capsys.readouterr()
            assert re.findall(r"left out .*/(\w+)\.png", said.err) == ["away", "blank", "latin", "mute", "broken"]
            assert "5 pairs" in said.out and "left out, other files: 2 .gz .json" in said.out
    assert sorted(tmp_path.rglob("*")) == before


def test_data_that_changed_are_told_from_data_that_moved(tmp_path):
    """Else --resume goes on with other pictures or captions, or takes a folder at another place for others."""
    texts = []
    for name, caption in {"a": "a red bus", "b": "a red bus", "c": "a blue bus"}.items():
        shutil.copytree(F / "pairs", tmp_path / name)
        (tmp_path / name / "0.txt").write_text(caption)
        texts.append(data.describe_pairs(data.list_pairs(tmp_path / name)))
    assert texts[0] == texts[1] != texts[2] and all(text.startswith("5 pairs") for text in texts)


def test_captions_to_draw_hold_any_separator_and_are_one_an_image(tmp_path):
    """Else one web caption with U+2028 moves all after it, a comma ends one, or COCO's 30,000 images, of which
    two may be one file, are of other captions; or a caption is taken for a file's name.
    """
    captions = ["a red\u2028bus", "two\x85cats, asleep"]
    (tmp_path / "a.txt").write_text("\n".join(captions) + "\n\n", "utf-8-sig")
    (tmp_path / "a.csv").write_text("\n".join(["\tPrompt", *(f"0\t{text}" for text in captions)]))
    (tmp_path / "list.json").write_text(json.dumps([captions[0], {"prompt": captions[1]}]))
    write_coco(tmp_path / "a.json", range(4), [(0, "two cats"), (3, " ")])
    (tmp_path / "one_file.json").write_text((tmp_path / "a.json").read_text().replace("1.png", "0.png"))
    for name in ("a.txt", "a.csv", "list.json", "a.json", "one_file.json"):
        expected = CAPTIONS if name in ("a.json", "one_file.json") else captions
        prompts = data.read_prompts([str(tmp_path / name)], 0)
        assert sorted(prompt["prompt"] for prompt in prompts) == sorted(expected)
    assert data.read_prompts(["a bus."], 0) == [{"prompt": "a bus."}]


def test_data_order_is_a_function_of_seed_and_step():
    """Else a resumed run trains on other pictures, an epoch leaves some out, or two processes train on the
    same, also of the embedded world; or fine-tuning has no images.
    """
    batches = [list(data.batch_indices(10, 3, 0, range(10), rank, 2)) for rank in (0, 1)]
    order = [i for pair in zip(*batches) for batch in pair for i in batch]
    epochs = [order[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1]
    assert list(data.batch_indices(10, 3, 1, range(10), 0, 2)) != batches[0]
    assert next(data.batch_indices(10, 3, 0, range(7, 10**12), 1, 2)) == batches[1][7]  # at once
    dataset = data.CaptionedImages(data.list_pairs(F / "pairs"), 32)
    for method, n in {"rl": 0, "sft": 4}.items():
        assert len(next(data.data_batches(dataset, train.TrainConfig(method=method), 0, 0, 1))[1]) == n
    others = ((0, 0, 0, 2), (0, 1, 0, 2), (0, 0, 1, 2), (1, 0, 0, 2))  # seed, step, process
    assert len({tuple(next(scenes.batches(3, *other))[0]) for other in others}) == 4


# ---- text ------------------------------------------------------------------------------------------------------------


CLEANED = {
    "  A man's dog — “happy”, and wet...  ": 'a man\'s dog - "happy", and wet',
    "red,green and blue.A dog (small) runs": "red, green and blue. a dog small runs",
    "a 4-year-old, black-and-white dog-like thing": "a 4 year old, black and white dog like thing",
    "'quoted caption',": "quoted caption",
    "salt &amp; pepper; 50% off,": "salt pepper; 50% off",
}


def test_captions_are_cleaned_as_llamagens_were():
    """Else T5 reads other words than the policy learned from. Expected: LlamaGen's cleaning, run by hand."""
    assert {caption: llamagen.clean_caption(caption) for caption in CLEANED} == CLEANED


def test_text_features_are_on_the_left_padded_side_and_each_captions_own():
    """Else a caption's features change with its neighbours' lengths, or a model trained with text in the last
    positions reads holes there. n words have n + 1 features, </s> the last.
    """
    encoder = llamagen.T5Encoder(T5, 48, 12, "cpu", "cpu")
    cond, mask = encoder(CAPTIONS)
    assert mask.sum(1).tolist() == [4, 5, 6, 4] and mask[:, -4:].all()
    for row, row_mask, caption in zip(cond, mask, CAPTIONS):
        close(row[row_mask], encoder([caption.upper() + "  "])[0][0], atol=1e-5)
    assert encoder(["a " * 50])[0].shape == (1, 12, 48)
    cond, mask = llamagen.T5Encoder(T5, 48, 12, "cpu", "cpu", "right")(CAPTIONS)  # as the authors draw COCO
    assert cond.shape == (4, 12, 48) and mask.sum(1).tolist() == [4, 5, 6, 4] and mask[:, :4].all()
    assert not cond[~mask].any()


def test_janus_prompts():
    """Else Janus reads another prompt than it was trained on, or a long caption cuts off what follows it."""
    ids, mask = janus.JanusTokenizer(F / "janus", "cpu")(["a red bus", "bus " * 1000])
    words = transformers.PreTrainedTokenizerFast(tokenizer_file=str(F / "janus" / "tokenizer.json"))
    begin, end_ = "<｜begin▁of▁sentence｜><|User|>: ", "\n\n<|Assistant|>:<begin_of_image>"
    assert words.decode(ids[0][mask[0]]) == f"{begin}a red bus{end_}" and ids.shape == (2, 512) and mask[1].all()
    assert words.decode(ids[1]).startswith(f"{begin}bus bus") and words.decode(ids[1]).endswith(f"bus{end_}")


# ---- images ----------------------------------------------------------------------------------------------------------


def test_samples_have_genevals_layout_and_stay(tmp_path):
    """Else its evaluator finds no image, 30,000 are drawn anew after a stop, an image hangs on its
    neighbours, or a folder's name that a redirected output cannot print ends the run.
    """
    lines = [json.dumps({"tag": "two_object", "prompt": caption}) for caption in CAPTIONS]
    out, file = tmp_path / "日本", tmp_path / "g.jsonl"
    draw = f"{DRAW} --per-prompt 2 --out {out} --sample {file}"
    file.write_text("\n".join(lines[:2]) + "\n")
    end(start(draw, lambda: sys.stdout.reconfigure(encoding="cp1252")))
    assert [(out / f"{i:05d}" / "metadata.jsonl").read_text() for i in range(2)] == lines[:2]
    images = [out / f"{i:05d}" / "samples" / f"{k:04d}.png" for i in (0, 1) for k in (0, 1)]
    assert sorted(out.rglob("*.png")) == images and Image.open(images[0]).size == (32, 32)
    tokens, times = np.load(images[1].with_suffix(".npy")), [path.stat().st_mtime_ns for path in images]
    images[1].unlink()
    file.write_text("\n".join(lines[:3]) + "\n")
    end(start(f"{draw} --rollout-batch-size 1"))
    assert [path.stat().st_mtime_ns == t for path, t in zip(images, times)] == [True, False, True, True]
    assert (np.load(images[1].with_suffix(".npy")) == tokens).all()
    assert "of other settings" in end(start(f"{draw} --seed 1"), status=2)
    file.write_text("\n".join(reversed(lines)))
    assert "is of another caption" in end(start(draw), status=2)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def wrong():
    """A folder of files that cannot be used."""
    folder, policy, pointer = F / "wrong", load_state_dict(CKPT), b"version https://git-lfs.github.com/spec/v1"
    for name in ("t5-lacks", "t5-lfs", "janus-rotary", "janus-384"):
        shutil.copytree(T5 if name.startswith("t5") else F / "janus", folder / name)
    shutil.copytree(T5, folder / "t5-mute", ignore=shutil.ignore_patterns("*token*"))
    lacks = {name: x for name, x in load_state_dict(T5).items() if name != "encoder.final_layer_norm.weight"}
    cut = {name: policy[name][:60] for name in ("tok_embeddings.weight", "output.weight")}
    narrow = {n: x[:, :40].clone() for n, x in policy.items() if n.endswith(("uncond_embedding", "fc1.weight"))}
    contents = {
        "truncated.pt": CKPT.read_bytes()[:-2000],
        "lfs.pt": pointer,
        "code.pt": b"cos\nsystem\n(S'true'\ntR.",  # a pickle that calls os.system("true")
        "codes.safetensors": safetensors.torch.save(policy | cut),
        "narrow.safetensors": safetensors.torch.save(policy | narrow),
        "nan.safetensors": safetensors.torch.save(policy | {"norm.weight": math.nan * policy["norm.weight"]}),
        "t5-lacks/model.safetensors": safetensors.torch.save(lacks, {"format": "pt"}),
        "t5-lfs/model.safetensors": pointer,
        "janus-384/config.json": b'{"vision_config": {"params": {"image_size": 384}}}',
        "janus-rotary/config.json": b'{"language_config": {"num_attention_heads": 4, "rope_theta": 5e5}}',
        "bad.json": b"[1, 2]",
        "damaged/0.png": pointer,
        "one/0.png": (F / "pairs" / "0.png").read_bytes(),
        "empty/nothing.txt": b"",
        "taken.npz/nothing.txt": b"",
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    write_tar(folder / "two.tar", {0: "0", 1: "0"})
    write_tar(folder / "half.tar", {0: "0", 1: "1"})
    os.truncate(folder / "half.tar", 10000)
    write_coco(folder / "twice.json", [1, 1])
    np.savez(folder / "nan.npz", mu=np.full(2048, np.nan), sigma=np.eye(2048))
    torch.save({"config": {"arm": "policy"}}, folder / "ckpt.pt")
    torch.save(policy | {"step": np.float32(1)}, folder / "numpy.pt")
    torch.save({name: x.to(torch.complex64) for name, x in policy.items()}, folder / "complex.pt")
    for name in (VQ.name, "hps.pt", "inception.pth"):
        weights = load_state_dict(F / name).items()
        torch.save({n: x * math.nan if "conv" in n else x for n, x in weights}, folder / f"nan-{name}")
    shutil.copytree(folder / "one", folder / "drawn" / "samples")
    (folder / "drawn" / "metadata.jsonl").write_text('{"prompt": "a bus"}')
    np.save(folder / "empty" / "16384.npy", np.array([16384]))
    np.save(folder / "damaged" / "0.5.npy", np.array([0.5]))
    return folder


COMMANDS = {"train": "--out OUT", "draw": f"{DRAW} --out OUT --sample clock", "run": f"{RUN} --out OUT"}
COMMANDS |= {"metrics": "--inception ../inception.pth", "fid": "--inception ../inception.pth fid ../pairs"}
REFUSED = {  # what is said: to which commands, in a folder of wrong files
    # A typing mistake that is ignored, or found after an hour
    "unrecognized arguments": "train --gudance 3 | train --max 3 | fid ../pairs --image 5",
    "expected 0 or more": "train --policy-lr nan | train --policy-lr inf | train --seed -1 | train --decoder-ema 2",
    "expected more than 0": "train --max-steps 0 | train --clip-eps 0 | train --max-grad-norm 0",
    ": invalid ": "train --max-steps many | train --gan ranked | train --t5-device gpu",
    "at least --rank-k": "train --rank-k 9 | train --group-size 1",
    "a_bus": "train --sample a_bus",
    "or one file that is there": "train --sample gone.csv | train --sample empty",
    "captions in UTF-8": "train --sample caf\udce9",
    "holds --ckpt or --vq; name another folder": f"train --ckpt {CKPT} --out {F}",
    "there is no run in": "train --resume",
    "ckpt.pt: not a run, or one of another version": "train --resume --out .",
    # Weights that are another model's, random, or somebody's code
    "expected an undamaged checkpoint": "draw --ckpt truncated.pt",
    "holds numpy.": "draw --ckpt numpy.pt",
    "holds torch.complex64": "draw --ckpt complex.pt",
    "holds code, or no weights": "draw --ckpt code.pt | draw --ckpt bad.json",
    "is text: a Git-LFS pointer or a web page": "draw --ckpt lfs.pt | draw --t5 t5-lfs | run --reward-weights lfs.pt",
    "lacks the weights": "draw --t5 t5-lacks",
    "holds weights that are not finite": "draw --ckpt nan.safetensors",
    "its freqs_cis has 16 positions, not 12 + 4²": "draw --image-size 64",
    "config.json says 384": "draw --ckpt janus-384",
    "has 60 codes": "draw --ckpt codes.safetensors",
    "48 wide; the policy takes 40": "draw --ckpt narrow.safetensors",
    "expected what load_vq reads": f"draw --vq {CKPT} | metrics token-kl ../pairs ../pairs --vq {CKPT}",
    "t5-mute: ": "draw --t5 t5-mute",  # without its tokenizer's files every word would be <unk>
    "another rotary embedding": "draw --ckpt janus-rotary",
    # Nothing to train on, half of a shard, a caption of another picture
    "cannot be read": "run --data half.tar | run --data bad.json | draw --t5 empty | metrics clip ../pairs",
    "two of its images have one id": "run --data twice.json",
    "two members are named 0.txt": "run --data two.tar",
    # Missing paths that are found one a start, or after a download
    "--data no: no such file": "run --data no | run --data no --vq no --vgg no",
    "--vq no: no such file": "run --vq no | draw --vq no --t5 no",
    "/proc/no: cannot be made": "run --vq gone --out /proc/no",
    # A wrong folder or file that ends in a number, or is found after the network's work
    ": no image": "run --data empty | fid damaged | fid empty --inception lfs.pt | metrics token-kl one t5-mute --vq lfs.pt",
    "gone: no such folder": "fid gone --inception lfs.pt | metrics token-kl one gone --vq lfs.pt | metrics clip gone",
    "one: no .npy files": "metrics token-kl empty one",
    "at least 2": "metrics statistics one a.npz",  # the covariance of one image is NaN
    "expected a .npz with mu (2048,)": "fid taken.npz",
    "not finite": "fid nan.npz",
    "features of ../pairs: not finite": "fid one --inception nan-inception.pth",
    "scores of drawn: not finite": "metrics clip drawn --model ViT-H-14 --pretrained nan-hps.pt",
    f"nan-{VQ.name}: encoder.conv_in.weight: not finite": f"metrics token-kl one one --vq nan-{VQ.name}",
    "in a folder that can be written": "metrics statistics ../pairs stats | metrics statistics ../pairs nan.npz/a.npz",
    "taken.npz: cannot be written": "metrics statistics ../pairs taken.npz",
    "tokens below 16384": "metrics token-kl empty empty | metrics token-kl damaged empty",
}


REFUSALS = [(says, text) for says in REFUSED for text in REFUSED[says].split(" | ")]


@pytest.mark.parametrize("says, arguments", REFUSALS, ids=[text.replace(str(F), "F") for _, text in REFUSALS])
def test_what_cannot_be_meant_or_used(capsys, monkeypatch, wrong, tmp_path, says, arguments):
    """Else it is trained on, drawn from or measured, costs a night, ends in a traceback, or leaves something
    half-written; or PyTorch advises to set weights_only=False. One line says what is wrong.
    """
    monkeypatch.chdir(wrong)
    command, _, given = arguments.partition(" ")
    main, before = metrics.main if command in ("metrics", "fid") else train.main, sorted(F.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(f"{COMMANDS[command]} {given}".replace("OUT", f"{tmp_path}/run")))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and len(re.findall(r"^\w+\.py: ", said, re.M)) == 1, said
    assert says in said and "weights_only=False" not in said, said
    assert sorted(F.rglob("*")) == before and not list(tmp_path.rglob("*.p[tn]*"))


def test_shards_and_wrappers_of_a_checkpoint_are_read(tmp_path):
    """Else a file that a public program wrote is refused, half of a sharded one is read, or an older save that
    lies beside it; or nobody knows which of two was.
    """
    entries = load_state_dict(F / "janus")
    for i, prefix in enumerate(("_orig_mod.module.", "module._orig_mod.")):
        shard = {prefix + name: x for name, x in list(entries.items())[i::2]}
        safetensors.torch.save_file(shard, tmp_path / f"model-{i}.safetensors")
    close(load_state_dict(tmp_path), entries)
    torch.save({name: torch.zeros_like(x) for name, x in entries.items()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin: holds .*, and so does .*model-"):
        load_state_dict(tmp_path)
    index = '{"weight_map": {"a": "model-0.safetensors", "b": "model-1.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    close(load_state_dict(tmp_path), entries)


# ---- runs that survive -----------------------------------------------------------------------------------------------


def kill_in_step():
    """In the third step, after the policy moved and before the decoder did."""
    update = rankee.update_decoder
    rankee.update_decoder = lambda *inputs: os.kill(os.getpid(), 9) if inputs[3] == 2 else update(*inputs)


def kill_in_save():
    """With half of the second step's checkpoint on the disk."""
    save = torch.save

    def half(content, file):
        save(content, file)
        if content.get("step") == 2:
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), 9)

    torch.save = half


@pytest.mark.parametrize("whole, kill", [("data_run", kill_in_step), ("scenes_run", kill_in_save)])
def test_a_killed_run_goes_on_bit_for_bit(request, tmp_path, whole, kill):
    """Else a night's crash costs the run or takes its checkpoint along, or the resumed one is another run and
    nobody notices, or no figure of the README can be reproduced.
    """
    command = f"{RUN} --workers 2" if whole == "data_run" else SCENES
    end(start(f"{command} --out {tmp_path}/run", kill), status=-9)
    assert ("--workers: 2 -> 0" in end(start(f"--resume --workers 0 --out {tmp_path}/run"))) == (whole == "data_run")
    # Weights, EMA, moments, log and results; only the folder, its options and the seconds may differ.
    a, b = request.getfixturevalue(whole)[0], tmp_path / "run"
    x, y = (torch.load(out / "ckpt.pt") | {"config": 0, "rows": 0, "data": 0} for out in (a, b))
    logs = [[line | {"seconds": 0} for line in read_log(out)] for out in (a, b)]
    close(x, y, atol=0)
    assert logs[0] == logs[1] and len(logs[0]) == x["step"]
    for name in {path.name for out in (a, b) for path in out.iterdir()} - {"ckpt.pt", "log.jsonl"}:
        assert (a / name).read_bytes() == (b / name).read_bytes()


def test_resume_says_and_uses_what_changed(data_run, tmp_path, monkeypatch):
    """Else `--resume --decoder-lr` goes on at the old rate, or a changed setting goes unseen; and a run is
    not overwritten by the second command of the day.
    """
    out, x = tmp_path / "run", torch.load(data_run[0] / "ckpt.pt")
    shutil.copytree(data_run[0], out)
    assert "holds a run" in end(start(f"{RUN} --out {out}"), status=2)
    torch.save(x | {"world_size": 2}, out / "ckpt.pt")
    monkeypatch.chdir(out)  # what lies here, a policy.pt, is not what was named
    said, y = end(start(f"--resume --out {out} --max-steps 4 --decoder-lr 0")), torch.load(out / "ckpt.pt")
    assert all(line in said for line in ("--decoder-lr: 5e-05 -> 0.0", "--max-steps: 3 -> 4", "processes: 2 -> 1"))
    assert "--ckpt" not in said and not changed(x["vq"], y["vq"]) and changed(x["policy"], y["policy"])
    assert y["step"] == len(read_log(out)) == 4


PATIENT = "--shutdown-timeout=600" * ("--shutdown-timeout" in torch.distributed.run.get_args_parser().format_help())
TORCHRUN = f"--standalone --nproc_per_node=2 {PATIENT} {HERE}/train.py {SCENES}"
SIGNALLED = [
    (train.main, f"{RUN} --method rl --vgg '' --lpips ''", os.kill, signal.SIGINT, 130),
    (train.main, f"{RUN} {QUICK}", os.killpg, signal.SIGTERM, 143),
    (torch.distributed.run.main, TORCHRUN, os.kill, signal.SIGTERM, 1),
]


@pytest.mark.parametrize("main, command, kill, number, status", SIGNALLED, ids=["INT", "TERM", "torchrun"])
def test_a_signal_ends_the_step_and_saves(tmp_path, main, command, kill, number, status):
    """Else Ctrl-C, or a cluster's notice, which reaches the loader's workers too, costs all since the last
    save; or standard RL asks for files that it never uses; or torchrun, which hands the notice on, kills one
    process in its save and leaves the other.
    """
    out = tmp_path / "run"
    process = start(f"{command} --max-steps 5000 --save-every 9000 --out {out}", os.setsid, main)
    while not (out / "log.jsonl").exists() or not read_log(out):
        assert process.is_alive()
        time.sleep(0.02)
    assert "another run is going on there" in end(start(f"{RUN} --out {out}"), status=2)
    kill(process.pid, number)
    assert "ending after this step" in end(process, status)
    assert torch.load(out / "ckpt.pt")["step"] == len(read_log(out))
    with pytest.raises(ProcessLookupError):  # no worker is left
        os.killpg(process.pid, 0)


def in_a_notebook(arguments):
    """Twice in one process, in a thread, with streams that have no reconfigure; then once more in the main thread."""
    sys.stdout = SimpleNamespace(write=sys.stdout.write, flush=sys.stdout.flush)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    thread = threading.Thread(target=train.main, args=(arguments,))
    thread.start()
    thread.join()
    train.main([*arguments, "--resume", "--max-steps", "2"])
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_run_in_a_notebook(tmp_path):
    """Else train.main([...]) dies there of a stream, a signal or a lock, or Ctrl-C afterwards kills the kernel."""
    end(start(f"{SCENES} --max-steps 1 --out {tmp_path}/run", main=in_a_notebook))
    assert len(read_log(tmp_path / "run")) == 2


def fill_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))  # Python ignores the signal: the write fails


def test_a_full_disk_leaves_what_was_saved(data_run, tmp_path):
    """Else a save that fails takes the checkpoint before it along, or a log without room is a traceback, or the
    next save is lost because a screen, or a `| tee`, takes no more lines.
    """
    out = tmp_path / "run"
    shutil.copytree(data_run[0], out)
    said = end(start(f"--resume --max-steps 4 --out {out}", fill_disk), status=2)
    assert "cannot be written" in said and "Traceback" not in said and not list(out.glob(".*.partial"))
    assert all((out / name).read_bytes() == (data_run[0] / name).read_bytes() for name in ("vq.pt", "ckpt.pt"))
    with pytest.raises(InputError, match="full: cannot be"), contextlib.redirect_stdout(open("/dev/full", "w")):
        log_step("/dev/full", 1, 9, {"reward": 1.0})


def no_reward():
    metrics.CLIPScore.forward = lambda score, images, text_emb: math.nan * images.mean((1, 2, 3))


def test_numbers_that_stay_wrong_end_the_run(tmp_path):
    """Else it burns a week on a reward that overflowed, or waits for its loader's workers for ever."""
    said = end(start(f"{RUN} {QUICK} --max-steps 9 --out {tmp_path}/run", no_reward), status=1)
    assert "5 steps in a row" in said and "Traceback" not in said and said.count("NO UPDATE") == 5
    assert [line["reward"] for line in read_log(tmp_path / "run")] == [None] * 5


def little_shared_memory():
    ctypes.CDLL(None).unshare(0x20000)  # CLONE_NEWNS: mounts of this process alone
    subprocess.run("mount --make-rprivate / && mount -t tmpfs -o size=512k tmpfs /dev/shm", shell=True, check=True)


@pytest.mark.skipif(subprocess.run("unshare -m true", shell=True).returncode, reason="needs to mount")
def test_images_need_no_shared_memory(tmp_path):
    """Else a loader hangs where /dev/shm is small (64 MB in a container); here a step's images exceed it."""
    end(start(f"{RUN} {QUICK} --real-batch-size 400 --max-steps 1 --out {tmp_path}/run", little_shared_memory))


# ---- several processes -----------------------------------------------------------------------------------------------


def start_together(arguments, world_size, change):
    """Processes as torchrun would start them; calls change(rank) in each first."""
    with socket.create_server(("127.0.0.1", 0)) as s:
        names = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}

    def begin(rank):
        os.environ.update(names | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        change(rank)

    return [start(arguments, lambda rank=rank: begin(rank)) for rank in range(world_size)]


def test_two_processes_make_one_update(tmp_path):
    """Else more GPUs train another model: 2 processes of 2 captions equal 1 of 4, in all three networks."""
    numbers, uniform = torch.rand(4, 2, 4, generator=torch.Generator().manual_seed(0)), train.uniform

    def same_numbers(rank):
        train.uniform = lambda x, *shape: numbers[2 * rank :][: shape[0]] if len(shape) == 3 else uniform(x, *shape)

    small = f"{RUN} --max-steps 1 --micro-batch-size 2 --max-grad-norm 10"  # only the decoder's is larger
    processes = start_together(f"{small} --batch-size 4 --out {tmp_path}/one", 1, same_numbers)
    for process in processes + start_together(f"{small} --batch-size 2 --out {tmp_path}/two", 2, same_numbers):
        end(process)
    rewards = [read_log(tmp_path / name)[0]["reward"] for name in ("one", "two")]
    assert rewards[1] == pytest.approx(rewards[0], rel=1e-5)  # and the log has the mean of both, not the first's
    one, two = (torch.load(tmp_path / name / "ckpt.pt") for name in ("one", "two"))
    for name in ("policy_optimizer", "decoder_optimizer", "disc_optimizer"):
        x, y = (torch.cat([x["exp_avg"].flatten() for x in run[name]["state"].values()]) for run in (one, two))
        close(y, x, atol=1e-3 * x.abs().max().item())


def test_a_process_that_dies_ends_the_others(tmp_path):
    """Else a dead GPU leaves the others waiting, and paid for, until somebody looks."""
    train_step = train.train_step

    def die(rank):
        train.train_step = lambda *inputs: os._exit(3) if rank == inputs[4] == 1 else train_step(*inputs)

    one, other = start_together(f"{SCENES} --max-steps 9 --out {tmp_path}", 2, die)
    end(other, status=3)
    end(one, status=1)
    assert len(read_log(tmp_path)) == torch.load(tmp_path / "ckpt.pt")["step"] == 1


# ---- the embedded world ----------------------------------------------------------------------------------------------


def test_scenes_show_their_captions(scenes_run):
    """Else the first run's reward, accuracy and pictures disagree: the judges read what `render` draws."""
    rows = json.loads((scenes_run[0] / "results.json").read_text())
    expected = [("real", "base", 0), ("base", "base", 0)]
    expected += [("ranke", decoder, step) for step in (1, 2) for decoder in ("base", "own")]
    assert [(row["method"], row["decoder"], row["step"]) for row in rows] == expected and "frechet" in scenes_run[1]
    base = scenes.load_world(train.parse_config(["--eval-samples", "256"]))
    images = base.evaluate.images
    real, swapped = (base.evaluate(base.vq.encode(x), x) for x in (images, images.flip(1)))
    assert real["accuracy"] > 0.9 > swapped["accuracy"] and swapped["frechet"] > 3 * real["frechet"]
    assert real["scene_clip"] > swapped["scene_clip"] + 10
    others = scenes.random_scenes(256, rankee.random_stream(0, "other scenes"))[2]  # what a run is compared with
    same = base.evaluate(base.vq.encode(others), others)
    assert max(same["token_kl"], same["frechet"]) < 1e-3 < real["token_kl"] < 0.2  # 0.03 with 2,048 scenes


def test_a_comparison_is_within_a_seed_and_of_the_last_step(capsys):
    """Else tables and figure pair a seed with another, a step with another, or a policy with the wrong decoder."""
    names = [("real", "base", 0), ("base", "base", 0), *(("ranke", d, n) for n in (40, 80) for d in ("base", "own"))]
    runs = [[dict(zip(("method", "decoder", "step"), x)) for x in names] for _ in range(2)]
    for i, row in enumerate(row for rows in runs for row in rows):
        row |= dict.fromkeys(scenes.NUMBERS, i**2)
    assert [(n, row["frechet"]) for n, row in compare.by_step(runs[0]).items()] == [(0, 1), (40, 9), (80, 25)]
    assert [(n, row["frechet"]) for n, row in compare.by_step(runs[0], "base").items()] == [(0, 1), (40, 4), (80, 16)]
    compare.print_tables({"ranke": runs})
    printed = capsys.readouterr().out
    for title, cell in {"minus base ": "48.000±24.000 0/2", "own minus base decoder": "15.000±6.000 0/2"}.items():
        table = printed[printed.index(title) :].split("\n\n")[0]  # 25 - 1 and 121 - 49; 25 - 16 and 121 - 100
        assert cell in re.search(r"^ *ranke .*", table, re.M).group(), table


def test_a_third_world_is_a_module_and_a_word(tmp_path, monkeypatch):
    """Else another data set means an edit of the loop; or a run's --ckpt forgets its world, and asks for T5."""
    text = (HERE / "experiments" / "README.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(code.splitlines()) <= 30
    (tmp_path / "night.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(train.WORLDS, "night", "night")
    end(start(f"{SCENES} --data night --out {tmp_path}/run"))
    assert torch.load(tmp_path / "run" / "ckpt.pt")["data"] == "scenes at night"
    end(start(f"--ckpt {tmp_path}/run --sample 'small red plain ring top left on navy' --out {tmp_path}/drawn"))
    assert Image.open(tmp_path / "drawn" / "00000" / "samples" / "0000.png").size == (32, 32)


# ---- the public programs' numbers ------------------------------------------------------------------------------------


def test_policy_scores_and_samples_like_the_public_program(request, backbone):
    """Else a public checkpoint is post-trained as another model than the one its authors sample from."""
    (policy, cond, mask), name = backbone, request.node.callspec.params["backbone"]
    tokens = reference(f"{name}.tokens")
    close(policies.token_logprobs(policy, cond, mask, tokens), reference(f"{name}.logprobs"))
    close(policy(cond, mask, tokens[:, :-1]), reference(f"{name}.logits"))
    for cfg_scale, expected in ((1.0, "greedy_tokens"), (META[name]["cfg_scale"], "greedy_tokens_cfg")):
        greedy, _ = policies.generate(policy, cond, mask, torch.rand(3, 1, 16), Sampling(cfg_scale, top_k=1))
        assert torch.equal(greedy[:, 0], reference(f"{name}.{expected}"))


def test_janus_goes_back_as_it_came():
    """Else what is saved is no Janus: its program would turn wrong halves of a head, or meet other names."""
    entries, others = filled("janus"), ("vision_model.", "aligner.", "language_model.lm_head.", "gen_vision_model.")
    back = janus.janus_state_dict(load_janus(filled("janus")).state_dict(), 16)
    close(back, {name: x for name, x in entries.items() if not name.startswith(others)}, atol=0)
    close(vqs.load_vq(entries).decode(reference("janus.tokens")), reference("janus.decoded"))


def test_public_files_have_the_entries_we_expect():
    """Else the real file is refused after hours of download, or the sizes read from its shapes are wrong."""
    names = (MANIFESTS["vq_ds16_t2i.pt"], MANIFESTS["t2i_XL_stage1_256.pt"] | {"freqs_cis": [1]})
    with torch.device("meta"):
        vq, policy = ({name: torch.empty(shape) for name, shape in shapes.items()} for shapes in names)
        assert vqs.load_vq(vq).config == vqs.VQConfig()
        assert policies.load_llamagen(policy, 16).config == policies.GPTConfig()


@pytest.mark.parametrize("name, loader", [("llamagen", load_llamagen), ("janus", load_janus), ("vq", vqs.load_vq)])
def test_every_entry_must_fit(name, loader):
    """Else a cut or foreign file is post-trained with random weights where it has none (`strict=False`)."""
    entries = filled(name)
    norm = next(entry for entry in reversed(entries) if "norm" in entry and not entry.startswith("gen_vision_model."))
    lacks = {entry: x for entry, x in entries.items() if entry != norm}
    for wrong in (lacks, entries | {norm + "2": torch.zeros(1)}, entries | {norm: torch.zeros(1)}):
        with pytest.raises((KeyError, RuntimeError), match="norm"):
            loader(wrong)


def test_tokenizer_is_llamagens():
    """Else decoded images, and the codes of real ones, would be another tokenizer's. Autocast leaves codes
    alone, as bf16 takes one for its neighbour: a GPU's decoder would learn from codes that no real image has.
    """
    image, codes, vq = reference("vq.image"), reference("vq.encoded_codes"), vqs.load_vq(filled("vq"))
    close(vq.decode(reference("vq.codes")), reference("vq.decoded"))
    close(vq.encode_latents(image), reference("vq.pre_quant"))
    assert torch.equal(vq.encode(image), codes)
    close(vq.decode(codes), reference("vq.reconstruction"))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vq.quantize.nearest(reference("vq.pre_quant")), codes)
        assert vq.decode(codes).dtype == torch.float32


@pytest.fixture(scope="module")
def inception():
    return metrics.fid_inception(load_state_dict(F / "inception.pth"))


def test_inception_is_the_fid_variant(inception):
    """Else every FID would be off from the published ones, by how pools treat padding or by the resize."""
    clean = metrics.preprocess(REFERENCE["fid.images"], "clean")
    sample = (clean[0] * 128 + 128).permute(1, 2, 0)[::23, ::23]
    close(sample, reference("fid.resized_clean_sample"), atol=1e-3)  # of 0 … 255
    close(inception(clean), reference("fid.features_clean"))
    close(inception(metrics.preprocess(REFERENCE["fid.images"], "pytorch-fid")), reference("fid.features"))


@pytest.mark.parametrize("case", range(3))
def test_frechet_distance_is_pytorch_fids(case):
    """Else FIDs do not compare, or are not what SciPy makes of the definition. Case 2: singular covariances."""
    a, b = (metrics.feature_statistics(reference(f"frechet.{side}{case}").split(50))[:2] for side in "xy")
    definition = np.square(a[0] - b[0]).sum() + np.trace(a[1] + b[1] - 2 * scipy.linalg.sqrtm(a[1] @ b[1]).real)
    expected = pytest.approx(metrics.frechet_distance(*a, *b), rel=1e-6 if case == 2 else 1e-8)
    assert [REFERENCE["frechet.expected"][case], definition] == [expected] * 2
    assert math.isnan(metrics.frechet_distance(a[0] * math.nan, a[1], *b))  # and no perfect 0


def test_lpips_is_the_one_llamagen_trained_with():
    """Else both anchors would hold the decoder to another notion of similar."""
    lpips = load(F / "vgg.pth", vqs.load_lpips, load_state_dict(F / "lpips.pth"))
    close(lpips(reference("lpips.a"), reference("lpips.b")), reference("lpips.distance"))


# ---- sampling and scoring --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg_scale, top_k", [(1.0, 0), (3.0, 0), (1.0, 50), (3.0, 50)])
def test_cached_sampling_equals_recomputation_and_scoring(backbone, cfg_scale, top_k):
    """Else a stale or misplaced cache entry changes tokens, which no loss would ever show: each token is the
    one that a pass over those before it draws. Or π_old is not the policy that sampled: ratios start away
    from 1 and the gradient is another model's. Captions differ in length, so that a path's own mask shows.
    """
    (policy, *caption), u = backbone, torch.rand(3, 2, 16, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(cfg_scale, 0.8, top_k)
    tokens, sampled = (x.flatten(0, 1) for x in policies.generate(policy, *caption, u, sampling))
    rows = [x.repeat_interleave(2, 0) for x in caption]
    given, absent = policy(*rows, tokens[:, :-1], use_cfg=True).detach().chunk(2)  # (6, 16, V)
    logits = (absent + cfg_scale * (given - absent)) / 0.8
    if top_k:
        logits = logits.where(logits >= logits.sort().values[..., -top_k:][..., :1], -torch.inf)
    else:
        logprobs, entropy = policies.score_tokens(policy, *rows, tokens, sampling)
        close(logprobs, sampled, atol=1e-5)
        close(entropy, torch.distributions.Categorical(logits=logits).entropy())
    chances = logits.softmax(-1)
    assert torch.equal(tokens, (chances.cumsum(-1) > u.view(6, 16, 1)).int().argmax(-1))
    close(sampled, chances.gather(-1, tokens[..., None])[..., 0].log())


def test_a_recorded_step_is_replayed_for_each_token(backbone, monkeypatch):
    """Else a GPU draws a token twice or leaves one out at a bucket's end, or other tokens than a CPU, since a
    recorded step looks at all positions of its bucket: also where nothing is yet. The recorder is a stand-in.
    """
    ran, u = [], torch.rand(3, 2, 16, generator=torch.Generator().manual_seed(3))

    @contextlib.contextmanager
    def record(graph, **options):
        yield
        graph.replay = lambda kv_len=ran.pop(): ran.append(kv_len)  # a recording runs nothing

    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", record)
    policies.decode_n_tokens(ran.append, 12, 15, use_cuda_graph=True, bucket=6)
    assert ran == [18] * 6 + [24] * 6 + [27] * 3  # the caption's 12 and a bucket's
    expected = policies.generate(*backbone, u, Sampling(2.0))
    monkeypatch.setattr(policies, "decode_n_tokens", lambda step, *_, **options: [step(kv_len) for kv_len in ran])
    close(policies.generate(*backbone, u, Sampling(2.0)), expected, atol=1e-5)


def test_nothing_in_sampling_waits_for_the_device(backbone):
    """Else every token stops the GPU, or no step can be recorded. Tensors without contents cannot be read."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        tokens, _ = policies.generate(*backbone, torch.rand(3, 2, 16), Sampling(3.0, 1.0, 50))
        with pytest.raises(Exception, match="_local_scalar_dense"):
            tokens.sum().item()  # as any such step would


def test_checkpointing_and_chunks_change_memory_not_gradients(backbone):
    """Else gradient checkpointing trains another model, or saves no memory; or train() and eval() differ."""
    policy, cond, mask = backbone
    results, kept, weights = [], [], [w for w in policy.parameters() if w.requires_grad]
    for checkpointing, chunk, training in ((False, 16, False), (True, 16, True), (True, 5, False), (False, 7, True)):
        saved, args = [], (reference("llamagen.tokens"), Sampling(3.0, 0.9), checkpointing, chunk)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            logprobs = policies.token_logprobs(policy.train(training), cond, mask, *args)
        sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
        kept.append(sum(sizes.values()) - sum(sizes.get(w.data_ptr(), 0) for w in policy.parameters()))
        results.append([logprobs, *torch.autograd.grad(logprobs.square().sum(), weights, materialize_grads=True)])
        for x, y in zip(results[0], results[-1], strict=True):
            close(y, x, atol=1e-5 * max(1, x.abs().max().item()), rtol=1e-5)
    assert kept[1] < 0.3 * kept[0]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_bf16_scores_what_it_sampled(backbone, device):
    """Else ratios of a run in bf16 start away from 1, or its log-probabilities are not those of float32."""
    policy, cond, mask, u = (copy.deepcopy(x).to(device) for x in (*backbone, torch.full((3, 1, 16), 0.4)))
    with torch.autocast(device, torch.bfloat16):
        tokens, sampled = (x[:, 0] for x in policies.generate(policy, cond, mask, u, Sampling(2.0)))
        scored = policies.token_logprobs(policy, cond, mask, tokens, Sampling(2.0))
    exact = policies.token_logprobs(policy, cond, mask, tokens, Sampling(2.0))
    assert (scored - sampled).abs().mean() < 2e-2 and (scored - exact).abs().mean() < 2e-2


# ---- the paper's equations -------------------------------------------------------------------------------------------


RATIOS, SIGNS = torch.tensor([[1.5, 0.5, 1.1], [1.5, 0.5, 1.1]]), torch.tensor([[2.0], [-1.0]])
CHANCES = torch.tensor([0.0, 0.2, 0.5, 0.0, 0.3, 0.0]).log()
DRAWN = policies.sample_token(CHANCES.expand(1000, -1), (torch.arange(1000) + 0.5) / 1000)
EQUATIONS = [
    (rankee.group_advantages(torch.tensor([[5.0, 5.0, 5.0, 5.0 + 1e-5]])), [[0, 0, 0, 0]]),  # rounding, no merit
    (rankee.group_advantages(torch.eye(64)[:1] * -100).min(), -5),  # an outlier
    (rankee.policy_loss(RATIOS.log(), 0, SIGNS, 0.2), [-(2.4 + 1.0 + 2.2 - 1.5 - 0.8 - 1.1) / 6, 4 / 6]),
    (rankee.rank_weights(torch.tensor([[2000.0, 3100.0]]), 1.0, 2)[0], [[2, 0]]),  # exp(3100) overflows
    (rankee.hinge_d_loss(torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0])), 0.5 * (2.5 / 3 + 1 / 2)),
    ([rankee.tau_at(n, 100, 4.0, 1.0) for n in (0, 5, 20, 99)], [4.0, 1 + 1.5 * (1 + math.sqrt(0.5)), 1.0, 1.0]),
    (torch.bincount(DRAWN, minlength=6), [0, 200, 500, 0, 300, 0]),
    (policies.sample_token(CHANCES.expand(2, -1), torch.tensor([0.0, 1 - 2**-24])), [1, 4]),  # none of chance 0
    (policies.logits_to_logprobs(CHANCES[None], Sampling(top_k=2)).exp(), [[0, 0, 5 / 8, 0, 3 / 8, 0]]),
]


@pytest.mark.parametrize("value, expected", EQUATIONS)
def test_equations(value, expected):
    """Else the policy is pushed by a caption's difficulty or without bound, a weight meets another sample's
    image, the discriminator pulls the wrong way, or rollouts are biased samples of the policy.
    """
    close(torch.as_tensor(value, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), atol=1e-5)


def test_random_streams_never_coincide():
    """Else seeds (0 and 33554432 did), steps or processes draw the same, or a resumed run draws others."""
    keys = [(seed, purpose, *index) for seed in (0, 33554432) for purpose in "ab" for index in ((), (1, 2), (2, 1))]
    draws = [rankee.uniform(rankee.random_stream(*key), 4).tolist() for key in keys * 2]
    assert draws[: len(keys)] == draws[len(keys) :] and len(set(map(tuple, draws))) == len(keys)


# ---- the two stages, on networks that take a moment ------------------------------------------------------------------

CFG = rankee.Config(max_steps=10, group_size=4, cfg_scale=2.0, micro_batch_size=3, disc_start=0, policy_ema_every=1)
TINY_GPT = policies.GPTConfig(32, 2, 16, 32, vocab_size=16, cls_token_num=4, caption_dim=8, grid_size=4)
TINY_VQ = vqs.VQConfig(32, (1, 1), 1, z_channels=32, codebook_size=16, codebook_dim=4)


class Redness:
    """A reward with a known direction: an image's mean red, ×100."""

    def __init__(self, slope, device="cpu"):
        self.slope, self.encode_text = slope, lambda captions: torch.zeros(len(captions), 1, device=device)

    def __call__(self, images, text_emb):
        return self.slope * 100 * images[:, 0].mean((1, 2))


def text_encoder(captions):
    rows = [torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in (2, 4, 3, 1)[: len(captions)]]
    return policies.left_pad(rows, 4)


def make_models(cfg, scorer=Redness(1.0), **given):
    """Random networks, the same in every call, but for those `given`."""
    torch.manual_seed(0)
    policy, vq = policies.Policy(TINY_GPT), vqs.VQModel(TINY_VQ)
    nn.init.normal_(policy.output.weight, std=0.3)  # rollouts must differ
    nn.init.normal_(vq.decoder.conv_out.weight, std=0.1)
    lpips = vqs.LPIPS([nn.Conv2d(3, 8, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3))], [torch.rand(8)] * 2)
    discriminator = vqs.patch_discriminator(ndf=8, n_layers=1, kernel=3)
    networks = {"policy": policy, "vq": vq, "scorer": scorer, "lpips": lpips, "discriminator": discriminator}
    world = SimpleNamespace(text_encoder=text_encoder, **(networks | given))
    return rankee.Models(world, torch.autocast("cpu", enabled=False), cfg)


def batch(captions=2):
    """Captions, real images and the rollouts' random numbers."""
    generator = torch.Generator().manual_seed(3)
    images, u = (torch.rand(captions, *shape, generator=generator) for shape in ((3, 8, 8), (4, 16)))
    return CAPTIONS[:captions], images * 2 - 1, u


def play(cfg, scorer=Redness(1.0), steps=1):
    """Models after some steps, and the log of the last."""
    models, (captions, images, u) = make_models(cfg, scorer), batch()
    for step in range(steps):
        logs = rankee.train_step(models, captions, images, u, step, cfg)
    return models, logs


def moved(cfg, models, name):
    """The entries of models.NAME that are no longer as `make_models` made them."""
    return changed(*(getattr(m, name).state_dict() for m in (make_models(cfg), models)))


@pytest.mark.parametrize("method, every", [("rl", 1), ("sft", 1), ("decoder", 1), ("ranke", 1), ("ranke", 2)])
def test_each_stage_moves_its_own(method, every):
    """Else "standard RL" is not the frozen-decoder method that RankE is compared with; or stage 2 moves
    encoder or codebook, and tokens change their meaning under the policy; or an "EMA decoder" is the online
    decoder, or one that never moves.
    """
    cfg = replace(CFG, method=method, policy_ema_every=every, policy_ema=0.9, policy_lr=0.1, decoder_lr=0.1)
    models, _ = play(cfg)
    policy, vq, discriminator, lpips = (moved(cfg, models, n) for n in ("policy", "vq", "discriminator", "lpips"))
    assert bool(policy) == (method != "decoder") and bool(discriminator) == cfg.trains_decoder and not lpips
    ours = {name for name in models.vq.state_dict() if name.startswith(("decoder.", "post_quant_conv."))}
    assert vq == (ours if method in ("ranke", "decoder") else set())
    for name, decay in {"policy": 0.9 if every == 1 else 1.0, "vq": 0.99}.items():
        x, y = (getattr(m, name).state_dict() for m in (make_models(cfg), models))
        ema = {entry: decay * x[entry] + (1 - decay) * y[entry] for entry in x}
        close(getattr(models, f"{name}_ema").state_dict(), ema, atol=1e-6)


@pytest.mark.parametrize("ref, guided", [("ema", False), ("initial", True)])
def test_stage_1_is_the_papers_gradient(ref, guided):
    """Else a micro-batch's scale, a row's advantage or mask, π_old or the reference is another than in the
    equation, read slowly, all rows at once.
    """
    cfg = replace(CFG, policy_lr=0.1, kl_coef=0.5, max_grad_norm=1e9, top_k=0)
    cfg = replace(cfg, ref_policy=ref, cfg_logprobs=guided)
    models, slow = make_models(cfg), make_models(cfg)
    models.policy_optimizer = torch.optim.SGD(models.policy.parameters(), 0.1)  # Adam would hide a gradient's scale
    for m in (models, slow):  # the policy is no longer its reference
        nn.init.eye_(m.policy.layers[0].attention.wo.weight)
    rollouts = rankee.rollout(models, CAPTIONS[:2], batch()[2], cfg)
    logs = rankee.update_policy(models, rollouts, 0, cfg)
    rows = [x.repeat_interleave(4, 0) for x in text_encoder(CAPTIONS[:2])]

    def score(policy):
        return policies.token_logprobs(policy, *rows, rollouts.tokens, Sampling(2.0 if guided else 1.0))

    r, old, weights = rollouts.rewards, score(slow.policy).detach(), list(slow.policy.parameters())
    advantages = ((r - r.mean(1, True)) / r.std(1, keepdim=True)).reshape(-1, 1)
    logprobs = score(slow.policy)
    ratio, kl = (logprobs - old).exp(), (logprobs - score(slow.policy_ema)).square() / 2
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    (0.5 * kl - gain).mean().backward()
    torch.optim.SGD(weights, 0.1).step()
    for x, y in zip(models.policy.parameters(), weights, strict=True):
        close(x, y, atol=2e-6, rtol=1e-5)
    gap = (old - rollouts.sampling_logprobs).mean().item()  # zero only where what is scored is what was sampled
    assert (abs(gap) < 1e-5) == guided and kl.mean() > 1e-3
    expected = {"kl": kl.mean().item(), "policy_loss": -gain.mean().item(), "logprob_gap": gap}
    assert {name: logs[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("dropped", [0.0, 1.0])
def test_sft_is_cross_entropy_on_real_images(dropped):
    """Else the paper's second row is another loss, or guidance is never learned: with all captions dropped the
    policy must not know which caption it is.
    """
    cfg, (captions, images, u) = replace(CFG, method="sft", caption_dropout=dropped, micro_batch_size=1), batch()
    models, slow = make_models(cfg), make_models(cfg)
    nn.init.normal_(slow.policy.cls_embedding.uncond_embedding)
    models.policy.load_state_dict(slow.policy.state_dict())
    cond, mask = text_encoder(captions)
    if dropped:
        cond = slow.policy.cls_embedding.uncond_embedding.expand_as(cond)
    codes = slow.vq.encode(images)
    logits = slow.policy(cond, mask, codes[:, :-1])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten())
    loss.backward()
    logs = rankee.train_step(models, captions, images, u, 0, cfg)
    norm = torch.cat([w.grad.flatten() for w in slow.policy.parameters() if w.grad is not None]).norm().item()
    assert [logs["policy_loss"], logs["policy_grad_norm"]] == pytest.approx([loss.item(), norm], rel=1e-4)


@pytest.mark.parametrize("gan, rank_k, step", [("rank", 0, 2), ("uniform", 0, 2), ("rank", 1, 1), ("rank", 3, 2)])
def test_stage_2_is_the_papers_gradient(gan, rank_k, step):
    """Else Rank-GAN does not favour preferred samples, K = 1 is not best-of-G, "uniform" is no ablation, the
    anchors do not pull back, a weight meets another image, or a discriminator that knows nothing steers the
    decoder before `disc_start`: a slow reading of all terms, sample by sample.
    """
    zscore = rank_k == 3
    cfg = replace(CFG, gan=gan, rank_k=rank_k, rank_zscore=zscore, disc_start=2, disc_lr=0.0, max_grad_norm=1e9)
    cfg = replace(cfg, lambda_d=0.02, lambda_g=3.0, lambda_r=2.0, lambda_c=5.0, tau_start=0.5, tau_end=0.5)
    models, m, (captions, images, u) = make_models(cfg), make_models(cfg), batch()
    models.decoder_optimizer = torch.optim.SGD(models.vq.decoder_parameters(), 1.0)
    rollouts, losses, disc_weight = rankee.rollout(models, captions, u, cfg), [], 0.5 if step == 2 else 0.0
    assert rollouts.rewards.std(1).min() > 0.1  # or all weights would be alike
    rollouts.images = rollouts.images.roll(1, 0)  # as if the decoder had left its EMA
    for b, rewards in enumerate(rollouts.rewards):
        rewards = (rewards - rewards.mean()) / rewards.std() if zscore else rewards
        kept = sorted(range(4), key=lambda i: -rewards[i])[: rank_k or 4]
        for i in kept:
            w = len(kept) / sum(math.exp((rewards[k] - rewards[i]) / 0.5) for k in kept)
            image = m.vq.decode(rollouts.tokens[4 * b + i][None]).clamp(-1, 1)
            gan_loss = -3.0 * disc_weight * (w if gan == "rank" else 1) * m.discriminator(image).mean()
            consistency = 5.0 * m.lpips(image, rollouts.images[4 * b + i][None])[0]
            losses.append(gan_loss + consistency - 0.02 * w * 100 * image[0, 0].mean())
    recon, weights = m.vq.decode(m.vq.encode(images)), m.vq.decoder_parameters()
    similar, gan_loss = (images - recon).abs().mean() + m.lpips(images, recon).mean(), -m.discriminator(recon).mean()
    last = [torch.autograd.grad(x, weights, retain_graph=True)[-2].norm() for x in (similar, gan_loss)]
    loss = sum(losses) / len(losses) + 2.0 * (similar + disc_weight * last[0] / (last[1] + 1e-4) * gan_loss)
    logs = rankee.update_decoder(models, rollouts, images, step, cfg)
    assert logs["decoder_loss"] == pytest.approx(loss.item(), rel=1e-4)
    for x, y, grad in zip(weights, models.vq.decoder_parameters(), torch.autograd.grad(loss, weights), strict=True):
        assert (x - y - grad).norm() <= 1e-3 * grad.norm() + 1e-5


def test_all_parameter_groups_learn_at_the_schedules_rate():
    """Else a group that an edit adds (LoRA, a codebook) is neither averaged, clipped nor checked, and keeps its
    rate; or the first of two steps of warm-up has the whole rate.
    """
    cfg = replace(CFG, method="rl", policy_lr=0.2, warmup_steps=1)
    models, (captions, images, u) = make_models(cfg), batch()
    norm, *others = [models.policy.norm.weight, *(w for w in models.policy.parameters())]
    others = [w for w in others if w is not norm]
    models.policy_optimizer = torch.optim.SGD([{"params": others}, {"params": [norm]}], 7.0)
    before, logs = norm.detach().clone(), rankee.train_step(models, captions, images, u, 0, cfg)
    assert [group["lr"] for group in models.policy_optimizer.param_groups] == [0.1, 0.1] and (norm != before).any()
    assert norm.grad is None and logs["policy_grad_norm"] == pytest.approx(play(cfg)[1]["policy_grad_norm"], rel=1e-5)


def test_reward_reaches_the_decoders_last_layer(clip_score):
    """Else stage 2's reward term (CLIP's) is a constant, as through a PIL image, and λ_d changes nothing."""
    cfg = replace(CFG, method="decoder", disc_weight=0.0, lambda_c=0.0, lambda_r=0.0, weight_decay=0.0)
    models, logs = play(cfg, clip_score)
    assert logs["decoder_grad_norm"] > 0 and "decoder.conv_out.weight" in moved(cfg, models, "vq")


def test_an_update_that_is_not_finite_is_not_made():
    """Else NaN spreads to all weights, and a run of days ends with nothing. The discriminator's is finite."""
    models, logs = play(CFG, Redness(math.nan))
    assert all(math.isnan(logs[name]) for name in ("reward", "policy_grad_norm", "decoder_grad_norm"))
    assert [bool(moved(CFG, models, name)) for name in ("policy", "vq", "discriminator")] == [False, False, True]
    assert not models.policy_optimizer.state and all(w.grad is None for w in models.policy.parameters())


# ---- one step of the authors' trainers -------------------------------------------------------------------------------

# What the trainers of github.com/syjmelody/RankE at 2798acc compute in one step, in float32, on small networks whose
# weights are functions of their names. "meta" has the shapes and each case's settings, of which those that OUR_NAMES
# leaves out are our defaults.
STEP = np.load(HERE / "testdata" / "release_step.npz")
STEP_META = json.loads(str(STEP["meta"]))
STEP_INPUTS = r"meta|in\.|loss\.\w*logprobs|(advantages|weights)\.\w*rewards|tau\.steps|ema\.\w+\.(model|before|decay)"
OUR_NAMES = """lambda_decoder_reward=lambda_d lambda_decoder_gan=lambda_g lambda_decoder_consistency=lambda_c
lambda_reconstruction=lambda_r learning_rate_gpt=policy_lr learning_rate_decoder=decoder_lr learning_rate_disc=disc_lr
rejection_sample_k=rank_k disc_weight=disc_weight max_grad_norm=max_grad_norm weight_decay=weight_decay"""


def stored(name):
    return torch.from_numpy(STEP[name])


def stored_weights(name, copy=""):
    """A network's entries; those of its `copy`, "ref" or "ema", are a little away from them."""
    part = STEP_META[name]
    prefix, by = part.get(copy, [f"{copy}.", 0.1])
    entries, others = (fill(part["shapes"], part.get("scale"), p) for p in ("", prefix))
    moved = ("decoder.", "post_quant_conv.") if name == "vq" else ""
    return {n: x + by * others[n] if copy and n.startswith(moved) else x for n, x in entries.items()}


def stored_models(cfg, name, autocast):
    """The stored networks; `name` is the policy's: "policy", LlamaGen's, or "janus"."""
    conv, normalize = nn.Conv2d(3, 4, 5, 4), Normalize(STEP_META["lpips"]["mean"], STEP_META["lpips"]["std"])
    vgg = nn.Sequential(normalize, nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, 1, 1))
    lpips = vqs.LPIPS([vgg[:2], vgg[2:]], [torch.zeros(8), torch.zeros(16)])
    disc = vqs.patch_discriminator(*STEP_META["disc"]["args"])
    for judge, module in {"reward": conv, "lpips": lpips, "disc": disc}.items():  # stored in their own order
        module.load_state_dict(dict(zip(module.state_dict(), stored_weights(judge).values(), strict=True)))
    scorer = lambda images, text_emb: 150 * torch.cosine_similarity(conv((images + 1) / 2).flatten(1), text_emb)
    load = load_janus if name == "janus" else load_llamagen
    policy, ref_policy, policy_ema = (load(stored_weights(name, copy), 8) for copy in ("", "ref", "ema"))
    policy.requires_grad_()  # the authors train Janus' words too
    vq, vq_ema = (vqs.load_vq(stored_weights("vq", copy)) for copy in ("", "ema"))
    models = make_models(cfg, scorer, policy=policy, vq=vq, lpips=lpips, discriminator=disc)
    models.ref_policy, models.policy_ema, models.vq_ema, models.autocast = ref_policy, policy_ema, vq_ema, autocast
    for optimizer in (models.policy_optimizer, models.decoder_optimizer, models.disc_optimizer):
        optimizer.zero_grad = lambda: None  # gradients stay, as AdamW was given them
    return models


def play_stored_step(name, autocast=contextlib.nullcontext()):
    """Both stages of a step: our values by the authors' names for them."""
    case, part = STEP_META["cases"].get(name, STEP_META["cases"]["k1_before"]), "janus" if name == "janus" else "policy"
    one, two = ("janus.stage1", "janus.stage2") if name == "janus" else (f"stage1.{name}", f"stage2.{name}")
    given = {ours: case[theirs] for theirs, ours in (pair.split("=") for pair in OUR_NAMES.split())}
    cfg = rankee.Config(**given, ref_policy="initial", disc_fakes="reconstructions", tau_steps=0, micro_batch_size=24)
    m, step, rewards = stored_models(cfg, part, autocast), case["step"], stored("rewards")
    words = [torch.tensor(ids) for ids in STEP_META["janus"]["prompt_ids"]]
    captions = {"janus": policies.left_pad(words, 12), "padded": (stored("in.cond"), stored("in.cond_mask"))}
    captions = captions.get(name, (stored("in.cond_one"), torch.ones(3, 1).bool()))
    rows = [x.repeat_interleave(8, 0) for x in (*captions, stored("in.text_emb"))]
    tokens, real = stored("in.tokens").long(), stored("in.images") / 127.5 - 1
    rollouts = rankee.Rollouts(*rows, tokens, torch.zeros(tokens.shape), m.vq_ema.decode(tokens).detach(), rewards)
    ours = {"real_codes": m.vq.encode(real), "rewards": m.scorer(rollouts.images, rollouts.text_emb)}
    for log, policy in {"logprobs": m.policy, "ref_logprobs": m.ref_policy}.items():
        ours[f"{one}.{log}"] = policies.token_logprobs(policy, *rows[:2], tokens)
    ours[f"{one}.advantages"] = rankee.group_advantages(rewards)

    logs = rankee.update_policy(m, rollouts, step, cfg)
    ours |= {f"{one}.{log}": x for log, x in logs.items()} | {f"{one}.grad_norm": logs["policy_grad_norm"]}
    logs = {"rank_gan_loss": 0.0} | rankee.update_decoder(m, rollouts, real, step, cfg)
    ours |= {f"{two}.loss.{log.removesuffix('_loss')}": x for log, x in logs.items()}
    ours |= {f"{two}.loss.total": logs["decoder_loss"], f"{two}.grad_norm": logs["decoder_grad_norm"]}
    # Theirs neither learns nor steers before disc_start, and counts disc_weight in the discriminator's loss.
    weight = cfg.disc_weight if step >= cfg.disc_start else 0.0
    ours[f"{two}.loss.disc_loss"] = weight * logs["disc_loss"]
    ours[f"{two}.disc_grad_norms"] = [weight * w.grad.norm() for w in m.discriminator.parameters()]
    ours[f"{two}.tau"] = rankee.tau_at(step, cfg.max_steps, cfg.tau_start, cfg.tau_end)
    for stage, part, network, ema in ((one, part, m.policy, m.policy_ema), (two, "vq", m.vq, m.vq_ema)):
        rankee.ema_update(ema, network, case["ema_decay_vq"])
        gradients = {n: w.grad for n, w in network.named_parameters() if w.grad is not None}
        gradients = janus.janus_state_dict(gradients, 16) if part == "janus" else gradients
        ours |= {f"{stage}.grad.{n}": x for n, x in gradients.items()}
        ours |= {f"{stage}.ema.{n}": x for n, x in ema.named_parameters()}
        ours[f"{stage}.grad_norms"] = [gradients[n].norm() for n in STEP_META[part]["names"]]
    return ours


def step_difference(name, ours):
    """‖ours − theirs‖ / ‖theirs‖. Each of a list of norms is divided by itself, or a thousandth of the whole if
    that is more; an EMA by a thousandth of its norm, about the way it goes in a step.
    """
    theirs = stored(name).double()
    scale = theirs.norm().clamp(min=1e-3) * (1e-3 if "ema." in name else 1.0)
    scale = theirs.clamp(min=1e-3 * scale) if "grad_norms" in name else scale
    return ((torch.as_tensor(ours).view_as(theirs) - theirs) / scale).norm().item()


def test_a_step_is_the_authors():
    """Else the method is not the paper's, even under its authors' settings: an advantage, a log-probability, a
    reward, a loss, a gradient or an EMA is another than in their code. All that they computed is compared.
    """
    logprobs, advantages = stored("loss.logprobs").requires_grad_(), rankee.group_advantages(stored("rewards"))
    loss, _ = rankee.policy_loss(logprobs, stored("loss.old_logprobs"), advantages.view(-1, 1), 0.2)
    kl, rewards = rankee.kl_anchor(logprobs, stored("loss.ref_logprobs")), stored("weights.rewards")
    ours = {"loss.policy_loss": loss, "loss.kl": kl, "loss.grad": torch.autograd.grad(loss + 0.05 * kl, logprobs)[0]}
    for kind in ("", "wide_"):
        ours[f"advantages.{kind}expected"] = rankee.group_advantages(stored(f"advantages.{kind}rewards"))
    ours["tau.expected"] = [rankee.tau_at(n, 6000, 4.0, 1.0) for n in STEP["tau.steps"]]
    for k, tau in [(k, tau) for k in (1, 3, 8) for tau in (4.0, 2.5, 1.0)]:
        ours[f"weights.k{k}.tau{tau}"], ours[f"weights.k{k}.index"] = rankee.rank_weights(rewards, tau, k)
    for name in ("ema.gpt", "ema.vq"):
        slow, fast = (nn.ParameterList([stored(f"{name}.{which}")]) for which in ("before", "model"))
        rankee.ema_update(slow, fast, STEP[f"{name}.decay"].item())
        ours[f"{name}.after"] = slow[0]
    for name in (*STEP_META["cases"], "one", "padded"):
        ours |= play_stored_step(name)
    differences = {n: step_difference(n, ours[n]) for n in STEP.files if not re.match(STEP_INPUTS, n)}
    assert not {name: x for name, x in differences.items() if not x <= (1e-3 if re.search("stage|ema", name) else 1e-4)}


def test_bf16_is_the_policys_layers_alone():
    """Else one update of D_φ, less than bf16 resolves, moves LPIPS and the reward by chance; or the logged KL of
    two policies that are nearly one is bf16's rounding.
    """
    bf16, models, (captions, _, u) = torch.autocast("cpu", torch.bfloat16), make_models(CFG), batch()
    ours = play_stored_step("kG_after", bf16)
    assert all(step_difference(name, x) < 1e-3 for name, x in ours.items() if "stage2" in name and name in STEP)
    models.autocast, rollouts = bf16, rankee.rollout(models, captions, u, CFG)
    models.policy.output.weight.data *= 1 + 3e-4 * torch.randn(16, 32)
    assert 0 < rankee.update_policy(models, rollouts, 0, CFG)["kl"] < 1e-6


# ---- README ----------------------------------------------------------------------------------------------------------


def test_the_readme_names_what_there_is():
    """Else a reader looks for an option or a function that is gone, or the page outgrows its readers."""
    text = (HERE / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 160 and len(text.split()) <= 1800 and max(map(len, text.splitlines())) <= 120
    assert len(train.TrainConfig.__dataclass_fields__) <= 66
    help_ = train.option_parser().format_help()
    assert (
        max(map(len, help_.splitlines())) <= 80
        and "80; scenes" not in help_
        and "scenes\n                        80" in help_
    )
    options = set(re.findall(r"--[\w-]+", help_))
    others = set("--nproc_per_node --shutdown-timeout --help --preprocess --vq --seeds --study --pretrain".split())
    assert set(re.findall(r"(?<![\w|-])--[a-z][\w-]+", text)) <= options | others
    table = re.search(r"\| in the paper.*?\n\n", text, re.S).group()
    source = (HERE / "rankee.py").read_text("utf-8")
    for name in re.findall(r"`(\w+)`", table.split("\n", 2)[2]):
        assert hasattr(rankee, name) or f'"{name}"' in source, name


FLOORS = {"files": 0, "vq": 1, "policy": 1, "rankee": 2, "metrics": 2, "public": 3, "scenes": 3, "train": 4}


def test_imports_run_one_way():
    """Else what is the paper's hangs on what is not, and a reader meets a module before what it stands on."""
    for file in HERE.glob("**/*.py"):
        room = file.relative_to(HERE).parts[0].removesuffix(".py")
        if room not in {*FLOORS, "experiments"}:
            continue
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [x.name for x in getattr(node, "names", [])]
            for other in {name.split(".")[0] for name in names} - {room}:
                assert FLOORS.get(other, -1) < FLOORS.get(room, 5), f"{file} imports {other}"


def edits():
    """The exercises' edits, each the (file, hunks) of its diffs: a section's that follow each other."""
    for section in (HERE / "experiments" / "exercises.md").read_text("utf-8").split("\n## ")[1:]:
        for diffs in re.findall(r"(?:```diff\n.*?```\s*)+", section, re.S):
            files = re.findall(r"```diff\n--- (\w+)\.py\n(.*?)```", diffs, re.S)
            yield pytest.param(files, id=section.splitlines()[0])


EDIT_CFG = replace(CFG, policy_lr=1e-3, decoder_lr=1e-3, cfg_logprobs=True)


@pytest.fixture(scope="module")
def unedited_logs():
    return play(EDIT_CFG, steps=2)[1]


@pytest.mark.parametrize("files", list(edits()))
def test_the_exercises_edits_apply_and_run(monkeypatch, unedited_logs, files):
    """Else the first edit a reader tries fails, or changes nothing."""
    sources = {name: (HERE / f"{name}.py").read_text("utf-8") for name in ("policy", "vq", "rankee")}
    for name, hunks in files:
        for hunk in hunks.split("@@\n"):
            lines = hunk.splitlines()
            old, new = ("".join(f"{line[1:]}\n" for line in lines if line[0] == sign) for sign in "-+")
            assert f"\n{sources[name]}".count(f"\n{old}") == 1 and {line[0] for line in lines} == {"-", "+"}
            sources[name] = sources[name].replace(old, new)
    assert sum(len(re.findall("^[-+]", hunks, re.M)) for _, hunks in files) <= 10
    for name, here in {"policy": "policies", "vq": "vqs", "rankee": "rankee"}.items():  # what imports comes last
        module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(sources[name], module.__dict__)
        monkeypatch.setitem(globals(), here, module)
    models, logs = play(EDIT_CFG, steps=2)
    assert logs != unedited_logs and all(map(math.isfinite, logs.values()))
    assert ("quantize.embedding.weight" in moved(EDIT_CFG, models, "vq")) == ("quantize" in str(files))


def test_the_commands_of_exercises_and_comparison_are_understood():
    """Else the first run a class starts, or the last of an hour's comparison, ends with a usage message."""
    text = (HERE / "experiments" / "exercises.md").read_text("utf-8")
    commands = re.findall(r"^python train\.py (.*)", text, re.M)
    assert len(commands) > 10 and max(map(len, text.splitlines())) <= 120
    for command in [*commands, *compare.ABLATIONS.values()]:
        train.parse_config(command.format(folder=F).split())


# ---- metrics ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_score():
    return metrics.open_clip_score("ViT-B-32-quickgelu", F / "hps.pt")


def open_clips_score(model, image, caption):
    """open_clip's own: its transform of a PIL image, its tokenizer, its model."""
    x = open_clip.image_transform(28, is_train=False)(image)[None]
    return 100 * torch.cosine_similarity(model.encode_image(x), model.encode_text(open_clip.tokenize([caption]))).item()


@pytest.mark.parametrize("factor, atol", [(1, 1e-3), (3, 0.5)])  # resized as a tensor, not by PIL: nearly the same
def test_clip_score_is_open_clips(clip_score, factor, atol):
    """Else the reward is not CLIP's (the mean, the range, a logit scale)."""
    text_emb, image = clip_score.encode_text(CAPTIONS[:1]), pixels(28, 28, 3).repeat(factor, 0).repeat(factor, 1)
    x = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
    expected = open_clips_score(clip_score.model, Image.fromarray(image), CAPTIONS[0])
    assert clip_score(x, text_emb).item() == pytest.approx(expected, abs=atol)
    close(clip_score(3 * x, text_emb), clip_score((3 * x).clamp(-1, 1), text_emb), atol=0)  # no saved image differs


def measured(capfd, *arguments):
    """The numbers in the first line that `metrics.py` prints, and everything it says."""
    metrics.main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return [float(x) for x in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", out.splitlines()[0])], out + err


def test_fid_commands_are_what_they_say_of_the_images(inception, tmp_path, capfd):
    """Else the number in a table is not what a slow reading of the definition gives: all images at once, none
    turned upright, np.cov. The five features span few dimensions; in these the distance is the same. Or
    images behind a link do not count, hidden ones do, or a loop of links never ends.
    """
    images, a, b, file = [], tmp_path / "a", tmp_path / "b", tmp_path / "a.npz"
    for i, name in enumerate("a/0.png a/1.JPG away/2.webp b/0.png b/more/1.png a/.3.png a/.cache/4.png".split()):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(6, 8, 3, seed=i)).resize((80, 60)).save(tmp_path / name, exif=TURNED)
        image = Image.open(tmp_path / name).convert("RGB").crop((10, 0, 70, 60))  # as if saved at 48 px
        images.append(np.asarray(image.resize((48, 48), Image.Resampling.LANCZOS)))
    (a / "linked").symlink_to(tmp_path / "away")
    (tmp_path / "away" / "loop").symlink_to(a)
    (a / "notes.txt").touch()
    options = ["--inception", F / "inception.pth", "--image-size", 48]
    _, said = measured(capfd, "statistics", a, file, *options)
    assert f"3 images of {a} (1 other files left out), 3 read, clean preprocessing, --image-size 48" in said
    x = inception(metrics.preprocess(np.stack(images[:5]), "clean")).double().numpy()
    np.testing.assert_allclose(np.load(file)["sigma"], np.cov(x[:3], rowvar=False), atol=1e-4)  # as pytorch-fid reads
    few = x @ np.linalg.qr(x.T)[0]
    sides = [(side.mean(0), np.cov(side, rowvar=False)) for side in (few[:3], few[3:])]
    distance = pytest.approx(metrics.frechet_distance(*sides[0], *sides[1]), rel=1e-3)
    numbers, said = measured(capfd, "fid", file, b, *options)
    assert numbers == [distance] and "2 images of" in said and "biased" in said
    assert measured(capfd, "fid", file, file)[0] == [pytest.approx(0, abs=1e-9)]  # and no network is fetched


GREY, COLOUR = np.array([[0, 40, 80], [120, 200, 255]], np.uint8), pixels(2, 3, 3)
THREE, UNSEEN = np.dstack([GREY] * 3), 255 - GREY[..., None]  # at an alpha of GREY white shows by so much
KINDS = [
    (Image.fromarray(GREY), "png", THREE, {}),
    (Image.fromarray(GREY.astype(np.uint16) * 257), "png", THREE, {}),
    (Image.fromarray(GREY.astype(np.int32) * 257), "tif", THREE, {}),
    (Image.fromarray(GREY > 100), "png", (THREE > 100) * 255, {}),
    (Image.fromarray(np.dstack([COLOUR, GREY]), "RGBA"), "png", COLOUR * (GREY[..., None] / 255) + UNSEEN, {}),
    (Image.fromarray(np.dstack([GREY] * 2), "LA"), "png", THREE * (THREE / 255) + UNSEEN, {}),
    (Image.fromarray(np.dstack([GREY] * 4), "RGBA").convert("PA"), "tif", THREE * (THREE / 255) + UNSEEN, {}),
    (Image.fromarray(GREY.astype(np.uint16) * 257), "png", np.where(THREE, THREE, 255), {"transparency": 0}),
    (Image.fromarray(GREY).convert("P"), "png", np.where(THREE, THREE, 255), {"transparency": 0}),
    (Image.fromarray(np.dstack([COLOUR, 0 * GREY]), "CMYK"), "tif", 255 - COLOUR, {}),
    (Image.fromarray(COLOUR), "png", np.rot90(COLOUR, -1), {"exif": TURNED}),  # a quarter turn clockwise
    (Image.fromarray(GREY.astype(np.float32)), "tif", None, {}),
    (Image.fromarray(GREY.astype(np.int32) * 1000), "tif", None, {}),
    (Image.fromarray(GREY.astype(np.int32) - 100), "tif", None, {}),
]


@pytest.mark.parametrize("image, suffix, expected, options", KINDS)
def test_every_kind_of_image_is_read_on_purpose(tmp_path, image, suffix, expected, options):
    """Else a 16-bit image is nearly white, transparent pixels show what nobody sees (FID would say 16 for 0),
    or training data lie on their side, or FID reads other pixels than the published tools.
    """
    path = tmp_path / f"x.{suffix}"
    image.save(path, **options)
    with pytest.raises(ValueError, match="32 bits") if expected is None else contextlib.nullcontext():
        np.testing.assert_allclose(np.asarray(load_image(path, upright=True)), expected, atol=1)


def test_clip_command_is_open_clip_on_what_was_drawn(clip_score, tmp_path, capfd):
    """Else the published protocol is not the one measured: the prefix, the resize, or another image's
    caption; or a cut download counts; or `metrics.py` cannot measure what `--sample` drew.
    """
    end(start(f"{DRAW} --out {tmp_path} --sample {shlex.join(CAPTIONS)}"))
    images = sorted(tmp_path.rglob("*.png"))
    Image.fromarray(pixels(5, 7, 3)).resize((70, 50)).save(images[0])
    texts = [f"A photo depicts {caption}" for caption in CAPTIONS[:3]]
    expected = [open_clips_score(clip_score.model, Image.open(image), text) for image, text in zip(images, texts)]
    images[3].write_bytes(b"cut")
    numbers, said = measured(capfd, "clip", tmp_path, "--pretrained", F / "hps.pt")
    assert numbers == pytest.approx([np.mean(expected), np.std(expected) / 3**0.5], abs=2e-3)
    assert "00003/samples/0000.png" in said and "4 images" in said and "3 read" in said


def test_token_kl_command_is_the_closed_form(tmp_path, capfd):
    """Else the paper's latent covariate shift is another number, with the wrong sign, base or smoothing; or
    images are encoded in another size or range than the tokenizer was trained for.
    """
    sides, vq = [tmp_path / "a", tmp_path / "b"], load(VQ, vqs.load_vq)
    for side, image in zip(sides, (pixels(256, 320, 3), pixels(4, 5, 3).repeat(64, 0).repeat(64, 1))):
        side.mkdir()
        Image.fromarray(image).save(side / "0.png")
        np.save(side / "0.npy", vq.encode(to_pixels([image[:, 32:-32]])))
    p, q = ((np.bincount(np.load(side / "0.npy")[0], minlength=128) + 1) / (256 + 128) for side in sides)
    expected = [(p * np.log(p / q)).sum(), -(p * np.log2(p)).sum(), -(q * np.log2(q)).sum()]
    for options in (["--vocab-size", 128], ["--vq", VQ]):
        assert measured(capfd, "token-kl", *sides, *options)[0] == pytest.approx(expected, rel=1e-2)
        for side in sides:
            (side / "0.npy").unlink(missing_ok=True)  # or they would be read, and not the images


def test_token_kl_has_a_floor_of_its_own_counts(tmp_path, capfd):
    """Else a KL that two draws of one distribution have, so many tokens each, is taken for a shift."""
    for name, n in {"a": 4, "b": 6}.items():
        (tmp_path / name).mkdir()
        for i in range(n):
            np.save(tmp_path / name / f"{i}.npy", np.full(8, name == "a"))
    _, said = measured(capfd, "token-kl", tmp_path / "a", tmp_path / "b", "--vocab-size", 2)
    p = 25 / 26  # 3 files of 8 tokens, and one count added to each of two codes
    assert "real: 0, by 3 files of B against its other 3" in said
    assert f"3 files of A against the same others have {(2 * p - 1) * math.log(25):.6g}" in said


@pytest.mark.parametrize("main", [metrics.main, train.main])
def test_help_is_printed_to_any_screen(main):
    """Else --help is a traceback where λ or − cannot be printed, as in a log on Windows."""
    assert "--help" in end(start("--help", lambda: sys.stdout.reconfigure(encoding="ascii", errors="strict"), main))


@needs_gpu
@pytest.mark.parametrize("recorded, bucket", [(True, 6), (True, 128), (False, 128)])
def test_a_gpu_draws_what_a_cpu_draws(backbone, monkeypatch, recorded, bucket):
    """Else the CUDA graph, at a bucket's boundary or within it, draws other tokens than plain decoding; or
    plain decoding waits for the GPU, which PyTorch itself then says.
    """
    decode, u = policies.decode_n_tokens, torch.rand(3, 2, 16)
    expected, _ = policies.generate(*backbone, u, Sampling(3.0, 0.5, top_k=1))
    monkeypatch.setattr(policies, "decode_n_tokens", lambda *args, use_cuda_graph: decode(*args, recorded, bucket))
    args = [copy.deepcopy(x).cuda() for x in (*backbone, u)]
    torch.cuda.set_sync_debug_mode("default" if recorded else "error")
    try:
        tokens, _ = policies.generate(*args, Sampling(3.0, 0.5, top_k=1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(tokens.cpu(), expected)


@needs_gpu
def test_a_step_of_xls_shape_fits_into_24_gb():
    """Else LlamaGen-XL cannot be post-trained on a GPU of 24 GB. The second step has Adam's moments."""
    torch.cuda.reset_peak_memory_stats()
    with torch.device("cuda"):
        policy, vq = policies.Policy(policies.GPTConfig()), vqs.VQModel(vqs.VQConfig())
        discriminator, images, u = vqs.patch_discriminator(), torch.rand(4, 3, 256, 256), torch.rand(4, 8, 256)
    lpips = load(F / "vgg.pth", vqs.load_lpips, load_state_dict(F / "lpips.pth")).cuda()
    networks = {"scorer": Redness(1.0, "cuda"), "lpips": lpips, "discriminator": discriminator}
    cond, mask = torch.randn(4, 120, 2048).cuda(), (torch.arange(120) >= torch.tensor([[20], [90], [0], [50]])).cuda()
    cfg, autocast = rankee.Config(disc_start=0), torch.autocast("cuda", torch.bfloat16)
    world = SimpleNamespace(policy=policy, vq=vq, text_encoder=lambda captions: (cond, mask), **networks)
    models = rankee.Models(world, autocast, cfg)
    for step in range(2):
        logs = rankee.train_step(models, CAPTIONS, images * 2 - 1, u, step, cfg)
        assert all(map(math.isfinite, logs.values())), logs
    assert torch.cuda.max_memory_allocated() < 24e9
