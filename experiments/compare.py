"""The methods beside each other on the embedded world: the same base, seeds, rollouts and steps for each.

    python -m experiments.compare --seeds 5                       the whole comparison
    python -m experiments.compare --ablations k1 ema-reference    only these beside RankE and standard RL
    python -m experiments.compare --own-bases                     a base of its own for each seed, made first
    python -m experiments.compare --out runs/d -- --lambda-d 0.1  what follows -- goes to each run of train.py

Each run is an ordinary `python train.py --out OUT/seed-N/KEY`, its output in OUT/seed-N/KEY.log; some go on
at a time, with a core each. Ctrl-C or SIGTERM ends them after their step, saved; the same command goes on
from there, or adds seeds and ablations to what is done. It leaves results.json (every measurement of every
run, with seed and key), swap.json (every policy through every decoder), pareto.png, and prints the tables.

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
from public.sample import Watched
from scenes import world

# Key: the options that make it of RankE. The order is that of tables and legends, nothing else.
ABLATIONS = {
    "real-images": "--method decoder --lambda-d 0 --lambda-g 0 --lambda-c 0 --disc-fakes reconstructions",
    "anchors": "--method decoder --lambda-d 0 --lambda-g 0 --disc-fakes reconstructions",  # and the consistency anchor
    "sft": "--method sft",
    "rl": "--method rl",
    "decoder-only": "--method decoder",
    "uniform-gan": "--gan uniform",
    "k1": "--rank-k 1",
    "no-consistency": "--lambda-c 0",
    "ema-reference": "--ref-policy ema",
    "ranke": "",
}


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


def swap(configs):
    """Rows that measure each policy of a seed through each decoder; configs: key -> settings."""
    cfg, rows = configs["ranke"], []  # of its settings, only those that all of the seed's runs share are read
    base = world.load_world(cfg)
    pairs = {"base": (base.policy, base.vq)}
    for key, run in configs.items():
        pairs[key] = world.load_pretrained(
            dataclasses.replace(cfg, ckpt=f"{run.out}/policy.pt", vq=f"{run.out}/vq_ema.pt")
        )
    policies = {key: pair[0] for key, pair in pairs.items() if key == "base" or configs[key].trains_policy}
    decoders = {key: pair[1] for key, pair in pairs.items() if key == "base" or configs[key].trains_decoder}

    watched = Watched(base, cfg)  # what the runs were measured on
    for key, policy in policies.items():
        tokens, images = watched.draw(policy, decoders)
        for decoder, x in images.items():
            rows.append({"seed": cfg.seed, "policy": key, "decoder": decoder} | base.evaluate(tokens, x))
    return rows


def save_json(path, content):
    atomic_save(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


# ---- tables and figures ----------------------------------------------------------------------------------------------


def by_step(rows):
    """A run's rows, step -> row, through its own decoder where it has one."""
    return {row["step"]: row for row in sorted(rows, key=lambda row: row["decoder"] == "own")}


def print_means(title, found, reference=None):
    """Means over the seeds; found: key -> a row for each seed. Less `reference`, such rows, within a seed."""
    lines = []
    for key, rows in found.items():
        values = np.array([[row[name] for name in world.NUMBERS] for row in rows])  # (seeds, numbers)
        if reference:
            values = values - [[row[name] for name in world.NUMBERS] for row in reference]
        cells = [f"{mean:.3f}" for mean in values.mean(0)]
        if len(rows) > 1:
            errors = values.std(0, ddof=1) / len(rows) ** 0.5
            cells = [f"{cell} ± {error:.3f}" for cell, error in zip(cells, errors)]
        lines.append({title: key} | dict(zip(world.NUMBERS, cells)))
    print_table(lines)


def print_tables(own):
    """own: key -> `by_step` of each seed's run."""
    base = [rows[0] for rows in own["ranke"]]
    last = {"base": base} | {key: [rows[max(rows)] for rows in own[key]] for key in own}
    for title, reference in ((f"{len(base)} seeds", None), ("minus base", base), ("minus rl", last["rl"])):
        print_means(title, last, reference)
    print(f"\nstep {max(own['ranke'][0])}; clip is x 100, frechet_middle x 1000; ± is a mean's standard error")


def draw_pareto(figure, own):
    """Reward against distance, a line an ablation from the base over its steps, means over the seeds."""
    axes = figure.add_subplot(xlabel="CLIP × 100 (higher is better)", ylabel="Fréchet distance (lower is better)")
    for key, found in own.items():
        clip, distance = ([np.mean([rows[n][x] for rows in found]) for n in found[0]] for x in ("clip", "frechet"))
        axes.plot(clip, distance, "o-", markersize=3, label=key)
    axes.legend()


def print_swap(rows):
    """The distance, and CLIP, of each policy (a line) through each decoder, means over the seeds."""
    lines = {}
    for policy, decoder in dict.fromkeys((row["policy"], row["decoder"]) for row in rows):
        found = [row for row in rows if (row["policy"], row["decoder"]) == (policy, decoder)]
        distance, clip = (np.mean([row[name] for row in found]) for name in ("frechet", "clip"))
        lines.setdefault(policy, {"policy": policy})[decoder] = f"{distance:.2f} ({clip:.1f})"
    print_table(list(lines.values()))


# ---- command line ----------------------------------------------------------------------------------------------------


def compare(args, options):
    expect(importlib.util.find_spec("matplotlib"), "it ends with figures: pip install matplotlib")
    expect(min(args.seeds, args.processes) > 0, "--seeds and --processes: expected 1 or more")
    keys = [key for key in ABLATIONS if key in ("rl", "ranke", *args.ablations)]
    out, seeds = Path(args.out), list(range(args.seed, args.seed + args.seeds))
    bases, commands, configs = {}, {}, {}
    for seed, key in itertools.product(seeds, keys):
        folder = out / f"seed-{seed}"
        make_folder(folder)
        here = ["--seed", str(seed), "--out"]
        of_run = ["--eval-every", "20", *options, *ABLATIONS[key].split(), *here, str(folder / key)]
        if args.own_bases:
            of_run += ["--base", str(folder / "base")]
            if len(list(folder.glob("base/*.pt"))) < 3:  # policy, tokenizer, judges
                bases[folder / "base.log"] = ["-m", "scenes.world", "--pretrain", *here, str(folder / "base")]
        configs[seed, key] = train.parse_config(of_run)
        expect(configs[seed, key].data == "scenes", "the embedded world is compared on; leave --data and --ckpt out")
        todo = left_to_do(configs[seed, key], of_run)
        if todo:
            commands[folder / f"{key}.log"] = [train.__file__, *todo]
    run_all(bases, 1)  # each takes two processes itself
    run_all(commands, args.processes)

    runs = {run: json.loads(Path(cfg.out, "results.json").read_text()) for run, cfg in configs.items()}
    rows = [{"seed": seed, "ablation": key} | row for (seed, key), found in runs.items() for row in found]
    save_json(out / "results.json", rows)
    own = {key: [by_step(runs[seed, key]) for seed in seeds] for key in keys}
    print_tables(own)
    save_figure(out / "pareto.png", (7, 4.5), draw_pareto, own)
    swaps = [row for seed in seeds for row in swap({key: configs[seed, key] for key in keys})]
    save_json(out / "swap.json", swaps)
    print_swap(swaps)
    print(f"results.json, swap.json, pareto.png and all runs are in {out}")


def main():
    parser = script_parser("compare.py", __doc__)
    parser.add_argument("--out", default="runs/compare", help="folder of the comparison [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="the first seed [%(default)s]")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, from --seed on [%(default)s]")
    parser.add_argument("--ablations", nargs="+", choices=ABLATIONS, default=ABLATIONS, help="not all, but these")
    parser.add_argument("--own-bases", action="store_true", help="pre-train a base for each seed, minutes each")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time [%(default)s]")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    run_script(parser, compare)


if __name__ == "__main__":
    main()
