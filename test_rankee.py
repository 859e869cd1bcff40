"""Each test names what would be wrong in the world if it failed. `pytest` runs all of them in minutes on two
cores.

testdata/reference.npz holds outputs of the public programs (LlamaGen, its VQ tokenizer, Janus, pytorch-fid,
clean-fid, LPIPS) on weights that are a function of their names, so that no weights need to be stored;
testdata/manifests.json the names and shapes of public checkpoints.
"""

import argparse
import contextlib
import copy
import ctypes
import hashlib
import http.server
import importlib
import json
import math
import multiprocessing
import os
import pickle
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
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import safetensors.torch
import scipy.linalg
import tokenizers
import torch
import transformers
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models import inception_v3, vgg16

import metrics
import policy as policies
import rankee
import train
import vq as vqs
from scenes import world

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


def fill(shapes, scale=None):
    """Entries by name, as the reference values were computed with: a random stream seeded by the name."""
    entries = {}
    for name, shape in shapes.items():
        x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
        if len(shape) > 1:
            x = x * np.sqrt((2 if len(shape) == 4 else 1) / np.prod(shape[1:]), dtype=np.float32)
        else:
            factor = {"weight": 0.1, "running_var": 0.1}.get(name.rsplit(".", 1)[1], 0.02)
            x = (factor == 0.1) + factor * (np.abs(x) if name.endswith("running_var") else x)
        entries[name] = torch.from_numpy(np.asarray(x, np.float32)) * (scale or {}).get(name, 1.0)
    return entries


def filled(name):
    return fill(META[name]["shapes"], META[name].get("scale"))


def load_llamagen(entries):
    return policies.load_llamagen(entries, grid_size=4, head_dim=16)


def load_janus(entries):
    sizes = {"language_config": META["janus"]["language_config"]}
    return policies.load_janus(entries, sizes, META["janus"]["pad_id"], grid_size=4)


@pytest.fixture(scope="module")
def llamagen():
    mask = reference("llamagen.caption_mask").bool()
    return load_llamagen(filled("llamagen")), reference("llamagen.caption_features"), mask


@pytest.fixture(scope="module")
def janus():
    """Prompts of 6, 3 and 9 words in one batch."""
    words = [torch.tensor(words) for words in META["janus"]["prompt_ids"]]
    return load_janus(filled("janus")), *policies.left_pad(words, 12)


@pytest.fixture(params=["llamagen", "janus"])
def backbone(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def llamagen_vq():
    return vqs.load_vq(filled("vq"))


# ---- miniatures of the public files ----------------------------------------------------------------------------------

F = Path(tempfile.mkdtemp(prefix="miniatures-"))
CKPT, VQ = F / "t2i_XL_stage1_256.pt", F / "vq_ds16_t2i.pt"
DRAW = f"--ckpt {CKPT} --vq {VQ} --t5 {F}/flan-t5-xl --image-size 32"
JUDGES = f"--reward-weights {F}/open_clip_model.safetensors --vgg {F}/vgg.pth --lpips {F}/lpips.pth"
SMALL = "--batch-size 2 --group-size 2 --workers 0 --save-every 2"
RUN = f"{DRAW} {JUDGES} {SMALL} --data {F}/pairs --max-steps 4 --disc-start 0 --policy-lr 1e-3"
SCENES = f"{SMALL} --max-steps 2 --real-batch-size 2 --eval-samples 16 --save-every 1"


def write_clips():
    """Small networks under open_clip's names, to be registered by `run`, and weights for them."""
    vision = {"layers": 1, "width": 64, "head_width": 32, "patch_size": 14, "image_size": 28}
    text = {"context_length": 16, "vocab_size": 49408, "layers": 1, "width": 32, "heads": 1}
    for name in ("ViT-L-14-quickgelu", "ViT-B-32-quickgelu", "ViT-H-14"):
        config = {"embed_dim": 32, "quick_gelu": "quick" in name, "vision_cfg": vision, "text_cfg": text}
        (F / f"{name}.json").write_text(json.dumps(config))
    state_dict = CLIP(32, CLIPVisionCfg(**vision), CLIPTextCfg(**text)).state_dict()
    safetensors.torch.save_file(state_dict, F / "open_clip_model.safetensors")
    torch.save({"epoch": 1, "state_dict": {n: x.half() for n, x in state_dict.items()}}, F / "hps.pt")


def write_t5():
    """A T5 encoder with a real tokenizer.json, which knows a few words."""
    words = ["<pad>", "</s>", "<unk>", *sorted(set(re.findall(r"\w+|,", f"{CAPTIONS} a photo of two red dogs")))]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(F / "flan-t5-xl")
    sizes = {"d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
    config = transformers.T5Config(vocab_size=len(words), **sizes)
    transformers.T5EncoderModel(config).save_pretrained(F / "flan-t5-xl")


def write_janus(vq):
    """Janus-Pro's folder, in bfloat16 as the public one, with a tokenizer of bytes, and entries we do not
    use.
    """
    config = policies.GPTConfig(64, 2, 16, 96, 64, 512, 0, 2, 1e-6, text_vocab_size=300)
    entries = policies.janus_state_dict(policies.Policy(config).state_dict(), 16)
    entries |= {f"gen_vision_model.{name}": x for name, x in vq.state_dict().items()}
    unused = ("vision_model.vision_tower.pos_embed", "aligner.layers.0.weight", "language_model.lm_head.weight")
    entries |= {name: torch.randn(3, 8) for name in unused}
    (F / "janus").mkdir()
    torch.save({name: x.bfloat16() for name, x in entries.items()}, F / "janus" / "pytorch_model.bin")
    (F / "janus" / "config.json").write_text('{"language_config": {"num_attention_heads": 4}}')
    special = ["<｜▁pad▁｜>", "<｜begin▁of▁sentence｜>", "<begin_of_image>", "<|User|>", "<|Assistant|>"]
    letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = letters, tokenizers.decoders.ByteLevel()
    options = {"initial_alphabet": letters.alphabet(), "special_tokens": special, "show_progress": False}
    tokenizer.train_from_iterator(CAPTIONS, tokenizers.trainers.BpeTrainer(vocab_size=300, **options))
    tokenizer.save(str(F / "janus" / "tokenizer.json"))


def write_pairs(folder):
    """Four images of different shapes with captions, and what a download leaves: half an image, one without a
    text.
    """
    folder.mkdir()
    for i, caption in enumerate(CAPTIONS):
        pixels = np.random.default_rng(i).integers(0, 256, (40 + 8 * i, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption, "utf-8-sig" if i else "utf-8")
    (folder / "broken.jpg").write_bytes((folder / "0.png").read_bytes()[:900])
    (folder / "broken.txt").write_text("half a picture")
    shutil.copy(folder / "0.png", folder / "mute.png")


@pytest.fixture(scope="session", autouse=True)
def miniatures():
    """Every public file in its true layout, with what LlamaGen leaves in its own, and pairs to train on."""
    torch.manual_seed(0)
    vq = vqs.VQModel(vqs.VQConfig(32, (1, 1, 1, 1, 1), 1, 32, 64))
    torch.save({"model": vq.state_dict()}, VQ)
    entries = policies.Policy(policies.GPTConfig(64, 2, 64, 96, 64, 12, 48, 2)).state_dict()
    entries["freqs_cis"] = torch.zeros(16, 32, 2)
    torch.save({"model": entries, "optimizer": {"state": {}}, "args": argparse.Namespace(lr=1.0)}, CKPT)
    with torch.device("meta"):
        vgg = vgg16().features.state_dict()
    vgg = {f"features.{name}": 0.05 * torch.randn(x.shape) for name, x in vgg.items()}
    torch.save(vgg | {"classifier.0.bias": torch.zeros(2)}, F / "vgg.pth", _use_new_zipfile_serialization=False)
    linear = {f"lin{i}.model.1.weight": torch.rand(1, n, 1, 1) for i, n in enumerate((64, 128, 256, 512, 512))}
    torch.save(linear, F / "lpips.pth")
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
    open_clip.add_model_config(F)
    change()
    main(arguments)


def start(arguments, change=lambda: None, main=train.main):
    """The command in a process of its own, a fork, which need not import; `change` is called in it first."""
    log = Path(tempfile.mktemp(dir=F))
    options = (main, shlex.split(arguments), log, change)
    process = multiprocessing.get_context("fork").Process(target=run, args=options)
    process.start()
    process.log = log
    return process


def end(process, status=0):
    """What a process has printed when it has ended, as it must, with `status`."""
    process.join(100)
    printed = process.log.read_text("utf-8", "replace")
    assert process.exitcode == status, printed[-3000:]
    return printed


def refused(capsys, arguments, lines=1):
    """What the command says where it refuses: one line, but for a progress bar or a list."""
    with pytest.raises(SystemExit) as stopped:
        train.main(shlex.split(arguments))
    printed = capsys.readouterr().err.removeprefix(train.option_parser().format_usage())
    said = [line for line in printed.splitlines() if line and "/s]" not in line]
    assert stopped.value.code == 2 and len(said) == lines, printed
    return printed


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_run(a, b):
    """Weights, EMA, moments, log and results, bit for bit; only the folder, its options and the seconds may
    differ.
    """
    x, y = (torch.load(out / "ckpt.pt") | {"config": None} for out in (a, b))
    logs = [[line | {"seconds": 0} for line in read_log(out)] for out in (a, b)]
    assert same(x, y) and logs[0] == logs[1] and len(logs[0]) == x["step"]
    for file in (*a.glob("results.json"), max(a.glob("preview*"))):
        assert file.read_bytes() == (b / file.name).read_bytes()
    for file in a.glob("[pv]*.pt"):
        assert same(vqs.load_state_dict(file), vqs.load_state_dict(b / file.name))
    assert not list(b.glob(".*"))


@pytest.fixture(scope="session")
def data_run():
    return F / "data", end(start(f"{RUN} --out {F}/data"))


@pytest.fixture(scope="session")
def scenes_run():
    return F / "scenes", end(start(f"{SCENES} --out {F}/scenes"))


# ---- whole runs ------------------------------------------------------------------------------------------------------


def moved(before, after):
    """The first words of the entries that differ; the names must be the same."""
    assert before.keys() == after.keys()
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def exports(out):
    """What differs in policy, policy_ema and vq from what the run began with."""
    policy, vq = vqs.load_state_dict(CKPT), vqs.load_state_dict(VQ)
    policy.pop("freqs_cis")
    names = {"policy": policy, "policy_ema": policy, "vq": vq}
    return [moved(before, vqs.load_state_dict(out / f"{name}.pt")) for name, before in names.items()]


def test_public_files_are_post_trained_and_come_back(data_run):
    """Else `--ckpt` is a code path and not a run: what it leaves loads strictly, by the public names, with
    encoder and codebook untouched, and all that the log promises is there.
    """
    out, printed = data_run
    log = read_log(out)
    assert len(log) == 4 and all(math.isfinite(value) for line in log for value in line.values())
    assert log[0]["reward_std"] > 0 and len(re.findall("^step ", printed, re.M)) == 4
    assert "mute.png: no caption" in printed and "broken.jpg" in printed
    policy, ema, vq = exports(out)
    assert policy and not ema and vq == {"decoder", "post_quant_conv"}  # that EMA moves every 10 steps
    assert Image.open(out / "preview-000004.png").size == (190 + 4 * 132, 24 + 8 * 132)  # 4 columns, 8 captions


@pytest.mark.parametrize(
    "method, logged, absent, trained",
    [
        ("rl --vgg '' --lpips ''", "policy_loss", "decoder_loss", "policy"),
        ("decoder", "decoder_loss", "policy_loss", "vq"),
        (f"ranke --reward hpsv2 --reward-weights {F}/hps.pt", "reward_loss", "none", "policy vq"),
    ],
)
def test_a_method_moves_what_it_names(tmp_path, method, logged, absent, trained):
    """Else an ablation's row is another method's, or standard RL asks for files and images that it never
    uses.
    """
    end(start(f"{RUN} --out {tmp_path}/run --max-steps 1 --method {method}"))
    (line,) = read_log(tmp_path / "run")
    policy, _, vq = exports(tmp_path / "run")
    assert logged in line and absent not in line
    assert bool(policy) == ("policy" in trained) and bool(vq) == ("vq" in trained)


def test_janus_is_post_trained_and_comes_back(tmp_path):
    """Else the paper's second backbone is a code path and not a run: what is saved is a folder in the same
    layout, every entry that was not trained as it was, from which --sample draws.
    """
    end(start(f"{RUN} --ckpt {F}/janus --out {tmp_path} --max-steps 1 --policy-ema-every 1"))
    preset = train.parse_config(["--ckpt", str(F / "janus"), "--data", "x"])
    assert [preset.cfg_scale, preset.top_k, preset.policy_lr, preset.lambda_d] == [5.0, 0, 1e-4, 0.05]
    was = vqs.load_state_dict(F / "janus")
    for name in ("policy", "policy_ema"):
        now = vqs.load_state_dict(tmp_path / name)
        changed = {name for name in now if now[name].dtype != torch.bfloat16 or not torch.equal(now[name], was[name])}
        parts = ("language_model.model.layers.", "language_model.model.norm", "gen_embed", "gen_aligner", "gen_head")
        parts += ("gen_vision_model.decoder.", "gen_vision_model.post_quant_conv")
        assert now.keys() == was.keys() and any("q_proj" in name for name in changed)
        assert all(name.startswith(parts) for name in changed)
        assert (tmp_path / name / "config.json").read_bytes() == (F / "janus" / "config.json").read_bytes()
    end(start(f"--ckpt {tmp_path}/policy --image-size 32 --out {tmp_path}/shown --sample 'a red bus'"))
    assert Image.open(tmp_path / "shown" / "00000" / "samples" / "0000.png").size == (32, 32)


# ---- downloads -------------------------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """The Hugging Face hub's URLs, and other files, by their last names; `cut` come in half."""

    bodies, requests, cut = [], [], {"lpips.pth"}

    def log_message(self, *_):
        pass

    def do_HEAD(self, send=False):
        path = self.path.split("?")[0]
        self.requests.append(path)
        name = path.split("/")[-1]
        content = next((file.read_bytes() for file in F.rglob(name) if "janus" not in file.parts), b"")
        if path.startswith("/api/models/"):
            names = [file.name for file in (F / "flan-t5-xl").iterdir()]
            tree = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in names]
            info = {"id": "google/flan-t5-xl", "sha": "a" * 40, "siblings": [{"rfilename": name} for name in names]}
            content = json.dumps(tree if "/tree/" in path else info).encode()
        elif send:
            self.bodies.append(name)
        self.send_response(200 if content else 404)
        etag = hashlib.sha256(content).hexdigest()
        for header in {"X-Repo-Commit": "a" * 40, "ETag": f'"{etag}"', "Content-Length": len(content)}.items():
            self.send_header(*map(str, header))
        self.end_headers()
        if send:
            self.wfile.write(content[: len(content) // 2] if name in self.cut else content)

    def do_GET(self):
        self.do_HEAD(send=True)


STARTS = """
import shlex, socket, sys, huggingface_hub, open_clip, train
open_clip.add_model_config(sys.argv[1])
connect, line = socket.socket.connect, sys.stdin.readline
while command := shlex.split(line()):
    offline, train.TrainConfig.vgg, train.TrainConfig.lpips, *arguments = command
    huggingface_hub.constants.HF_HUB_OFFLINE = offline == "offline"
    socket.socket.connect = None if offline == "offline" else connect
    try:
        train.main(arguments)
        print("status 0", flush=True)
    except SystemExit as stopped:
        print("status", stopped.code, flush=True)
"""


def test_public_files_are_fetched_once(tmp_path):
    """Else each start downloads gigabytes, a broken download is trained on, files are asked for one failed
    start at a time, or a machine without a network cannot use what lies there.
    """
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    environment = os.environ | {"HF_ENDPOINT": url, "HF_HOME": f"{tmp_path}/hf", "HF_HUB_CACHE": f"{tmp_path}/hf/hub"}
    environment |= {"TORCH_HOME": f"{tmp_path}/torch", "PYTHONPATH": str(HERE), "NO_PROXY": "127.0.0.1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    program = subprocess.Popen([sys.executable, "-c", STARTS, F], env=environment, **pipes)

    def begin(offline, vgg, lpips, arguments):
        """What one start says, its status the last word, and which files it fetched."""
        Hub.bodies.clear(), Hub.requests.clear()
        print(offline, vgg, lpips, arguments, file=program.stdin, flush=True)
        said = program.stdout.readline()
        while not re.search("^status .*\n", said, re.M):
            line = program.stdout.readline()
            assert line, said
            said += line
        return said, said.split()[-1], sorted(Hub.bodies)

    sums = [hashlib.sha256((F / f"{name}.pth").read_bytes()).hexdigest()[:8] for name in ("vgg", "lpips")]
    vgg, lpips, wrong = (f"{url}/{name}" for name in (f"vgg.pth#{sums[0]}", f"lpips.pth#{sums[1]}", "vgg.pth#00000000"))
    small = f"{SMALL} --ckpt {CKPT.name} --data {F}/pairs --image-size 32 --max-steps 1 --lpips {lpips} --vgg"
    try:
        said, status, _ = begin("offline", vgg, lpips, f"{small} {vgg} --out {tmp_path}/run")
        assert status == "2" and said.count("\n  --") == 6 and not list((tmp_path / "run").iterdir()), said
        for source in ("ckpt t2i_XL", "vq peizesun", "t5 google/flan-t5-xl", "reward-weights timm", "vgg h", "lpips h"):
            assert said.count(f"--{source}") == 1, said
        said, status, bodies = begin("online", wrong, lpips, f"{small} {wrong} --out {tmp_path}/run")
        assert status == "2" and said.count("\n  --") == 2 and "--vgg" in said and "--lpips" in said, said
        assert len(bodies) > 5 and not [path for path in (tmp_path / "torch").rglob("*") if path.is_file()]
        Hub.cut.clear()
        said, status, bodies = begin("online", vgg, lpips, f"{small} {vgg} --out {tmp_path}/run")
        assert status == "0" and bodies == ["lpips.pth", "vgg.pth"], said  # only what had not come whole
        said, status, bodies = begin("online", vgg, lpips, f"{small} {vgg} --out {tmp_path}/again")
        assert status == "0" and not bodies, said
        said, status, _ = begin("offline", vgg, lpips, f"{RUN} --max-steps 1 --out {tmp_path}/local")
        assert status == "0" and not Hub.requests, said
    finally:
        program.kill()
        server.shutdown()


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


def test_every_data_layout_gives_the_same_pairs(tmp_path, capsys):
    """Else a picture is trained on under another picture's caption, stretched, or in another range; or a name
    in a tar off the web makes a file outside of it.
    """
    shutil.copytree(F / "pairs", tmp_path / "pairs")
    write_tar(tmp_path / "shards" / "0.tar", {0: "x/0", 1: "x/1"})
    write_tar(tmp_path / "shards" / "1.tar", {2: "x/2", 3: "x/3"})
    write_tar(tmp_path / "a" / "b" / "evil.tar", {i: f"../../../{i}" for i in range(4)})
    write_coco(tmp_path / "annotations" / "captions_pairs.json", range(4))
    write_coco(tmp_path / "pairs" / "all.json", range(4), [(1, " ")])
    before = sorted(tmp_path.rglob("*"))
    for name in ("pairs", "shards", "a/b/evil.tar", "annotations/captions_pairs.json", "pairs/all.json"):
        data = train.CaptionedImages(train.list_pairs(tmp_path / name), 32)
        assert len(data) == (5 if name == "pairs" else 4)
        for i in range(4):
            pixels = Image.open(F / "pairs" / f"{i}.png")
            side = min(pixels.size)
            left, top = (pixels.width - side) / 2, (pixels.height - side) / 2
            expected = pixels.resize((32, 32), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
            assert data[i][0] == CAPTIONS[i] and (data[i][1] == np.asarray(expected)).all()
        if name == "pairs":  # the place of the image that cannot be read goes to the next
            assert data[4][0] == CAPTIONS[0] and "broken.jpg" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_images_stand_upright_and_captions_hold_any_separator(tmp_path, capsys):
    """Else photographs lie on their side in training, and one web caption with U+2028 moves all after it."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise: the left half comes on top
    for name in ("a", "none", "latin", "blank"):
        Image.fromarray(pixels).save(tmp_path / f"{name}.jpg", exif=exif)
    captions = ["a red\u2028bus", "two\x85cats"]
    for name, text in {"a": captions[0].encode(), "latin": b"caf\xe9", "blank": b" \n"}.items():
        (tmp_path / f"{name}.txt").write_bytes(text)
    pairs = train.list_pairs(tmp_path)
    caption, image = train.CaptionedImages(pairs, 32)[0]
    assert len(pairs) == 1 and caption == captions[0] and image[:14].min() > 200 and image[18:].max() < 50
    said = capsys.readouterr().err
    assert all(f"{name}.jpg: no caption, or not in UTF-8" in said for name in ("none", "latin", "blank"))
    (tmp_path / "prompts.txt").write_text("\n".join(captions) + "\n\n", "utf-8-sig")
    assert train.read_prompts([str(tmp_path / "prompts.txt")], 0) == [{"prompt": text} for text in captions]


def test_data_order_is_a_function_of_seed_and_step():
    """Else a resumed run trains on other pictures, an epoch leaves some out, or two processes train on the
    same.
    """
    batches = [list(train.batch_indices(10, 3, 0, range(10), rank, 2)) for rank in (0, 1)]
    order = [i for pair in zip(*batches) for batch in pair for i in batch]
    epochs = [order[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1]
    assert list(train.batch_indices(10, 3, 0, range(4, 10), 1, 2)) == batches[1][4:]
    assert list(train.batch_indices(10, 3, 1, range(10), 0, 2)) != batches[0]


def test_data_that_cannot_be_used(tmp_path, capsys):
    """Else a run starts on nothing, on half of a shard, or on a caption of another picture."""
    write_tar(tmp_path / "half.tar", {0: "0", 1: "1"})
    os.truncate(tmp_path / "half.tar", 10000)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text("[1, 2]")
    write_coco(tmp_path / "twice.json", [1, 1])
    write_coco(tmp_path / "none.json", [])
    expected = {"half.tar": "a tar that is whole", "bad.json": "a captions .json", "twice.json": "images have one id"}
    for name, says in (expected | dict.fromkeys(("empty", "none.json"), "no image with a caption")).items():
        line = refused(capsys, f"{RUN} --data {tmp_path}/{name} --out {tmp_path}/run")
        assert says in line and f"{tmp_path}/{name}: " in line, line


# ---- text ------------------------------------------------------------------------------------------------------------


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
    """Else T5 reads other words than in the policy's own training. Expected: LlamaGen's cleaning, by hand
    run.
    """
    assert policies.clean_caption(caption) == cleaned


def test_text_features_do_not_depend_on_the_batch():
    """Else a caption's features change with its neighbours' lengths. n words have n + 1 features, </s> the
    last.
    """
    encoder = policies.T5Encoder(F / "flan-t5-xl", 48, 12, "cpu", "cpu")
    cond, mask = encoder(CAPTIONS)
    assert mask.sum(1).tolist() == [4, 5, 6, 4] and mask[:, -4:].all()
    for row, row_mask, caption in zip(cond, mask, CAPTIONS):
        torch.testing.assert_close(row[row_mask], encoder([caption.upper() + "  "])[0][0], atol=1e-5, rtol=0)
    assert encoder(["a " * 50])[0].shape == (1, 12, 48)


def test_janus_prompts():
    """Else Janus reads another prompt than it was trained on, or a long caption cuts off what follows it."""
    ids, mask = policies.JanusTokenizer(F / "janus", "cpu")(["a red bus", "bus " * 1000])
    words = transformers.PreTrainedTokenizerFast(tokenizer_file=str(F / "janus" / "tokenizer.json"))
    begin, end_ = "<｜begin▁of▁sentence｜><|User|>: ", "\n\n<|Assistant|>:<begin_of_image>"
    assert words.decode(ids[0][mask[0]]) == f"{begin}a red bus{end_}" and ids.shape == (2, 512) and mask[1].all()
    assert words.decode(ids[1]).startswith(f"{begin}bus bus") and words.decode(ids[1]).endswith(f"bus{end_}")


# ---- images ----------------------------------------------------------------------------------------------------------


def test_samples_have_genevals_layout_and_stay(tmp_path, capsys):
    """Else its evaluator finds no image, 30,000 are drawn anew after a stop, or an image hangs on its
    neighbours.
    """
    out, lines = tmp_path / "out", [json.dumps({"tag": "two_object", "prompt": text}) for text in CAPTIONS]
    draw = f"{DRAW} --per-prompt 2 --out {out} --sample"
    (tmp_path / "g.jsonl").write_text("\n".join(lines[:2]) + "\n")
    end(start(f"{draw} {tmp_path}/g.jsonl"))
    assert [(out / f"{i:05d}" / "metadata.jsonl").read_text() for i in range(2)] == lines[:2]
    images = [out / f"{i:05d}" / "samples" / f"{k:04d}.png" for i in (0, 1) for k in (0, 1)]
    assert sorted(out.rglob("*.png")) == images and Image.open(images[0]).size == (32, 32)
    tokens = [np.load(path.with_suffix(".npy")) for path in images]
    assert tokens[0].shape == (4,) and len({row.tobytes() for row in tokens}) == 4

    times = [path.stat().st_mtime_ns for path in images]
    images[1].unlink()
    (tmp_path / "g.jsonl").write_text("\n".join(lines[:3]) + "\n")
    end(start(f"{draw} {tmp_path}/g.jsonl --rollout-batch-size 1"))
    kept = [path.stat().st_mtime_ns == t for path, t in zip(images, times)]
    assert kept == [True, False, True, True] and len(list(out.rglob("*.png"))) == 6
    assert (np.load(images[1].with_suffix(".npy")) == tokens[1]).all()
    assert "is of another caption" in refused(capsys, f"{draw} 'an old clock'")


def test_coco_is_sampled_and_measured_by_three_commands(tmp_path):
    """Else the README's protocol does not run: images of COCO's captions, FID against the real ones, CLIP,
    tokens.
    """
    write_coco(tmp_path / "coco.json", range(4), [(0, "two cats"), (3, " ")])
    a, b = tmp_path / "a", tmp_path / "b"
    for seed, out in enumerate((a, b)):
        draw = f"{DRAW} --rollout-batch-size 2 --num-images 3 --seed {seed} --out {out} --sample {tmp_path}/coco.json"
        assert "3 images of 3 captions" in end(start(draw))
    prompts = {json.loads(path.read_text())["prompt"] for path in a.rglob("metadata.jsonl")}
    assert len(prompts) == 3 and prompts < set(CAPTIONS)  # one caption an image, the first
    network = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False).state_dict()
    torch.save({name: x for name, x in network.items() if "tracked" not in name}, tmp_path / "inception.pth")
    for command, says in {
        f"fid {a} {F}/pairs --inception {tmp_path}/inception.pth --image-size 32": "FID",
        f"clip {a} --pretrained {F}/open_clip_model.safetensors": "CLIP",
        f"token-kl {a} {b} --vocab-size 64": "token KL",
    }.items():
        said = end(start(command, main=metrics.main))
        number = float(re.search(f"{says} ([-+.e0-9]+)", said)[1])
        assert -100 < number and (says != "FID" or number > 0) and (says == "token KL" or "3 read" in said), said


# ---- the command line ------------------------------------------------------------------------------------------------

ZEROS = "max-steps batch-size micro-batch-size rollout-batch-size save-every policy-ema-every eval-samples temperature"


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("--gudance 3", "unrecognized arguments: --gudance"),
        ("--max 3", "unrecognized arguments: --max"),
        ("--policy-lr nan", "--policy-lr nan: expected 0 or more"),
        ("--seed -1", "--seed -1: expected 0 or more"),
        *((f"--{name} 0", f"--{name} 0") for name in ZEROS.split()),
        ("--max-steps many", "argument --max-steps: invalid int value: 'many'"),
        ("--gan ranked", "argument --gan: invalid choice: 'ranked'"),
        ("--rank-k 9", "--rank-k"),
        ("--group-size 1", "--group-size"),
        ("--out /proc/nothing", "/proc/nothing: "),
        ("--device tpu", "argument --device: invalid choice: 'tpu'"),
        ("--image-size 30", "--image-size 30: expected a multiple"),
        ("--resume", "ckpt.pt"),
        ("--sample a_bus", "a_bus"),
    ],
)
def test_settings_that_cannot_be_meant(capsys, tmp_path, arguments, says):
    """Else a typing mistake costs a night: it is ignored, or found after an hour."""
    assert says in refused(capsys, f"--out {tmp_path}/run {arguments}")


def test_the_options_are_few_and_can_be_printed_anywhere(tmp_path):
    """Else no one reads them, or a redirected run ends at its first λ."""
    options = set(re.findall(r"^  (--[a-z0-9-]+)", train.option_parser().format_help(), re.M))
    assert 40 < len(options) <= 60

    def western():
        sys.stdout = sys.stderr = open(tmp_path / "log", "w", encoding="cp1252")

    end(start("--help", western))
    assert "--lambda-d" in (tmp_path / "log").read_text("cp1252")
    end(start(f"--out {tmp_path}/日本 --sample 'small red plain circle top left on white'", western))
    assert list(tmp_path.rglob("日本/00000/samples/0000.png"))


class Bomb:
    def __reduce__(self):
        return print, ("this pickle ran code",)


def test_files_that_cannot_be_used(capsys, tmp_path):
    """Else training starts from random weights, from another model's, or from somebody's code; or PyTorch
    advises to set weights_only=False where a pointer or a web page was saved.
    """
    entries = vqs.load_state_dict(CKPT)
    fewer = {name: entries[name][:60] for name in ("tok_embeddings.weight", "output.weight")}
    narrow = {"uncond_embedding": torch.zeros(12, 40), "cap_proj.fc1.weight": torch.zeros(64, 40)}
    expected = {
        "truncated.pt": (CKPT.read_bytes()[:-2000], "expected an undamaged checkpoint"),
        "empty.pt": (b"", "expected an undamaged checkpoint"),
        "pointer.pt": (b"version https://git-lfs.github.com/spec/v1\n", "is text: a Git-LFS pointer or a web page"),
        "page.pt": (b"<!DOCTYPE html><html></html>", "is text: a Git-LFS pointer or a web page"),
        "bomb.pt": (pickle.dumps(Bomb()), "cannot be read"),
        "list.pt": ([1, 2], "other things than tensors"),
        "missing.pt": ({name: x for name, x in entries.items() if name != "norm.weight"}, "norm.weight"),
        "surplus.pt": (entries | {"extra.weight": torch.zeros(1)}, "extra.weight"),
        "shape.pt": (entries | {"norm.weight": torch.zeros(63)}, "norm.weight"),
        "codes.pt": (entries | fewer, "has 60 codes"),
        "narrow.pt": (
            entries | {f"cls_embedding.{name}": x for name, x in narrow.items()},
            "48 wide; the policy takes 40",
        ),
    }
    draw = f"{DRAW} --out {tmp_path}/out --sample clock"
    for name, (content, says) in expected.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            torch.save(content, tmp_path / name)
        line = refused(capsys, f"{draw} --ckpt {tmp_path}/{name}")
        assert says in line and "weights_only=False" not in line, line
    assert "encoder.conv" in refused(capsys, f"{draw} --vq {CKPT}")
    assert "expected a multiple" in refused(capsys, f"{draw} --image-size 40")
    for prefix in ("_orig_mod.module.", "module._orig_mod."):
        torch.save({prefix + name: x for name, x in entries.items()}, tmp_path / "wrapped.pt")
        assert same(vqs.load_state_dict(tmp_path / "wrapped.pt"), entries)

    t5, weights = tmp_path / "t5", "model.safetensors"
    t5.mkdir()
    assert "expected the folder of flan-t5-xl, whole" in refused(capsys, f"{draw} --t5 {t5}")
    for name in ("config.json", weights):  # without its tokenizer's files every word would be <unk>
        shutil.copy(F / "flan-t5-xl" / name, t5)
    assert f"{t5}: " in refused(capsys, f"{draw} --t5 {t5}")
    shutil.copytree(F / "flan-t5-xl", t5, dirs_exist_ok=True)
    entries = safetensors.torch.load_file(t5 / weights)
    del entries["encoder.final_layer_norm.weight"]
    safetensors.torch.save_file(entries, t5 / weights, {"format": "pt"})
    assert "lacks the weights ['encoder.final_layer_norm" in refused(capsys, f"{draw} --t5 {t5}")
    shutil.copy(tmp_path / "pointer.pt", t5 / weights)
    assert f"{weights} is text: a Git-LFS pointer" in refused(capsys, f"{draw} --t5 {t5}")
    open_clip.add_model_config(F)
    scorer = f"{RUN} --reward-weights {tmp_path}/pointer.pt --out {tmp_path}/run"
    assert "pointer.pt is text: a Git-LFS pointer" in refused(capsys, scorer, lines=2)  # one image has no caption
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.png"))


def test_janus_folders_that_cannot_be_used(capsys, tmp_path):
    """Else half a download or a foreign folder is post-trained. Shards are one whole."""
    folder = tmp_path / "janus"
    shutil.copytree(F / "janus", folder, ignore=shutil.ignore_patterns("*.bin"))
    entries = vqs.load_state_dict(F / "janus")
    draw = f"--ckpt {folder} --image-size 32 --out {tmp_path}/out --sample clock"
    for i in (0, 1):
        safetensors.torch.save_file(dict(list(entries.items())[i::2]), folder / f"model-{i}.safetensors")
    assert same(vqs.load_state_dict(folder), entries)
    (folder / "model-1.safetensors").unlink()
    assert str(folder) in refused(capsys, draw)
    (folder / "model-0.safetensors").unlink()
    extra = "language_model.model.layers.0.self_attn.q_norm.weight"
    torch.save(entries | {extra: torch.zeros(16)}, folder / "pytorch_model.bin")
    assert extra in refused(capsys, draw)
    (folder / "config.json").write_text('{"language_config": {"num_attention_heads": 4, "rope_theta": 5e5}}')
    assert "another rotary embedding" in refused(capsys, draw)
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused(capsys, draw)


def test_what_is_missing_is_said_at_once(capsys, tmp_path):
    """Else a user without --data trains on the folder that he stands in, or mends one path a start."""
    assert "--data DIR" in refused(capsys, RUN.replace(f"--data {F}/pairs", f"--out {tmp_path}/run"), lines=2)
    # Before anything is fetched:
    assert "/proc/no: cannot be made" in refused(capsys, f"{RUN} --vq gone --out /proc/no")
    gone = {name: f"--{name} {tmp_path}/gone-{name}" for name in ("vq", "t5", "vgg", "lpips", "data")}
    said = refused(capsys, f"{RUN} {' '.join(gone.values())}", lines=6)
    assert all(option in said for option in gone.values())


# ---- runs that survive -----------------------------------------------------------------------------------------------


def before_step(action):
    """Calls action(step, models) before each step."""
    step = train.train_step

    def train_step(models, captions, images, u, n, cfg):
        action(n, models)
        return step(models, captions, images, u, n, cfg)

    train.train_step = train_step


def kill_in_step():
    """In the fourth step, after the policy moved and before the decoder did."""
    update, called = rankee.update_decoder, []

    def update_decoder(*inputs):
        called.append(1)
        return os.kill(os.getpid(), 9) if len(called) == 4 else update(*inputs)

    rankee.update_decoder = update_decoder


def kill_in_save():
    """With half of the second checkpoint on the disk."""
    save, saved = torch.save, []

    def half(content, file):
        save(content, file)
        saved.append("config" in content)
        if sum(saved) == 2:
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), 9)

    torch.save = half


def test_a_killed_run_on_data_goes_on_bit_for_bit(data_run, tmp_path):
    """Else a night's crash costs the run, or the resumed one is another run and nobody notices."""
    outs = {tmp_path / "step": kill_in_step, tmp_path / "save": kill_in_save}
    killed = [start(f"{RUN} --workers 2 --out {out}", change) for out, change in outs.items()]
    for process, out in zip(killed, outs):
        end(process, status=-9)
        assert torch.load(out / "ckpt.pt")["step"] == 2
    resumed = [start(f"--resume --workers 0 --out {out}") for out in outs]
    for process, out in zip(resumed, outs):
        assert "--workers: 2 -> 0" in end(process)
        assert_same_run(data_run[0], out)


def test_resume_says_and_uses_what_changed(data_run, tmp_path, capsys, monkeypatch):
    """Else `--resume --decoder-lr` goes on at the old rate, or a changed setting goes unseen; and a run is
    not overwritten by the second command of the day.
    """
    out = tmp_path / "run"
    shutil.copytree(data_run[0], out)
    assert "holds a run" in refused(capsys, f"{RUN} --out {out}")
    monkeypatch.chdir(out)  # what lies here, a policy.pt, is not what was named
    said = end(start(f"--resume --out {out} --max-steps 5 --decoder-lr 0"))
    assert "--decoder-lr: 5e-05 -> 0.0" in said and "--max-steps: 4 -> 5" in said and "--ckpt" not in said
    x, y = (torch.load(path / "ckpt.pt") for path in (data_run[0], out))
    assert same(x["vq"], y["vq"]) and not same(x["policy"], y["policy"]) and len(read_log(out)) == 5
    torch.save(y | {"world_size": 2}, out / "ckpt.pt")
    assert "processes: 2 -> 1" in end(start(f"--resume --out {out}"))


@pytest.mark.parametrize("number, group", [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_a_signal_ends_the_step_and_saves(tmp_path, number, group):
    """Else Ctrl-C, or a cluster's notice, which reaches the loader's workers too, costs all since the last
    save.
    """
    out = tmp_path / "run"
    process = start(f"{RUN} --max-steps 5000 --save-every 9000 --workers 2 --out {out}", os.setsid)
    while not (out / "log.jsonl").exists() or not read_log(out):
        assert process.exitcode is None
        time.sleep(0.02)
    (os.killpg if group else os.kill)(process.pid, number)
    end(process, status=128 + number)
    assert torch.load(out / "ckpt.pt")["step"] == len(read_log(out))
    with pytest.raises(ProcessLookupError):  # no worker is left
        os.killpg(process.pid, 0)


def test_an_error_in_a_step_ends_the_run(tmp_path):
    """Else a GPU out of memory leaves a process that waits for its loader's workers, and is paid for, for
    ever.
    """
    change = lambda: before_step(lambda n, models: 1 / (1 - n))
    assert "ZeroDivisionError" in end(start(f"{RUN} --workers 2 --out {tmp_path}/run", change), status=1)


def test_a_second_interrupt_stops_at_once(tmp_path):
    """Else a run that hangs in its step can only be killed by its number."""
    change = lambda: before_step(lambda n, models: (tmp_path / "here").touch() or time.sleep(60))
    process = start(f"{SCENES} --out {tmp_path}/run", change)
    while not (tmp_path / "here").exists():
        assert process.exitcode is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    process.join(0.5)
    assert process.exitcode is None
    os.kill(process.pid, signal.SIGINT)
    end(process, status=-signal.SIGINT)


def fill_disk():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))


def test_a_full_disk_leaves_what_was_saved(data_run, tmp_path):
    """Else the save that fails takes the checkpoint before it along."""
    out = tmp_path / "run"
    shutil.copytree(data_run[0], out)
    said = end(start(f"--resume --max-steps 5 --out {out}", fill_disk), status=2)
    assert "cannot be written" in said and "Traceback" not in said and not list(out.glob(".*"))
    assert all((out / name).read_bytes() == (data_run[0] / name).read_bytes() for name in ("vq.pt", "ckpt.pt"))
    with pytest.raises(vqs.InputError, match="/dev/full: cannot be written"):
        train.log_step("/dev/full", 1, train.parse_config([]), {"reward": 1.0})


def test_numbers_that_stay_wrong_end_the_run(tmp_path):
    """Else it burns a week on a reward that overflowed; what it leaves is finite."""

    def overflow():
        score = metrics.CLIPScore.forward
        factor = {"now": 1}
        metrics.CLIPScore.forward = lambda *inputs: score(*inputs) * factor["now"]
        before_step(lambda n, models: factor.update(now=math.nan if n > 1 else 1))

    said = end(start(f"{RUN} --max-steps 9 --out {tmp_path}/run", overflow), status=1)
    assert "5 steps in a row" in said and "Traceback" not in said and said.count("NO UPDATE") == 5
    assert [line["reward"] is None for line in read_log(tmp_path / "run")] == [False, False, *[True] * 5]
    state = torch.load(tmp_path / "run" / "ckpt.pt")
    assert state["step"] == 6 and all(x.isfinite().all() for name in ("policy", "vq_ema") for x in state[name].values())


def little_shared_memory():
    ctypes.CDLL(None).unshare(0x20000)  # CLONE_NEWNS: mounts of this process alone
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run("mount -t tmpfs -o size=512k tmpfs /dev/shm".split(), check=True)


@pytest.mark.skipif(subprocess.run("unshare -m true", shell=True).returncode, reason="needs to mount")
def test_images_need_no_shared_memory(tmp_path):
    """Else a container, whose /dev/shm has 64 MB, hangs in its loader: here it has less than one step's
    images.
    """
    sizes = "--workers 2 --real-batch-size 400 --disc-weight 0 --lambda-r 0 --max-steps 1"
    end(start(f"{RUN} {sizes} --out {tmp_path}/run", little_shared_memory))


# ---- several processes -----------------------------------------------------------------------------------------------


def start_together(arguments, world_size, change):
    """Processes as torchrun would start them; calls change(rank) in each first."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        names = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}

    def begin(rank):
        os.environ.update(names | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        change(rank)

    return [start(arguments, lambda rank=rank: begin(rank)) for rank in range(world_size)]


def test_two_processes_make_one_update(tmp_path):
    """Else more GPUs train another model: 2 processes of 2 captions equal 1 of 4, in all three networks."""
    numbers = torch.rand(4, 2, 4, generator=torch.Generator().manual_seed(0))

    def same_numbers(rank):
        uniform = train.uniform
        train.uniform = lambda x, *shape: numbers[2 * rank :][: shape[0]] if len(shape) == 3 else uniform(x, *shape)

        def note(n, models):
            if n == 1:
                moments = [
                    getattr(models, f"{name}_optimizer").state.values() for name in ("policy", "decoder", "disc")
                ]
                moments = [torch.cat([x["exp_avg"].flatten() for x in states]) for states in moments]
                torch.save(moments, f"{os.environ['WORLD_SIZE']}-{rank}")

        os.chdir(tmp_path)
        before_step(note)

    small = f"{RUN} --max-steps 2 --micro-batch-size 2 --max-grad-norm 0.1"
    processes = start_together(f"{small} --batch-size 4 --out {tmp_path}/one", 1, same_numbers)
    processes += start_together(f"{small} --batch-size 2 --out {tmp_path}/two", 2, same_numbers)
    for process in processes:
        end(process)
    one, *two = (torch.load(tmp_path / name) for name in ("1-0", "2-0", "2-1"))
    for x, *others in zip(one, *two):
        for other in others:
            torch.testing.assert_close(other, x, atol=1e-3 * x.abs().max().item(), rtol=0)


def test_a_process_that_dies_ends_the_others(tmp_path):
    """Else a dead GPU leaves the others waiting, and paid for, until somebody looks."""
    change = lambda rank: before_step(lambda n, models: os._exit(3) if rank == n == 1 else None)
    one, other = start_together(f"{SCENES} --max-steps 9 --out {tmp_path}", 2, change)
    end(other, status=3)
    end(one, status=1)
    assert len(read_log(tmp_path)) == torch.load(tmp_path / "ckpt.pt")["step"] == 1


def test_torchrun_hands_a_signal_on(tmp_path):
    """Else a cluster's notice kills one process in its save and leaves the other."""
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2 --shutdown-timeout=600"
    command = f"{torchrun} {HERE}/train.py {SCENES} --max-steps 5000 --save-every 9000 --out {tmp_path}/run"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command.split(), stdout=-3, stderr=-3, env=environment, start_new_session=True)
    while not (tmp_path / "run" / "log.jsonl").exists() or not read_log(tmp_path / "run"):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert torch.load(tmp_path / "run" / "ckpt.pt")["step"] == len(read_log(tmp_path / "run"))
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


# ---- README ----------------------------------------------------------------------------------------------------------


def ablations():
    """The README's edits of rankee.py: (text that goes, text that comes)."""
    for block in re.findall(r"```diff\n(.*?)```", (HERE / "README.md").read_text("utf-8"), re.S):
        yield tuple("\n".join(line[1:] for line in block.splitlines() if line[0] == sign) for sign in "-+")


def run_here(arguments):
    """train.py's main, of the files in the working directory."""
    for name in ("rankee", "policy", "vq", "metrics", "train", "scenes", "scenes.world"):
        del sys.modules[name]
    sys.path.insert(0, os.getcwd())
    importlib.import_module("train").main(arguments)


def log_of_an_edited_copy(tree, old="", new=""):
    """The log of two steps in a copy of the project, with an edit of rankee.py."""
    shutil.copytree(HERE, tree, ignore=shutil.ignore_patterns(".git", "runs", "testdata", "__pycache__", ".venv"))
    source = (tree / "rankee.py").read_text("utf-8")
    (tree / "rankee.py").write_text(source.replace(old, new) if old else source, "utf-8")
    small = "--max-steps 2 --eval-samples 16 --batch-size 2 --group-size 4 --real-batch-size 2 --warmup-steps 0"
    end(start(small, lambda: os.chdir(tree), run_here))
    return [line | {"seconds": 0} for line in read_log(tree / "runs" / "scenes")]


@pytest.fixture(scope="module")
def unedited_log(tmp_path_factory):
    return log_of_an_edited_copy(tmp_path_factory.mktemp("unedited") / "tree")


@pytest.mark.parametrize("old, new", list(ablations()), ids=range(3))
def test_the_readmes_ablations_apply_and_run(tmp_path, unedited_log, old, new):
    """Else the first edit a reader tries fails, or changes nothing."""
    assert (HERE / "rankee.py").read_text("utf-8").count(old) == 1
    assert len(old.splitlines() + new.splitlines()) <= 5
    assert log_of_an_edited_copy(tmp_path / "tree", old, new) != unedited_log


def test_the_readme_names_what_there_is():
    """Else a reader types an option, or looks for a function, that is gone; or the page outgrows its readers."""
    text = (HERE / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 160 and len(text.split()) <= 1800 and max(map(len, text.splitlines())) <= 120
    options = set(re.findall(r"--[\w-]+", train.option_parser().format_help()))
    others = {"--nproc_per_node", "--shutdown-timeout", "--help", "--preprocess", "--vq", "--seeds", "--pretrain"}
    assert set(re.findall(r"(?<![\w|-])--[a-z][\w-]+", text)) <= options | others
    table = re.search(r"\| in the paper.*?\n\n", text, re.S).group()
    source = (HERE / "rankee.py").read_text("utf-8")
    for name in re.findall(r"`(\w+)`", table.split("\n", 2)[2]):
        assert hasattr(rankee, name) or f'"{name}"' in source, name


# ---- the embedded world ----------------------------------------------------------------------------------------------


def test_a_scenes_run_leaves_what_it_promises(scenes_run):
    """Else a reader's first command ends with nothing to look at."""
    out, printed = scenes_run
    rows = json.loads((out / "results.json").read_text())
    expected = [("base", "base", 0), ("ranke", "base", 2), ("ranke", "own", 2)]
    assert [(row["method"], row["decoder"], row["step"]) for row in rows] == expected and "frechet" in printed
    names = ("clip", "frechet", "frechet_middle", "accuracy", "token_kl", "token_entropy")
    assert all(math.isfinite(row[name]) for row in rows for name in names)
    words = "reward reward_std policy_loss kl clip_frac policy_grad_norm logprob_gap decoder_loss reward_loss"
    words += " rank_gan_loss consistency_loss reconstruction_loss disc_loss disc_grad_norm decoder_grad_norm seconds"
    assert all(set(words.split()) <= line.keys() for line in read_log(out))
    assert Image.open(out / "preview-000002.png").size == (190 + 4 * 132, 24 + 8 * 132)


def test_one_seed_one_result(scenes_run, tmp_path):
    """Else no figure of the README can be reproduced; here across a kill in a save, too."""
    end(start(f"{SCENES} --out {tmp_path}/run", kill_in_save), status=-9)
    end(start(f"--resume --out {tmp_path}/run"))
    assert_same_run(scenes_run[0], tmp_path / "run")
    end(start(f"{SCENES} --max-steps 1 --seed 1 --out {tmp_path}/other"))
    assert read_log(tmp_path / "other")[0]["reward"] != read_log(tmp_path / "run")[0]["reward"]


@pytest.fixture(scope="session")
def scene_judges():
    return world.Judges(world.FOLDER, "cpu")


def test_scenes_show_their_captions(scene_judges):
    """Else rewards, accuracy and pictures speak of different things: the judges read what `render` draws."""
    vq = vqs.load(world.FOLDER / "vq.pt", vqs.load_vq, world.NORM_GROUPS)
    evaluation = world.Evaluation(scene_judges, vq, 256, 0, "cpu")
    images = evaluation.images
    assert images.shape == (256, 3, world.RESOLUTION, world.RESOLUTION) and images.abs().max() <= 1
    real, swapped = (evaluation(vq.encode(x), x) for x in (images, images.flip(1)))
    assert real["accuracy"] > 0.9 and swapped["accuracy"] < 0.9 and swapped["frechet"] > 3 * real["frechet"]
    assert real["token_kl"] < 0.1 and real["clip"] > swapped["clip"] + 10


def test_reward_reads_every_word(scene_judges):
    """Else reinforcement learning cannot mend what the reward does not see."""
    rng, score = np.random.default_rng(0), scene_judges.scorer
    attributes = world.random_attributes(256, rng)
    images = world.render(attributes, rng)
    right = score(images, score.encode_text([world.caption(row) for row in attributes]))
    for i, (name, words) in enumerate(world.ATTRIBUTES.items()):
        other = attributes.clone()
        other[:, i] = (other[:, i] + 1) % len(words)
        wrong = score(images, score.encode_text([world.caption(row) for row in other]))
        assert (right - wrong).mean() > 2, name


def test_word_vectors_refuse_what_they_do_not_know():
    """Else a caption that the world cannot draw is drawn as another."""
    encoder, caption = world.WordVectors(64, 8, "cpu"), "small red plain circle top left on white"
    cond, mask = encoder([caption, "red circle"])
    assert cond.shape == (2, 8, 64) and mask.sum(1).tolist() == [8, 2]
    assert torch.equal(cond[1, -2:], cond[0, [1, 3]])
    for text in ("a bus", "", caption + " on white"):
        with pytest.raises(vqs.InputError):
            encoder([text])


def test_batches_are_a_function_of_the_step():
    """Else a resumed run sees its first scenes again, or two processes see the same."""
    batches = world.batches(3, 0, 0, 0, 2)
    first, (captions, images) = next(batches), next(batches)
    resumed = next(world.batches(3, 0, 1, 0, 2))
    assert captions == resumed[0] != first[0] and torch.equal(images, resumed[1])
    assert all(captions != next(world.batches(3, *more))[0] for more in ((0, 1, 1, 2), (1, 1, 0, 2)))


# ---- the public programs' numbers ------------------------------------------------------------------------------------


def test_policy_scores_and_samples_like_the_public_program(request, backbone):
    """Else a public checkpoint would be post-trained as another model than the one its authors sample
    from."""
    (policy, cond, mask), name = backbone, request.node.callspec.params["backbone"]
    tokens = reference(f"{name}.tokens")
    close(policies.token_logprobs(policy, cond, mask, tokens), reference(f"{name}.logprobs"))
    close(policy(cond, mask, tokens[:, :-1]), reference(f"{name}.logits"))
    for cfg_scale, expected in ((1.0, "greedy_tokens"), (META[name]["cfg_scale"], "greedy_tokens_cfg")):
        greedy, _ = policies.generate(policy, cond, mask, torch.rand(3, 1, 16), cfg_scale, top_k=1)
        assert torch.equal(greedy[:, 0], reference(f"{name}.{expected}"))


def test_janus_goes_back_as_it_came(janus):
    """Else what is saved is no Janus: its own program would turn the wrong halves of a head, or meet other
    names."""
    entries = filled("janus")
    back = policies.janus_state_dict(janus[0].state_dict(), 16)
    others = ("vision_model.", "aligner.", "language_model.lm_head.", "gen_vision_model.")
    assert set(back) == {name for name in entries if not name.startswith(others)}
    assert all(torch.equal(value, entries[name]) for name, value in back.items())
    close(vqs.load_vq(entries).decode(reference("janus.tokens")), reference("janus.decoded"))


def test_janus_pro_1b_has_the_entries_we_expect():
    """Else the real file would be refused after its download. Names are those of the reference's small model,
    repeated for 24 layers; sizes are the published ones. The tokenizer is that of `vq_ds16_t2i.pt`."""
    sizes = {64: 2048, 176: 5632, 100: 102400, 128: 16384}  # the small model's → Janus-Pro-1B's
    shapes = {f"gen_vision_model.{name}": shape for name, shape in MANIFESTS["vq_ds16_t2i.pt"].items()}
    for name, shape in META["janus"]["shapes"].items():
        if not name.startswith("gen_vision_model.") and ".layers.1." not in name:
            copies = [name.replace("model.layers.0.", f"model.layers.{i}.") for i in range(24)]
            shapes |= dict.fromkeys(copies, [sizes.get(size, size) for size in shape])
    shapes |= {"vision_model.vision_tower.pos_embed": [1, 576, 1024], "aligner.layers.0.weight": [2048, 1024]}
    with torch.device("meta"):
        entries = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        policy, vq = policies.load_janus(entries, {}, 100002, 24), vqs.load_vq(entries)
    assert vq.config == vqs.VQConfig() and (policy.config.n_layer, policy.config.head_dim) == (24, 128)
    assert sum(p.numel() for p in policy.parameters()) == pytest.approx(1.48e9, rel=0.01)


def test_public_files_have_the_entries_we_expect():
    """Else the real file would be refused after hours of download, or sizes read from its shapes would be
    wrong."""
    with torch.device("meta"):
        vq, policy = (
            {n: torch.empty(s) for n, s in MANIFESTS[f].items()} for f in ("vq_ds16_t2i.pt", "t2i_XL_stage1_256.pt")
        )
    assert vqs.load_vq(vq).config == vqs.VQConfig()
    assert policies.load_llamagen(policy | {"freqs_cis": torch.zeros(1)}, 16).config == policies.GPTConfig()


@pytest.mark.parametrize("name, loader", [("llamagen", load_llamagen), ("janus", load_janus), ("vq", vqs.load_vq)])
def test_every_entry_must_fit(name, loader):
    """Else a cut or foreign file is post-trained with random weights where it has none (`strict=False`)."""
    entries = filled(name)
    norm = next(entry for entry in reversed(entries) if "norm" in entry and not entry.startswith("gen_vision_model."))
    lacks = {entry: x for entry, x in entries.items() if entry != norm}
    for wrong in (lacks, entries | {norm + "2": torch.zeros(1)}, entries | {norm: torch.zeros(1)}):
        with pytest.raises((KeyError, RuntimeError), match="norm"):
            loader(wrong)


def test_another_rotary_embedding_is_refused():
    """Else a Janus of another family loads strictly, and speaks nonsense."""
    for other in ({"rope_theta": 5e5}, {"rope_scaling": {"factor": 2.0}}):
        with pytest.raises(vqs.InputError, match="another rotary embedding"):
            policies.load_janus(filled("janus"), {"language_config": other}, 3, 4)


def test_tokenizer_is_llamagens(llamagen_vq):
    """Else decoded images, and the codes of real ones, would be another tokenizer's. Autocast leaves codes
    alone, or on a GPU the decoder learns from codes that real images do not have: bf16 takes one code for its
    neighbour."""
    image, codes = reference("vq.image"), reference("vq.encoded_codes")
    close(llamagen_vq.decode(reference("vq.codes")), reference("vq.decoded"))
    close(llamagen_vq.encode_latents(image), reference("vq.pre_quant"))
    assert torch.equal(llamagen_vq.encode(image), codes)
    close(llamagen_vq.decode(codes), reference("vq.reconstruction"))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(llamagen_vq.quantize.nearest(reference("vq.pre_quant")), codes)
        assert llamagen_vq.decode(codes).dtype == torch.float32


@pytest.fixture(scope="module")
def inception():
    return metrics.fid_inception(fill(MANIFESTS["pt_inception-2015-12-05-6726825d.pth"]))


def test_inception_is_the_fid_variant(inception):
    """Else every FID would be off from the published ones by the pools' treatment of padding, or by the
    resize."""
    clean = metrics.preprocess(REFERENCE["fid.images"], "clean")
    sample = (clean[0] * 128 + 128).permute(1, 2, 0)[::23, ::23]
    close(sample, reference("fid.resized_clean_sample"), atol=1e-3)  # of 0 … 255
    close(inception(clean), reference("fid.features_clean"))
    close(inception(metrics.preprocess(REFERENCE["fid.images"], "pytorch-fid")), reference("fid.features"))


@pytest.mark.parametrize("case", range(3))
def test_frechet_distance_is_pytorch_fids(case):
    """Else FIDs would not compare; case 2 has fewer samples than dimensions, where a matrix root goes
    complex."""
    a, b = (metrics.feature_statistics(reference(f"frechet.{side}{case}").split(50))[:2] for side in "xy")
    distance = metrics.frechet_distance(*a, *b)
    assert distance == pytest.approx(REFERENCE["frechet.expected"][case], rel=1e-6)
    assert metrics.frechet_distance(*b, *a) == pytest.approx(distance, rel=1e-9)
    assert 0 <= metrics.frechet_distance(*a, *a) < 1e-6
    if case < 2:  # the definition, by SciPy
        root = np.trace(scipy.linalg.sqrtm(a[1] @ b[1])).real
        assert distance == pytest.approx(np.square(a[0] - b[0]).sum() + np.trace(a[1] + b[1]) - 2 * root, rel=1e-8)


def test_lpips_is_the_one_llamagen_trained_with():
    """Else both anchors would hold the decoder to another notion of similar."""
    vgg = fill(MANIFESTS["vgg16-397923af.pth (features only)"])
    linear = {name: value.abs() for name, value in fill(MANIFESTS["vgg_lpips.pth (linear layers)"]).items()}
    distance = vqs.load_lpips(vgg, linear)(reference("lpips.a"), reference("lpips.b"))
    close(distance, reference("lpips.distance"))


# ---- sampling and scoring --------------------------------------------------------------------------------------------


def test_sampled_and_scored_logprobs_agree(backbone):
    """Else π_old is not the policy that sampled: ratios start away from 1 and the gradient is another
    model's. The captions differ in length, so a mask that differs between the two paths shows."""
    policy, cond, mask = backbone
    rows = (cond.repeat_interleave(2, 0), mask.repeat_interleave(2, 0))
    for cfg_scale, temperature in ((1.0, 1.0), (3.0, 0.7)):
        u = torch.rand(3, 2, 16, generator=torch.Generator().manual_seed(0))
        tokens, sampled = (x.flatten(0, 1) for x in policies.generate(policy, cond, mask, u, cfg_scale, temperature))
        close(policies.token_logprobs(policy, *rows, tokens, cfg_scale, temperature), sampled, atol=1e-5)


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_cached_sampling_equals_recomputation(backbone, cfg_scale):
    """Else a stale or misplaced cache entry changes tokens, which no loss would ever show."""
    policy, cond, mask = backbone
    u, tokens = torch.rand(3, 1, 16, generator=torch.Generator().manual_seed(1)), torch.empty(3, 0, dtype=torch.long)
    fast, logprobs = policies.generate(policy, cond, mask, u, cfg_scale, temperature=0.8, top_k=50)
    for n in range(16):
        given, absent = policy(cond, mask, tokens, use_cfg=True)[:, -1].detach().chunk(2)
        logits = (absent + cfg_scale * (given - absent)) / 0.8
        chances = logits.where(logits >= logits.sort().values[:, -50:][:, :1], -torch.inf).softmax(1)
        drawn = [int((row.cumsum(0) > x).nonzero()[0]) for row, x in zip(chances, u[:, 0, n])]
        tokens = torch.cat([tokens, torch.tensor(drawn)[:, None]], 1)
        close(logprobs[:, 0, n], chances.gather(1, tokens[:, -1:])[:, 0].log())
    assert torch.equal(fast[:, 0], tokens)


def test_a_recorded_step_is_replayed_for_each_token(backbone, monkeypatch):
    """Else a GPU draws a token twice or leaves one out at a bucket's end, or other tokens than a CPU, since a
    recorded step looks at all positions of its bucket: also where nothing is yet. The recorder is a stand-
    in."""
    ran, recording, decode_n_tokens = [], [], policies.decode_n_tokens
    u = torch.rand(3, 2, 16, generator=torch.Generator().manual_seed(3))
    tokens, logprobs = policies.generate(*backbone, u, 2.0)

    @contextlib.contextmanager
    def record(graph, **options):
        recording.append(graph)
        yield
        recording.pop()

    def decode(decode_one_token, *args, use_cuda_graph):
        def step(kv_len):
            if recording:  # a recording runs nothing
                recording[0].replay = lambda: step(kv_len)
            else:
                ran.append(kv_len)
                decode_one_token(kv_len)

        decode_n_tokens(step, *args, use_cuda_graph=True, bucket=6)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(policies, "decode_n_tokens", decode)
    again, same = policies.generate(*backbone, u, 2.0)
    assert ran == [18] * 6 + [24] * 6 + [27] * 3  # the caption's 12 and a bucket's
    assert torch.equal(tokens, again)
    close(logprobs, same, atol=1e-5)


def test_nothing_in_sampling_waits_for_the_device(backbone):
    """Else every token stops the GPU, and a step cannot be recorded: tensors without contents refuse whatever
    needs to know them."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        tokens, _ = policies.generate(*backbone, torch.rand(3, 2, 16), 3.0, 1.0, 50)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            tokens.sum().item()  # as any such step would


def test_a_row_does_not_depend_on_its_neighbours(backbone):
    """Else a caption's image would change with the batch it is in, and no evaluation could be repeated."""
    policy, cond, mask = backbone
    u = torch.rand(3, 2, 16, generator=torch.Generator().manual_seed(2))
    together, _ = policies.generate(policy, cond, mask, u, 2.0)
    for i in range(3):
        alone, _ = policies.generate(policy, cond[i : i + 1], mask[i : i + 1], u[i : i + 1, 1:], 2.0)
        assert torch.equal(alone[0, 0], together[i, 1])
    cfg = rankee.Config(cfg_scale=2.0, top_k=0, rollout_batch_size=4)  # two captions at a time
    assert torch.equal(rankee.sample_tokens(policy, cond, mask, u, cfg)[0], together)


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_padding_is_never_read(backbone, cfg_scale):
    """Else the number of padded positions would speak in every caption's prediction; a caption alone has
    none."""
    policy, cond, mask = backbone
    tokens = reference("llamagen.tokens")
    clean = policies.token_logprobs(policy, cond, mask, tokens, cfg_scale)
    rubbish = cond.where(mask.view(*mask.shape, *[1] * (cond.dim() - 2)), 99)
    close(policies.token_logprobs(policy, rubbish, mask, tokens, cfg_scale), clean, atol=1e-6)
    for i, n in enumerate(mask.sum(1).tolist()):
        row = slice(i, i + 1)
        alone = policies.token_logprobs(policy, cond[row, -n:], mask[row, -n:], tokens[row], cfg_scale)
        close(alone, clean[row], atol=1e-5)


def test_captions_are_padded_on_the_left():
    """Else a model trained with text in the last positions reads holes (the authors' scripts pad on the
    right)."""
    cond, mask = policies.left_pad([torch.ones(2), torch.ones(4)], 4)
    assert mask.tolist() == [[False, False, True, True], [True] * 4] and cond[0].tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="5 text features"):
        policies.left_pad([torch.ones(5)], 4)


def test_samples_follow_the_distribution():
    """Else rollouts are biased samples of π_θ and the policy gradient is wrong in expectation."""
    chances = torch.tensor([0.0, 0.2, 0.5, 0.0, 0.3, 0.0]).log()
    tokens = policies.sample_token(chances.expand(1000, -1), (torch.arange(1000) + 0.5) / 1000)
    assert torch.bincount(tokens, minlength=6).tolist() == [0, 200, 500, 0, 300, 0]
    edges = policies.sample_token(chances.expand(2, -1), torch.tensor([0.0, 1 - 2**-24]))
    assert edges.tolist() == [1, 4]  # never a code of probability 0


@pytest.mark.parametrize("rows", [1, 2, 3, 64, 65])
def test_few_rows_are_multiplied_alike(rows):
    """Else guidance, which makes one row two, would change a linear layer, or its gradient."""
    torch.manual_seed(0)
    x, layer = torch.randn(rows, 1, 24, requires_grad=True), policies.Linear(24, 40)
    outputs = layer(x), x @ layer.weight.T + layer.bias
    close(*outputs, atol=1e-5)
    for pair in zip(*(torch.autograd.grad(y.square().sum(), [x, layer.weight, layer.bias]) for y in outputs)):
        close(*pair, atol=1e-3)


def test_checkpointing_and_chunks_change_memory_not_gradients(backbone):
    """Else gradient checkpointing trains another model, or train() and eval() do; or it keeps as much as
    without."""
    policy, cond, mask = backbone
    results, kept, weights = [], [], [w for w in policy.parameters() if w.requires_grad]
    for checkpointing, chunk, training in ((False, 16, False), (True, 16, True), (True, 5, False), (False, 7, True)):
        sizes, args = {}, (reference("llamagen.tokens"), 3.0, 0.9, checkpointing, chunk)
        note = lambda x: sizes.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            logprobs = policies.token_logprobs(policy.train(training), cond, mask, *args)
        kept.append(sum(sizes.values()) - sum(sizes.get(w.data_ptr(), 0) for w in policy.parameters()))
        results.append([logprobs, *torch.autograd.grad(logprobs.square().sum(), weights, allow_unused=True)])
        for x, y in zip(results[0], results[-1], strict=True):
            if x is not None:
                close(y, x, atol=1e-5 * max(1, x.abs().max().item()), rtol=1e-5)
    assert kept[1] < 0.3 * kept[0]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_bf16_scores_what_it_sampled(backbone, device):
    """Else ratios of a run in bf16 start away from 1, and its log-probabilities are another model's than
    float32's."""
    policy, cond, mask, u = (copy.deepcopy(x).to(device) for x in (*backbone, torch.full((3, 1, 16), 0.4)))
    with torch.autocast(device, torch.bfloat16):
        tokens, sampled = (x[:, 0] for x in policies.generate(policy, cond, mask, u, 2.0))
        scored = policies.token_logprobs(policy, cond, mask, tokens, 2.0)
    exact = policies.token_logprobs(policy, cond, mask, tokens, 2.0)
    assert (scored - sampled).abs().mean() < 2e-2 and (scored - exact).abs().mean() < 2e-2


# ---- the paper's equations -------------------------------------------------------------------------------------------


def test_group_advantages():
    """Else the policy is pushed by a caption's difficulty, or by rounding where all its samples are equally
    good."""
    advantages = rankee.group_advantages(torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0 + 1e-5]]))
    close(advantages[0], torch.tensor([-2.0, -1.0, 0.0, 3.0]) / math.sqrt((4 + 1 + 0 + 9) / 3), atol=1e-6)
    assert advantages[1].tolist() == [0, 0, 0, 0]
    assert rankee.group_advantages(torch.eye(64)[:1] * 100).max() == 5
    assert rankee.group_advantages(torch.eye(64)[:1] * -100).min() == -5


def test_policy_loss_is_the_clipped_surrogate():
    """Else updates are unbounded, or clipped on the wrong side of the sign of A."""
    ratio, advantages = torch.tensor([[1.5, 0.5, 1.1], [1.5, 0.5, 1.1]]), torch.tensor([[2.0], [-1.0]])
    loss, clip_frac = rankee.policy_loss(ratio.log(), torch.zeros(2, 3), advantages, 0.2)
    assert loss.item() == pytest.approx(-(2.4 + 1.0 + 2.2 - 1.5 - 0.8 - 1.1) / 6)
    assert clip_frac.item() == pytest.approx(4 / 6)


def test_rank_weights():
    """Else the size of the GAN's gradient depends on rewards (mean ≠ 1), or a weight meets another sample's
    image."""
    rewards = torch.tensor([[20.0, 23.0, 21.0, 22.0], [30.0, 31.0, 10.0, 29.0]])
    weights, best = rankee.rank_weights(rewards, 2.0, 3)
    parts = torch.tensor([1.0, math.exp(-0.5), math.exp(-1)])
    assert best.tolist() == [[1, 3, 2], [1, 0, 3]]
    close(weights, (3 * parts / parts.sum()).expand(2, 3), atol=1e-5)
    assert rankee.rank_weights(rewards, 1.0, 1)[0].tolist() == [[1], [1]]  # best-of-G
    assert rankee.rank_weights(rewards * 100, 1.0, 4)[0][:, 0].tolist() == [4, 4]  # exp(3100) overflows


def test_anchors_and_adversarial_losses():
    """Else a policy equal to its reference is pulled somewhere, or the discriminator pulls the wrong way."""
    x = torch.randn(2, 3)
    assert rankee.kl_anchor(x, x).item() == 0
    assert rankee.kl_anchor(torch.full((2, 3), 1.5), torch.ones(2, 3)).item() == pytest.approx(0.125)
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0])
    assert rankee.hinge_d_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1) / 2))


def test_adaptive_weight_balances_gradients():
    """Else the GAN term drowns the reconstruction anchor, or does nothing."""
    layer = torch.tensor([3.0, 4.0], requires_grad=True)
    weight = rankee.adaptive_weight((layer * layer).sum(), 0.5 * layer.sum(), layer)
    assert weight.item() == pytest.approx(10 / (0.5 * math.sqrt(2) + 1e-4), rel=1e-5) and not weight.requires_grad
    assert rankee.adaptive_weight((1e9 * layer).sum(), layer.sum(), layer).item() == 1e4


def test_tau_and_ema():
    """Else soft ranking starts as best-of-G or stays soft; or "EMA decoder" is the online one, or never
    moves."""
    taus = [rankee.tau_at(step, 100, 4.0, 1.0) for step in (0, 5, 10, 20, 99)]
    assert taus == pytest.approx([4.0, 1 + 1.5 * (1 + math.sqrt(0.5)), 2.5, 1.0, 1.0])
    model, ema = (nn.Linear(1, 1).apply(lambda layer: nn.init.constant_(layer.weight, x)) for x in (1.0, 0.0))
    for _ in range(3):
        rankee.ema_update(ema, model, 0.9)
    assert ema.weight.item() == pytest.approx(1 - 0.9**3) and model.weight.item() == 1


def test_random_streams_never_coincide():
    """Else two seeds, steps or processes draw the same rollouts (0 and 33554432 did), or a resumed run other
    ones."""
    keys = [(seed, purpose, *index) for seed in (0, 33554432) for purpose in "ab" for index in ((), (1, 2), (2, 1))]
    draws = [rankee.uniform(rankee.random_stream(*key), 4).tolist() for key in keys * 2]
    assert draws[: len(keys)] == draws[len(keys) :] and len(set(map(tuple, draws))) == len(keys)


def test_token_statistics():
    """Else the covariate shift is reported with the wrong sign, base or smoothing."""
    p, q = metrics.token_histogram(torch.tensor([[0, 0], [0, 1]]), 4), torch.tensor([0.125, 0.125, 0.25, 0.5]).double()
    assert p.tolist() == [4 / 8, 2 / 8, 1 / 8, 1 / 8] and metrics.token_entropy(p) == pytest.approx(1.75)
    assert metrics.token_kl(p, q) == pytest.approx((0.5 * 2 + 0.25 - 0.125 - 0.125 * 2) * math.log(2))


# ---- the two stages, on networks that take a moment -------------------------------------------------------------------

CFG = rankee.Config(max_steps=10, group_size=4, cfg_scale=2.0, micro_batch_size=3, disc_start=0, policy_ema_every=1)
TINY_GPT = policies.GPTConfig(32, 2, 16, 32, vocab_size=16, cls_token_num=4, caption_dim=8, grid_size=4)
TINY_VQ = vqs.VQConfig(32, (1, 1), 1, z_channels=32, codebook_size=16, codebook_dim=4)


class Redness(nn.Module):
    """A reward with a known direction: an image's mean red, ×100."""

    def __init__(self, slope):
        super().__init__()
        self.slope = slope
        self.encode_text = lambda captions: torch.zeros(len(captions), 1)

    def forward(self, images, text_emb):
        return self.slope * 100 * images[:, 0].mean((1, 2))


def text_encoder(captions):
    rows = [torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in (2, 4, 3, 1)[: len(captions)]]
    return policies.left_pad(rows, 4)


def make_models(cfg, scorer=Redness(1.0), sgd=False):
    """Random networks, the same in every call. Plain gradient descent shows a gradient; Adam would hide its
    scale."""
    torch.manual_seed(0)
    policy, vq = policies.Policy(TINY_GPT), vqs.VQModel(TINY_VQ)
    nn.init.normal_(policy.output.weight, std=0.3)  # rollouts must differ
    nn.init.normal_(vq.decoder.conv_out.weight, std=0.1)
    lpips = vqs.LPIPS([nn.Conv2d(3, 8, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3))], [torch.rand(8)] * 2)
    discriminator = vqs.patch_discriminator(ndf=8, n_layers=1, kernel=3)
    judges = SimpleNamespace(scorer=scorer, lpips=lpips, discriminator=discriminator)
    m = rankee.Models(policy, vq, text_encoder, judges, torch.autocast("cpu", enabled=False), cfg)
    if sgd:
        m.policy_optimizer = torch.optim.SGD(m.policy.parameters(), cfg.policy_lr)
        m.decoder_optimizer = torch.optim.SGD(m.vq.decoder_parameters(), 1.0)
        m.disc_optimizer = torch.optim.SGD(m.discriminator.parameters(), cfg.disc_lr)
    return m


def batch(captions=2):
    """Captions, real images and the rollouts' random numbers."""
    generator = torch.Generator().manual_seed(3)
    images, u = (torch.rand(captions, *shape, generator=generator) for shape in ((3, 8, 8), (4, 16)))
    return CAPTIONS[:captions], images * 2 - 1, u


def play(cfg, scorer=Redness(1.0)):
    """Models after a step, and its log."""
    models, (captions, images, u) = make_models(cfg, scorer), batch()
    return models, rankee.train_step(models, captions, images, u, 0, cfg)


def changed(cfg, models, name):
    """The entries of models.NAME that are no longer as `make_models` made them."""
    before, after = (getattr(m, name).state_dict() for m in (make_models(cfg), models))
    return {entry for entry in before if not torch.equal(before[entry], after[entry])}


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("method", ["rl", "decoder", "ranke"])
def test_each_stage_moves_its_own(method, every):
    """Else "standard RL" is not the frozen-decoder method that RankE is compared with; or stage 2 moves
    encoder or codebook, and tokens change their meaning under the policy."""
    cfg = replace(CFG, method=method, policy_ema_every=every)
    models, _ = play(cfg)
    moved = lambda name: changed(cfg, models, name)
    assert bool(moved("policy")) == (method != "decoder")
    assert bool(moved("policy_ema")) == (method != "decoder" and every == 1)
    assert bool(moved("vq_ema")) == bool(moved("discriminator")) == (method != "rl")
    ours = {name for name in models.vq.state_dict() if name.startswith(("decoder.", "post_quant_conv."))}
    assert moved("vq") == (set() if method == "rl" else ours) and not moved("lpips")


@pytest.mark.parametrize("epochs, ref, guided", [(1, "ema", False), (2, "initial", True)])
def test_stage_1_is_the_papers_gradient(epochs, ref, guided):
    """Else a micro-batch's scale, a row's advantage or mask, π_old or the reference is another than in the
    equation: a slow reading of it, all rows at once. In the first of two steps of warm-up the learning rate
    is half its own."""
    cfg = replace(CFG, policy_lr=0.2, warmup_steps=1, kl_coef=0.5, max_grad_norm=1e9, top_k=0)
    cfg = replace(cfg, update_epochs=epochs, ref_policy=ref, cfg_logprobs=guided)
    models, slow = make_models(cfg, sgd=True), make_models(cfg)
    for m in (models, slow):  # the policy is no longer its reference
        nn.init.eye_(m.policy.layers[0].attention.wo.weight)
    rollouts = rankee.rollout(models, CAPTIONS[:2], batch()[2], cfg)
    logs = rankee.update_policy(models, rollouts, 0, cfg)
    rows = [x.repeat_interleave(4, 0) for x in text_encoder(CAPTIONS[:2])]
    score = lambda policy: policies.token_logprobs(policy, *rows, rollouts.tokens, 2.0 if guided else 1.0)
    r, old, weights = rollouts.rewards, score(slow.policy).detach(), list(slow.policy.parameters())
    advantages = ((r - r.mean(1, True)) / r.std(1, keepdim=True)).reshape(-1, 1)
    for _ in range(epochs):
        logprobs = score(slow.policy)
        ratio, kl = (logprobs - old).exp(), (logprobs - score(slow.policy_ema)).square() / 2
        gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        (0.5 * kl - gain).mean().backward()
        torch.optim.SGD(weights, 0.1).step()
        slow.policy.zero_grad()
    for x, y in zip(models.policy.parameters(), weights, strict=True):
        close(x, y, atol=2e-6, rtol=1e-5)
    gap = (old - rollouts.sampling_logprobs).mean().item()  # zero only where what is scored is what was sampled
    assert (abs(gap) < 1e-5) == guided and kl.mean() > 1e-3
    expected = {"kl": kl.mean().item(), "policy_loss": -gain.mean().item(), "logprob_gap": gap}
    assert {name: logs[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    "gan, rank_k, zscore, step",
    [
        ("rank", 0, False, 2),
        ("uniform", 0, False, 2),
        ("rank", 1, False, 2),
        ("rank", 3, True, 2),
        ("rank", 0, False, 1),
    ],
)
def test_stage_2_is_the_papers_gradient(gan, rank_k, zscore, step):
    """Else Rank-GAN does not favour preferred samples, K = 1 is not best-of-G, "uniform" is no ablation, the
    anchors do not pull back, a weight meets another image, or a discriminator that knows nothing steers the
    decoder before `disc_start`: a slow reading of all terms, sample by sample."""
    cfg = replace(CFG, gan=gan, rank_k=rank_k, rank_zscore=zscore, disc_start=2, disc_lr=0.0, max_grad_norm=1e9)
    cfg = replace(cfg, lambda_d=0.02, lambda_g=3.0, lambda_r=2.0, lambda_c=5.0, tau_start=0.5, tau_end=0.5)
    models, m, (captions, images, u) = make_models(cfg, sgd=True), make_models(cfg), batch()
    rollouts, losses, disc_weight = rankee.rollout(models, captions, u, cfg), [], 0.5 if step == 2 else 0.0
    assert rollouts.rewards.std(1).min() > 0.1  # or all weights would be alike
    rollouts.images = rollouts.images.roll(1, 0)  # as if the decoder had left its EMA
    for b, rewards in enumerate(rollouts.rewards):
        rewards = (rewards - rewards.mean()) / rewards.std() if zscore else rewards
        kept = sorted(range(4), key=lambda i: -rewards[i])[: rank_k or 4]
        for i in kept:
            w = len(kept) / sum(math.exp((rewards[k] - rewards[i]) / 0.5) for k in kept)
            image = m.vq.decode(rollouts.tokens[4 * b + i][None])
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


def test_reward_reaches_the_decoders_last_layer(clip_score):
    """Else the reward term of stage 2 is a constant (as through a PIL image), and λ_d changes nothing. CLIP's
    reward."""
    cfg = replace(CFG, method="decoder", disc_weight=0.0, lambda_c=0.0, lambda_r=0.0, weight_decay=0.0)
    models, logs = play(cfg, clip_score)
    assert logs["decoder_grad_norm"] > 0 and "decoder.conv_out.weight" in changed(cfg, models, "vq")


def test_equal_rewards_do_not_move_the_policy():
    """Else the ranking term has a direction of its own."""
    cfg = replace(CFG, method="rl", kl_coef=0.0, weight_decay=0.0)
    models, logs = play(cfg, Redness(0.0))
    assert logs["policy_grad_norm"] == 0 and not changed(cfg, models, "policy")


def test_an_update_that_is_not_finite_is_not_made():
    """Else NaN spreads into every weight and the run ends days later with nothing. The discriminator's is
    finite."""
    models, logs = play(CFG, Redness(math.nan))
    assert all(math.isnan(logs[name]) for name in ("reward", "policy_grad_norm", "decoder_grad_norm"))
    assert not changed(CFG, models, "policy") and not changed(CFG, models, "vq")
    assert changed(CFG, models, "discriminator")
    assert not models.policy_optimizer.state and all(w.grad is None for w in models.policy.parameters())


# ---- metrics ---------------------------------------------------------------------------------------------------------

TINY_VISION = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 7, "image_size": 28}
TINY_CLIP = {"embed_dim": 16, "quick_gelu": True, "text_cfg": {"layers": 1, "width": 32, "heads": 2}}


@pytest.fixture(scope="module")
def clip_score(tmp_path_factory):
    """The scorer of open_clip's model "tiny", whose file is configs/weights.pt, in HPSv2's layout."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "tiny.json").write_text(json.dumps(TINY_CLIP | {"vision_cfg": TINY_VISION}))
    open_clip.add_model_config(folder)
    torch.save({"epoch": 1, "state_dict": open_clip.create_model("tiny").state_dict()}, folder / "weights.pt")
    score = metrics.open_clip_score("tiny", folder / "weights.pt")
    score.file = folder / "weights.pt"
    return score


def open_clips_score(model, image, caption):
    """open_clip's own: its transform of a PIL image, its tokenizer, its model."""
    x = open_clip.image_transform(28, is_train=False)(image)[None]
    return 100 * torch.cosine_similarity(model.encode_image(x), model.encode_text(open_clip.tokenize([caption]))).item()


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_clip_score_is_open_clips_and_differentiable(clip_score):
    """Else the reward is not CLIP's (the mean, the range, a logit scale), or has no gradient where it is
    optimized."""
    text_emb, image = clip_score.encode_text(CAPTIONS[:1]), pixels(28, 28, 3)
    for factor, atol in ((1, 1e-3), (3, 0.5)):  # resized as a tensor, not by PIL: nearly the same
        image = image.repeat(factor, 0).repeat(factor, 1)
        x = (torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1).requires_grad_()
        value = clip_score(x, text_emb)
        expected = open_clips_score(clip_score.model, Image.fromarray(image), CAPTIONS[0])
        assert value.item() == pytest.approx(expected, abs=atol)
        assert (torch.autograd.grad(value, x)[0] != 0).float().mean() > 0.9
    assert torch.equal(
        clip_score(3 * x, text_emb), clip_score((3 * x).clamp(-1, 1), text_emb)
    )  # no saved image differs


def measured(capfd, *arguments):
    """The numbers in the first line that `metrics.py` prints, and everything it says."""
    capfd.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "DEVICE", "cpu")  # the numbers beside it are a CPU's
        metrics.main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return [float(x) for x in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", out.splitlines()[0])], out + err


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folders a and b of 4 and 3 images, nested and in three formats, and what else metrics.py is asked to
    read."""
    folder = tmp_path_factory.mktemp("files")
    torch.save(fill(MANIFESTS["pt_inception-2015-12-05-6726825d.pth"]), folder / "inception.pth")
    for name in ("a/more", "b/more", "empty", "damaged", "wide", "fractions", "taken.npz"):
        (folder / name).mkdir(parents=True)
    for i, name in enumerate(
        ("a/0.png", "a/1.JPG", "a/more/2.webp", "a/more/3.png", "b/0.png", "b/1.png", "b/more/2.png")
    ):
        Image.fromarray(pixels(6, 8, 3, seed=i)).resize((80, 60)).save(folder / name)
    for name in ("damaged/0.png", "lfs.pth"):
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1")
    np.savez(folder / "narrow.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez(folder / "nan.npz", mu=np.full(2048, np.nan), sigma=np.eye(2048))
    np.save(folder / "wide" / "0.npy", np.array([[1, 16384]]))
    np.save(folder / "fractions" / "0.npy", np.zeros(4))
    return folder


@pytest.mark.parametrize("command, mode, size", [("fid", "clean", 48), ("statistics", "pytorch-fid", 0)])
def test_fid_commands_are_what_they_say_of_the_images(files, inception, tmp_path, capfd, command, mode, size):
    """Else the number in a table is not what a slow reading of the definition gives: all images at once,
    np.cov. The seven features span few dimensions; in these the distance is the same."""
    other = files / "b" if command == "fid" else tmp_path / "a.npz"
    options = ["--inception", files / "inception.pth", "--preprocess", mode, "--image-size", size]
    numbers, said = measured(capfd, command, files / "a", other, *options)
    images = [Image.open(path).convert("RGB") for side in "ab" for path in sorted((files / side).rglob("*.*"))]
    if size:  # as if saved at that size: the middle square, Lanczos
        images = [image.crop((10, 0, 70, 60)).resize((size, size), Image.Resampling.LANCZOS) for image in images]
    x = inception(metrics.preprocess(np.stack([np.asarray(image) for image in images]), mode)).double().numpy()
    if command == "fid":
        few = x @ np.linalg.qr(x.T)[0]
        a, b = ((side.mean(0), np.cov(side, rowvar=False)) for side in (few[:4], few[4:]))
        assert numbers == [pytest.approx(metrics.frechet_distance(*a, *b), rel=1e-3)] and numbers[0] > 0.1
        assert "3 images of" in said and "biased" in said
    else:
        with np.load(other) as saved:  # what pytorch-fid reads, and nothing beside it
            np.testing.assert_allclose(saved["mu"], x[:4].mean(0), atol=1e-4)
            np.testing.assert_allclose(saved["sigma"], np.cov(x[:4], rowvar=False), atol=1e-4)
        assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    assert f"4 images of {files / 'a'}" in said and f"4 read, {mode} preprocessing, --image-size {size}" in said


def test_files_that_are_images_are_found(files, tmp_path, capfd):
    """Else images behind a link do not count, hidden ones do, a loop of links never ends, or a cut download
    counts."""
    (tmp_path / "in" / ".cache").mkdir(parents=True)
    (tmp_path / "away").mkdir()
    data = (files / "a" / "0.png").read_bytes()
    for name in ("in/0.png", "in/.1.png", "in/.cache/2.png", "away/3.PNG", "in/4.txt", "in/cut.png"):
        (tmp_path / name).write_bytes(data[: 200 if "cut" in name else None])
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "away")
    (tmp_path / "away" / "loop").symlink_to(tmp_path / "in")
    assert [path.name for path in metrics.list_images(tmp_path / "in")[0]] == ["0.png", "cut.png", "3.PNG"]
    _, said = measured(capfd, "statistics", tmp_path / "in", tmp_path / "x.npz", "--inception", files / "inception.pth")
    assert all(word in said for word in ("cut.png: ", "3 images of", "(1 other files left out)", "2 read"))
    with pytest.raises(metrics.InputError, match="at least 2"):  # the covariance of one image is NaN
        metrics.feature_statistics([torch.zeros(1, 4)])


GREY, COLOUR = np.array([[0, 40, 80], [120, 200, 255]], np.uint8), pixels(2, 3, 3)
THREE, UNSEEN = np.dstack([GREY] * 3), 255 - GREY[..., None]  # at an alpha of GREY white shows by so much


@pytest.mark.parametrize(
    "image, suffix, expected, options",
    [
        (Image.fromarray(GREY), "png", THREE, {}),
        (Image.fromarray(GREY.astype(np.uint16) * 257), "png", THREE, {}),
        (Image.fromarray(GREY.astype(np.int32) * 257), "tif", THREE, {}),
        (Image.fromarray(GREY > 100), "png", (THREE > 100) * 255, {}),
        (Image.fromarray(np.dstack([COLOUR, GREY]), "RGBA"), "png", COLOUR * (GREY[..., None] / 255) + UNSEEN, {}),
        (Image.fromarray(np.dstack([GREY] * 2), "LA"), "png", THREE * (THREE / 255) + UNSEEN, {}),
        (Image.fromarray(np.dstack([GREY] * 4), "RGBA").convert("PA"), "tif", THREE * (THREE / 255) + UNSEEN, {}),
        (Image.fromarray(GREY).convert("P"), "png", THREE, {}),
        (Image.fromarray(GREY).convert("P"), "png", np.where(THREE, THREE, 255), {"transparency": 0}),
        (Image.fromarray(np.dstack([COLOUR, 0 * GREY]), "CMYK"), "tif", 255 - COLOUR, {}),
        (Image.fromarray(GREY.astype(np.float32)), "tif", None, {}),
        (Image.fromarray(GREY.astype(np.int32) * 1000), "tif", None, {}),
    ],
)
def test_every_kind_of_image_is_read_on_purpose(tmp_path, image, suffix, expected, options):
    """Else a 16-bit image is nearly white, or transparent pixels show what nobody sees; FID would say 16 for
    0."""
    image.save(tmp_path / f"x.{suffix}", **options)
    with pytest.raises(ValueError, match="32 bits") if expected is None else contextlib.nullcontext():
        np.testing.assert_allclose(np.asarray(metrics.load_image(tmp_path / f"x.{suffix}")), expected, atol=1)


def test_orientation_is_obeyed_where_it_is_asked_for(tmp_path):
    """Else training data lie on their side; or FID reads other pixels than the published tools."""
    Image.fromarray(COLOUR).save(
        tmp_path / "x.png", exif=b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    )
    for upright, expected in ((False, COLOUR), (True, np.rot90(COLOUR, -1))):  # a quarter turn clockwise
        assert np.array_equal(metrics.load_image(tmp_path / "x.png", upright), expected)


def test_clip_command_is_open_clip_on_the_files(clip_score, tmp_path, capfd):
    """Else the published protocol is not the one measured: the prefix, the resize, or another image's
    caption."""
    expected = []
    for i, caption in enumerate(CAPTIONS):
        image, samples = Image.fromarray(pixels(5, 7, 3, seed=i)).resize((70, 50)), tmp_path / f"{i:05}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps({"tag": "x", "prompt": caption}))
        image.save(samples / "0000.png")
        expected.append(open_clips_score(clip_score.model, image, f"A photo depicts {caption}"))
    (tmp_path / "00001" / "samples" / "0000.png").write_bytes(b"cut")
    del expected[1]
    (score, error), said = measured(capfd, "clip", tmp_path, "--model", "tiny", "--pretrained", clip_score.file)
    assert score == pytest.approx(np.mean(expected), abs=1e-3)
    assert error == pytest.approx(np.std(expected) / 3**0.5, abs=2e-3)
    assert "00001/samples/0000.png: " in said and "4 images" in said and "3 read" in said and "tiny" in said


def test_token_kl_command_is_the_closed_form(tmp_path, capfd):
    """Else the paper's latent covariate shift is another number: each code once against one code only,
    smoothed."""
    for name, tokens in (("all", np.arange(16, dtype=np.int16)), ("one", np.zeros((2, 8), np.int64))):
        (tmp_path / name / "samples").mkdir(parents=True)
        np.save(tmp_path / name / "samples" / "0.npy", tokens)
    numbers, _ = measured(capfd, "token-kl", tmp_path / "all", tmp_path / "one", "--vocab-size", 16)
    q = [17 / 32] + [1 / 32] * 15
    assert numbers[0] == pytest.approx(sum(math.log(1 / 16 / x) / 16 for x in q), rel=1e-4)
    assert numbers[1:] == pytest.approx([4, -sum(x * math.log2(x) for x in q)], rel=1e-4)


def test_token_kl_of_images_is_that_of_their_codes(tmp_path, capfd):
    """Else images are encoded in another size or range than the tokenizer was trained for."""
    torch.manual_seed(0)
    vq, sides = vqs.VQModel(vqs.VQConfig(32, (1, 1, 1, 1, 1), 1, 32, 32, 4)), []
    torch.save({"model": vq.state_dict()}, tmp_path / "vq.pt")
    for seed, side in enumerate("ab"):
        (tmp_path / side).mkdir()
        image = Image.fromarray(pixels(8, 10, 3, seed=seed)).resize((320, 256), Image.Resampling.NEAREST)
        image.save(tmp_path / side / "0.png")
        x = torch.from_numpy(np.asarray(image)[:, 32:-32].copy()).permute(2, 0, 1)[None] / 127.5 - 1
        sides.append((torch.bincount(vq.encode(x)[0], minlength=32) + 1).double() / (256 + 32))
    numbers, _ = measured(capfd, "token-kl", tmp_path / "a", tmp_path / "b", "--vq", tmp_path / "vq.pt")
    assert numbers[0] == pytest.approx((sides[0] * (sides[0] / sides[1]).log()).sum().item(), rel=0.05)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("fid empty a --inception inception.pth", "empty: no images"),
        ("fid damaged a --inception inception.pth", "none of its 1 images can be read"),
        ("fid narrow.npz a --inception inception.pth", "expected a .npz with mu (2048,)"),
        ("fid nan.npz a --inception inception.pth", "not finite"),
        ("fid a a --inception lfs.pth", "a Git-LFS pointer"),
        ("fid a empty --inception lfs.pth", "empty: no images"),  # both sides before the network
        ("token-kl a empty --vq lfs.pth", "empty: no images"),
        ("fid a a --inception inception.pth --image-size -5", "--image-size"),
        ("fid a", "take two paths"),
        ("fid a a --image 5", "unrecognized arguments"),
        ("statistics a stats --inception inception.pth", "ends in .npz"),
        ("statistics a no/a.npz --inception inception.pth", "in a folder that can be written"),
        ("statistics a taken.npz --inception inception.pth", "taken.npz: cannot be written"),
        ("clip a", "metadata.jsonl: cannot be read"),
        ("token-kl wide wide", "expected a folder with .npy files of tokens below 16384"),
        ("token-kl fractions fractions", "expected a folder with .npy files of tokens below 16384"),
        ("token-kl a a", "images need --vq"),
        ("token-kl a a --vq inception.pth", "expected what load_vq reads"),
    ],
)
def test_metrics_refuse_what_does_not_fit(files, capfd, monkeypatch, arguments, says):
    """Else a wrong folder or file ends in a traceback, or in a number."""
    monkeypatch.chdir(files)
    before = set(files.iterdir())
    with pytest.raises(SystemExit) as stopped:
        metrics.main(arguments.split())
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("metrics.py: ")]
    assert stopped.value.code == 2 and len(lines) == 1 and says in lines[0] and not out
    assert set(files.iterdir()) == before  # nothing half-written


@needs_gpu
@pytest.mark.parametrize("recorded, bucket", [(True, 6), (True, 128), (False, 128)])
def test_a_gpu_draws_what_a_cpu_draws(backbone, monkeypatch, recorded, bucket):
    """Else the CUDA graph, at a bucket's boundary or within it, draws other tokens than plain decoding; or
    plain decoding waits for the GPU, which PyTorch itself then says.
    """
    decode_n_tokens, u = policies.decode_n_tokens, torch.rand(3, 2, 16)
    expected, _ = policies.generate(*backbone, u, 3.0, 0.5, top_k=1)
    decode = lambda *args, use_cuda_graph: decode_n_tokens(*args, recorded, bucket)
    monkeypatch.setattr(policies, "decode_n_tokens", decode)
    args = [copy.deepcopy(x).cuda() for x in (*backbone, u)]
    torch.cuda.set_sync_debug_mode("default" if recorded else "error")
    try:
        tokens, _ = policies.generate(*args, 3.0, 0.5, top_k=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(tokens.cpu(), expected)


@needs_gpu
def test_a_step_of_xls_shape_fits_into_24_gb():
    """Else LlamaGen-XL cannot be post-trained on the GPU that the README names. The second step has Adam's
    moments.
    """
    torch.cuda.reset_peak_memory_stats()
    with torch.device("cuda"):
        policy, vq = policies.Policy(policies.GPTConfig()), vqs.VQModel(vqs.VQConfig())
        discriminator, images, u = vqs.patch_discriminator(), torch.rand(4, 3, 256, 256), torch.rand(4, 8, 256)
        linear = {name: torch.rand(shape) for name, shape in MANIFESTS["vgg_lpips.pth (linear layers)"].items()}
    vgg = {n: x.cuda() for n, x in fill(MANIFESTS["vgg16-397923af.pth (features only)"]).items()}
    scorer = Redness(1.0)
    scorer.encode_text = lambda captions: torch.zeros(len(captions), 1, device="cuda")
    judges = SimpleNamespace(scorer=scorer, lpips=vqs.load_lpips(vgg, linear), discriminator=discriminator)
    cond, mask = torch.randn(4, 120, 2048).cuda(), (torch.arange(120) >= torch.tensor([[20], [90], [0], [50]])).cuda()
    cfg = rankee.Config(disc_start=0)
    autocast = torch.autocast("cuda", torch.bfloat16)
    models = rankee.Models(policy, vq, lambda captions: (cond, mask), judges, autocast, cfg)
    for step in range(2):
        logs = rankee.train_step(models, CAPTIONS, images * 2 - 1, u, step, cfg)
        assert all(map(math.isfinite, logs.values())), logs
    assert torch.cuda.max_memory_allocated() < 24e9
