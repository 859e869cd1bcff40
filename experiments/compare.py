"""The methods beside each other on the embedded world: the same base, seeds, rollouts and steps for each.

    python -m experiments.compare --seeds 5                       the methods (--study methods)
    python -m experiments.compare --seeds 5 --study frontier      standard RL and RankE at five β of the KL anchor
    python -m experiments.compare --ablations k1 ema-reference    only these beside RankE and standard RL
    python -m experiments.compare --out runs/d -- --lambda-d 0.1  what follows -- goes to each run of train.py: also
                                                                  --base DIR, made by scenes.world --pretrain

Each run is an ordinary `python train.py --out OUT/seed-N/KEY`, its output in OUT/seed-N/KEY.log, on one core;
--processes of them run at a time. Ctrl-C or SIGTERM ends them after their step, saved; the same command goes on
from there, or adds seeds, studies and ablations to what is done. It prints the tables and leaves STUDY.json, every
measurement of its runs with seed and key. `methods` also leaves swap.json, every policy through every decoder, and
each seed's picture.png; `frontier` leaves frontier.png.

A run is reported through its own decoder; one that keeps the base's decoder (rl, sft) through that.
"""

import dataclasses
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import train
from experiments.curves import run_script, save_figure, script_parser
from files.disk import atomic_save, expect, make_folder
from files.log import print_table
from files.weights import read_checkpoint
from public.sample import Watched, save_picture
from scenes import world

# At these τ the weights of best and worst differ by these factors in a group of average span: the rewards of 8
# rollouts span 30.6 on average, 2.87 standardized (the base's, 96 groups); τ is the span over the factor's logarithm.
RAW_TAU = {2: 44.0, 5: 19.0, 20: 10.2}
STANDARDIZED_TAU = {2: 4.1, 5: 1.8, 20: 0.96}
RANKED = "--method decoder --batch-size 4 --real-batch-size 16 --rank-k 0"

# For each study, its runs: a key, and the options that differ from RankE's. The order is that of the tables. RankE and
# standard RL belong to each study but "ranks".
STUDIES = {
    "methods": {
        "real-images": "--method decoder --lambda-d 0 --lambda-g 0 --lambda-c 0 --disc-fakes reconstructions",
        "sft": "--method sft",
        "rl": "--method rl",
        "decoder-only": "--method decoder",
        "policy-first": "--method decoder --data scenes --ckpt {folder}/rl/policy.pt",  # after rl: its policy stays
        "uniform-gan": "--gan uniform",
        "k1": "--rank-k 1",
        "no-consistency": "--lambda-c 0",
        "ema-reference": "--ref-policy ema",
        "ranke": "",
    },
    # And the preset's β, 1.
    "frontier": {
        f"{m}-{beta}": f"--method {m} --kl-coef {beta}" for m in ("rl", "ranke") for beta in (3, 0.3, 0.1, 0.03)
    },
    # A decoder alone, K = G: no noise of a policy. With --gan uniform the weights act in the reward term alone.
    "ranks": {"equal-weights": f"{RANKED} --tau-start 1e6 --tau-end 1e6"}
    | {"raw-20-uniform": f"{RANKED} --gan uniform --no-rank-zscore --tau-start {RAW_TAU[20]} --tau-end {RAW_TAU[20]}"}
    | {f"raw-{x}": f"{RANKED} --no-rank-zscore --tau-start {tau} --tau-end {tau}" for x, tau in RAW_TAU.items()}
    | {f"standardized-{x}": f"{RANKED} --tau-start {tau} --tau-end {tau}" for x, tau in STANDARDIZED_TAU.items()},
}
ABLATIONS = {key: options for study in STUDIES.values() for key, options in study.items()}


# ---- runs ------------------------------------------------------------------------------------------------------------


def left_to_do(cfg, options):
    """Options that complete a run of train.py, None if it is done. Raises InputError for other settings."""
    checkpoint = Path(cfg.out, "ckpt.pt")
    if not checkpoint.exists():  # not begun, or stopped before its first save
        return options
    saved = read_checkpoint(checkpoint)
    for name, value in dataclasses.asdict(cfg).items():
        before = saved["config"].get(name)
        expect(name == "resume" or value == before, f"{cfg.out} has {name} = {before}, not {value}; name another --out")
    return None if saved["step"] == cfg.max_steps else [*options, "--resume"]


def run_all(commands, processes):
    """Runs `commands`, log file -> Python's arguments, `processes` at a time; where one fails, all end.

    However this ends, also by a signal, no child is left: each is told to stop and saves after its step.
    """
    waiting, running = list(commands), {}
    # A session of its own for each: Ctrl-C in the terminal reaches it through this process alone, once.
    options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "start_new_session": True, "stderr": subprocess.STDOUT}
    try:
        while waiting or running:
            if waiting and len(running) < processes:
                log = waiting.pop(0)
                with open(log, "ab") as file:
                    running[log] = subprocess.Popen([sys.executable, *commands[log]], stdout=file, **options)
                print(f"{time.strftime('%H:%M:%S')}  {log.with_suffix('')} started, {len(waiting)} wait", flush=True)
            time.sleep(0.2)
            for log in [log for log, child in running.items() if child.poll() is not None]:
                status = running.pop(log).returncode
                if status:
                    sys.exit(f"compare.py: {log.with_suffix('')} ended with status {status}; its output is in {log}")
    finally:
        for child in running.values():
            if child.poll() is None:  # one that has ended has no process group any more
                os.killpg(child.pid, signal.SIGTERM)
        for child in running.values():
            child.wait()


def swap(configs, picture):
    """Rows that measure each policy of a seed through each decoder; configs: key -> settings.

    `picture` is a file for what base, standard RL and RankE draw.
    """
    cfg, rows, columns = configs["ranke"], [], {}
    base = world.load_world(cfg)  # of RankE's settings, only those that all of the seed's runs share are read
    policies, decoders = {"base": base.policy}, {"base": base.vq}
    for key, run in configs.items():
        of_run = dataclasses.replace(cfg, ckpt=f"{run.out}/policy.pt", vq=f"{run.out}/vq_ema.pt")
        policy, vq, _ = world.load_pretrained(of_run)
        policies |= {key: policy} if run.trains_policy else {}
        decoders |= {key: vq} if run.trains_decoder else {}

    watched = Watched(base, cfg)  # what the runs were measured on
    for key, policy in policies.items():
        tokens, images = watched.draw(policy, decoders)
        for decoder, x in images.items():
            rows.append({"seed": cfg.seed, "policy": key, "decoder": decoder} | base.evaluate(tokens, x))
            columns[key, decoder] = x[:64]
    shown = {"base": ("base", "base"), "rl, base decoder": ("rl", "base")}
    shown |= {"ranke, base decoder": ("ranke", "base"), "ranke, own decoder": ("ranke", "ranke")}
    save_picture(picture, base, {label: columns[pair] for label, pair in shown.items()})
    return rows


def save_json(path, content):
    atomic_save(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


# ---- tables and figures ----------------------------------------------------------------------------------------------


def by_step(rows, decoder="own"):
    """A run's rows, step -> row, through that decoder where it has one, else through the base's."""
    rows = [row for row in rows if row["method"] != "real"]
    return {row["step"]: row for row in sorted(rows, key=lambda row: (row["step"], row["decoder"] == decoder))}


def last_rows(runs, decoder="own"):
    """The last row of each run."""
    return [by_step(rows, decoder)[rows[-1]["step"]] for rows in runs]


def print_means(title, found, references=None):
    """Means over the seeds of found[key], a row a seed; with `references`, of the differences within a seed.

    ± is a mean's standard error; 4/5: the number is lower in 4 seeds of 5.
    """
    lines = []
    for key, rows in found.items():
        line = {title: key}
        for name in world.NUMBERS:
            values = np.array([row[name] for row in rows])
            if references:
                values = values - [row[name] for row in references[key]]
            line[name] = f"{values.mean():.3f}"
            if len(values) > 1:
                line[name] += f"±{values.std(ddof=1) / len(values) ** 0.5:.3f}"
            if references:
                line[name] += f" {(values < 0).sum()}/{len(values)}"
        lines.append(line)
    print_table(lines)


def print_tables(found):
    """found: key -> the rows of each seed's run."""
    first = next(iter(found.values()))
    last, through_base = {"real": [rows[0] for rows in first], "base": [rows[1] for rows in first]}, {}
    for key, runs in found.items():
        last[key] = last_rows(runs)
        if last[key][0]["decoder"] == "own":
            through_base[key] = last_rows(runs, "base")
            last[f"{key}, base decoder"] = through_base[key]
    print_means(f"{len(first)} seeds, step {first[0][-1]['step']}", last)
    for key in [key for key in ("base", "rl", "ranke", "equal-weights") if key in last]:
        print_means(f"minus {key}", last, dict.fromkeys(last, last[key]))
    print_means("own minus base decoder", {key: last[key] for key in through_base}, through_base)


def by_strength(found, configs, method):
    """β -> the rows of each seed's run of the method, from the strongest KL anchor to the weakest."""
    keys = {"rl", "ranke", *STUDIES["frontier"]}
    betas = {key: cfg.kl_coef for (_, key), cfg in configs.items() if cfg.method == method and key in keys}
    return {betas[key]: found[key] for key in sorted(betas, key=betas.get, reverse=True)}


def draw_frontier(figure, rl, ranke):
    """Reward against distance at each β, means over the seeds with standard errors; thin, over a run's steps."""
    curves = {"rl": (rl, "base"), "ranke, base decoder": (ranke, "base"), "ranke, own decoder": (ranke, "own")}
    for i, name in enumerate(("frechet", "frechet_middle")):
        axes = figure.add_subplot(1, 2, i + 1, xlabel="scene_clip ↑", ylabel=f"{name} ↓")
        for color, (curve, (runs_at, decoder)) in enumerate(curves.items()):
            ends = []
            for beta, runs in runs_at.items():
                steps = [by_step(rows, decoder).values() for rows in runs]  # seeds, steps
                points = np.array([[(row["scene_clip"], row[name]) for row in rows] for rows in steps])
                axes.plot(*points.mean(0).T, color=f"C{color}", alpha=0.3, linewidth=0.8)
                ends.append([*points[:, -1].mean(0), *points[:, -1].std(0) / max(1, len(runs) - 1) ** 0.5])
                axes.annotate(f"{beta:g}", ends[-1][:2], (4, 4), textcoords="offset points", fontsize=8)
            x, y, x_error, y_error = zip(*ends)
            axes.errorbar(x, y, y_error, x_error, "o-", color=f"C{color}", markersize=4, label=curve)
        first = next(iter(rl.values()))
        real, base = ([np.mean([rows[i][x] for rows in first]) for x in ("scene_clip", name)] for i in (0, 1))
        axes.axhline(real[1], color="black", linestyle=":", label=f"real, base decoder (scene_clip {real[0]:.1f})")
        axes.plot(*base, "s", color="black", markersize=8, label="base")
    figure.axes[0].legend()


def print_swap(rows):
    """The distance, and the small CLIP's score, of each policy (a line) through each decoder, means over the seeds."""
    lines = {}
    for policy, decoder in dict.fromkeys((row["policy"], row["decoder"]) for row in rows):
        found = [row for row in rows if (row["policy"], row["decoder"]) == (policy, decoder)]
        distance, clip = (np.mean([row[name] for row in found]) for name in ("frechet", "scene_clip"))
        lines.setdefault(policy, {"policy": policy})[decoder] = f"{distance:.2f} ({clip:.1f})"
    print_table(list(lines.values()))


# ---- command line ----------------------------------------------------------------------------------------------------


def compare(args, options):
    expect(importlib.util.find_spec("matplotlib"), "it draws figures: pip install matplotlib")
    expect(min(args.seeds, args.processes) > 0, "--seeds and --processes: expected 1 or more")
    always = [] if args.study == "ranks" else ["rl", "ranke"]
    wanted = args.ablations or STUDIES[args.study]
    keys = [key for key in ABLATIONS if key in always or key in wanted]
    out, seeds = Path(args.out), list(range(args.seed, args.seed + args.seeds))
    configs = {}
    for after in (False, True):  # what starts from another run comes after it
        commands = {}
        for seed, key in itertools.product(seeds, [key for key in keys if ("{folder}" in ABLATIONS[key]) == after]):
            folder = out / f"seed-{seed}"
            make_folder(folder)
            of_run = ["--eval-every", "40", *options, *ABLATIONS[key].format(folder=folder).split()]
            of_run += ["--seed", str(seed), "--out", str(folder / key)]
            cfg = configs[seed, key] = train.parse_config(of_run)
            expect(cfg.data == "scenes", "the embedded world is compared on; leave --data and --ckpt out")
            todo = left_to_do(cfg, of_run)
            if todo:
                commands[folder / f"{key}.log"] = [train.__file__, *todo]
        run_all(commands, args.processes)

    runs = {run: json.loads(Path(cfg.out, "results.json").read_text()) for run, cfg in configs.items()}
    rows = [{"seed": seed, "key": key} | row for (seed, key), found in runs.items() for row in found]
    save_json(out / f"{args.study}.json", rows)
    found = {key: [runs[seed, key] for seed in seeds] for key in keys}
    print_tables(found)
    if args.study == "frontier":
        rl, ranke = (by_strength(found, configs, method) for method in ("rl", "ranke"))
        ends = [{f"β {beta:g}": last_rows(x[beta]) for beta in rl if beta in ranke} for x in (ranke, rl)]
        print_means("ranke minus rl", *ends)
        save_figure(out / "frontier.png", (12, 5), draw_frontier, rl, ranke)
    if args.study == "methods":
        swaps = []
        for seed in seeds:
            swaps += swap({key: configs[seed, key] for key in keys}, out / f"seed-{seed}" / "picture.png")
        save_json(out / "swap.json", swaps)
        print_swap(swaps)
    print(f"tables as JSON, figures and all runs are in {out}")


def main():
    parser = script_parser("compare.py", __doc__)
    parser.add_argument("--out", default="runs/compare", help="folder of the comparison [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="the first seed [%(default)s]")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, from --seed on [%(default)s]")
    parser.add_argument("--study", choices=STUDIES, default="methods", help="what is compared [%(default)s]")
    parser.add_argument("--ablations", nargs="+", choices=ABLATIONS, help="of all studies, only these")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time [%(default)s]")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    run_script(parser, compare)


if __name__ == "__main__":
    main()
