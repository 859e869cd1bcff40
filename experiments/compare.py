"""The methods beside each other on the embedded world: the same base, seeds, rollouts and steps for each.

    python -m experiments.compare --seeds 5                       the methods (--study methods)
    python -m experiments.compare --seeds 5 --study frontier      standard RL and RankE at five strengths of the anchor
    python -m experiments.compare --ablations k1 ema-reference    only these beside RankE and standard RL
    python -m experiments.compare --out runs/d -- --lambda-d 0.1  what follows -- goes to each run of train.py: also
                                                                  --base DIR, made by scenes.world --pretrain

Each run is an ordinary `python train.py --out OUT/seed-N/KEY`, its output in OUT/seed-N/KEY.log; some go on
at a time, with a core each. Ctrl-C or SIGTERM ends them after their step, saved; the same command goes on
from there, or adds seeds, studies and ablations to what is done. It prints the tables and leaves results.json (every
measurement of every run, with seed and key), picture.png of the first seed, and frontier.png or swap.json (every
policy through every decoder).

A run is reported through its own decoder, standard RL through the base's, which it has kept.
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

# At these τ the weights of a group's best and worst rollout differ by these factors. The rewards of a group of 8 span
# 30.6 on average, 2.87 standardized (the base's, 96 groups), and τ is the span over the factor's logarithm.
RAW_TAU = {2: 44.0, 5: 19.0, 20: 10.2}
STANDARDIZED_TAU = {2: 4.1, 5: 1.8, 20: 0.96}
ALL_RANKED = "--method decoder --batch-size 4 --real-batch-size 16 --rank-k 0"

# Study: key: the options that make it of RankE. The order is that of tables and legends. RankE and standard RL belong
# to each study but "ranks".
STUDIES = {
    "methods": {
        "real-images": "--method decoder --lambda-d 0 --lambda-g 0 --lambda-c 0 --disc-fakes reconstructions",
        "sft": "--method sft",
        "rl": "--method rl",
        "decoder-only": "--method decoder",
        "policy-first": "--method decoder --data scenes --ckpt {folder}/rl",  # after rl: its policy stays
        "uniform-gan": "--gan uniform",
        "k1": "--rank-k 1",
        "no-consistency": "--lambda-c 0",
        "ema-reference": "--ref-policy ema",
        "ranke": "",
    },
    # The fifth strength is the default's.
    "frontier": {
        f"{m}-{beta}": f"--method {m} --kl-coef {beta}" for m in ("rl", "ranke") for beta in (3, 0.3, 0.1, 0.03)
    },
    # A decoder alone, K = G: what the weights do, without the noise of a policy.
    "ranks": {"uniform": f"{ALL_RANKED} --tau-start 1e6 --tau-end 1e6"}
    | {f"raw-{x}": f"{ALL_RANKED} --no-rank-zscore --tau-start {tau} --tau-end {tau}" for x, tau in RAW_TAU.items()}
    | {f"standardized-{x}": f"{ALL_RANKED} --tau-start {tau} --tau-end {tau}" for x, tau in STANDARDIZED_TAU.items()},
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


def load_run(cfg, out):
    """The policy that a run left, and its decoder's EMA."""
    return world.load_pretrained(dataclasses.replace(cfg, ckpt=f"{out}/policy.pt", vq=f"{out}/vq_ema.pt"))[:2]


def swap(configs):
    """Rows that measure each policy of a seed through each decoder; configs: key -> settings."""
    cfg, rows = configs["ranke"], []  # of its settings, only those that all of the seed's runs share are read
    base = world.load_world(cfg)
    policies, decoders = {"base": base.policy}, {"base": base.vq}
    for key, run in configs.items():
        policy, vq = load_run(cfg, run.out)
        policies |= {key: policy} if run.trains_policy else {}
        decoders |= {key: vq} if run.trains_decoder else {}

    watched = Watched(base, cfg)  # what the runs were measured on
    for key, policy in policies.items():
        tokens, images = watched.draw(policy, decoders)
        for decoder, x in images.items():
            rows.append({"seed": cfg.seed, "policy": key, "decoder": decoder} | base.evaluate(tokens, x))
    return rows


def draw_picture(path, configs):
    """What base, standard RL and RankE draw for a seed's captions, and what RankE's decoder changes."""
    cfg = configs["ranke"]
    base = world.load_world(cfg)
    watched = Watched(base, cfg)
    (rl, _), (ranke, vq) = (load_run(cfg, configs[key].out) for key in ("rl", "ranke"))
    _, columns = watched.draw(base.policy, {"base": base.vq}, 64)
    columns |= watched.draw(rl, {"rl, base decoder": base.vq}, 64)[1]
    columns |= watched.draw(ranke, {"ranke, base decoder": base.vq, "ranke, own decoder": vq}, 64)[1]
    save_picture(path, base, columns)


def save_json(path, content):
    atomic_save(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


# ---- tables and figures ----------------------------------------------------------------------------------------------


def by_step(rows, decoder="own"):
    """A run's rows, step -> row, through that decoder where it has one, else through the base's."""
    rows = [row for row in rows if row["method"] != "real"]
    return {row["step"]: row for row in sorted(rows, key=lambda row: row["decoder"] == decoder)}


def last_rows(runs, decoder="own"):
    """The last row of each run."""
    return [by_step(rows, decoder)[rows[-1]["step"]] for rows in runs]


def mean_cell(name, values, differences):
    """Mean ± standard error of one number over the seeds, and in how many of them a distance is lower."""
    digits = 3 if name in ("accuracy", "token_kl") else 2
    cell = f"{np.mean(values):{'+' if differences else ''}.{digits}f}"
    if len(values) > 1:
        cell += f"±{np.std(values, ddof=1) / len(values) ** 0.5:.{digits}f}"
        if differences and name.startswith("frechet"):
            cell += f" {sum(value < 0 for value in values)}/{len(values)}"
    return cell


def print_means(title, found, references=None):
    """found: key -> a row a seed; less those of `references`, key -> a row a seed, within a seed."""
    lines = []
    for key, rows in found.items():
        line = {title: key}
        for name in world.NUMBERS:
            values = [row[name] for row in rows]
            if references:
                values = [value - other[name] for value, other in zip(values, references[key])]
            line[name] = mean_cell(name, values, references)
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
            last[f"{key}, base d."] = through_base[key]
    print_means(f"{len(first)} seeds", last)
    print_means("minus base", last, dict.fromkeys(last, last["base"]))
    for key in last.keys() & {"rl", "uniform"}:
        print_means(f"minus {key}", last, dict.fromkeys(last, last[key]))
    print_means("minus base d.", {key: last[key] for key in through_base}, through_base)
    print(f"\nstep {first[0][-1]['step']}; ± is a mean's standard error, 4/5: lower in 4 seeds of 5; d. is decoder")


def by_strength(found, configs, method):
    """β -> the rows of each seed's run of the method, from the strongest anchor to the weakest."""
    keys = {"rl", "ranke", *STUDIES["frontier"]}
    betas = {key: cfg.kl_coef for (_, key), cfg in configs.items() if cfg.method == method and key in keys}
    return {betas[key]: found[key] for key in sorted(betas, key=betas.get, reverse=True)}


def at_reward(runs, name, reward):
    """One seed's number at a reward: linear between the ends of its runs at all strengths, and the base."""
    ends = sorted((row["scene_clip"], row[name]) for row in [runs[0][1], *last_rows(runs)])
    clip, values = zip(*ends)
    return np.interp(reward, clip, values) if clip[0] <= reward <= clip[-1] else np.nan


def print_frontier(rl, ranke):
    """rl, ranke: β -> the rows of each seed's run. Their ends at the same β, and at the same reward."""
    ends = {f"ranke, β {beta:g}": last_rows(runs) for beta, runs in ranke.items()}
    print_means("minus rl, same β", ends, dict(zip(ends, map(last_rows, rl.values()))))
    lines = []
    for reward in range(83, 90):
        line = {"ranke minus rl at": f"scene_clip {reward}"}
        for name in ("frechet", "frechet_middle"):
            pairs = [[at_reward(seed, name, reward) for seed in zip(*x.values())] for x in (ranke, rl)]
            values = np.subtract(*pairs)
            line[name] = mean_cell(name, values[np.isfinite(values)], True) if np.isfinite(values).any() else "-"
        lines.append(line)
    print_table(lines)


def draw_frontier(figure, rl, ranke):
    """Reward against distance: the means over the seeds at each strength, thin over a run's steps."""
    curves = {"standard RL": (rl, "base"), "RankE's policy, base's decoder": (ranke, "base"), "RankE": (ranke, "own")}
    for i, (name, label) in enumerate({"frechet": "Fréchet distance", "frechet_middle": "middle layer"}.items()):
        axes = figure.add_subplot(
            1, 2, i + 1, xlabel="scene_clip (higher is better)", ylabel=f"{label} (lower is better)"
        )
        for color, (curve, (runs_at, decoder)) in enumerate(curves.items()):
            ends = []
            for runs in runs_at.values():
                steps = [list(by_step(rows, decoder).values()) for rows in runs]  # seeds, steps
                points = np.array([[(row["scene_clip"], row[name]) for row in rows] for rows in steps])
                axes.plot(*points.mean(0).T, color=f"C{color}", alpha=0.3, linewidth=0.8)
                ends.append([*points[:, -1].mean(0), *points[:, -1].std(0, ddof=1) / len(runs) ** 0.5])
            x, y, x_error, y_error = zip(*ends)
            axes.errorbar(x, y, y_error, x_error, "o-", color=f"C{color}", markersize=4, label=curve)
        first = next(iter(rl.values()))
        for row, (label, marker) in enumerate({"real scenes, reconstructed": "*", "base": "s"}.items()):
            x, y = (np.mean([rows[row][number] for rows in first]) for number in ("scene_clip", name))
            axes.plot(x, y, marker, color="black", markersize=8, label=label)
    axes.legend()


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
    rows = [{"seed": seed, "ablation": key} | row for (seed, key), found in runs.items() for row in found]
    save_json(out / "results.json", rows)
    found = {key: [runs[seed, key] for seed in seeds] for key in keys}
    print_tables(found)
    if args.study == "frontier":
        curves = [by_strength(found, configs, method) for method in ("rl", "ranke")]
        print_frontier(*curves)
        save_figure(out / "frontier.png", (12, 4.5), draw_frontier, *curves)
    if args.study == "methods":
        of_seeds = [{key: configs[seed, key] for key in keys} for seed in seeds]
        swaps = [row for of_seed in of_seeds for row in swap(of_seed)]
        save_json(out / "swap.json", swaps)
        print_swap(swaps)
        draw_picture(out / "picture.png", of_seeds[0])
    print(f"results.json, figures and all runs are in {out}")


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
