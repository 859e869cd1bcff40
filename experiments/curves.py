"""The logs of runs, drawn over each other: what one looks at while a run goes on, and after an ablation.

    python -m experiments.curves runs/scenes runs/rl

A panel for each thing that is logged, a colour a run; thin is the log, thick its running mean. Where a run's
numbers were not finite there is a gap. What its neighbours need of figures and command lines is here too.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from files.disk import InputError, atomic_save, expect, reading


def smooth(values, width):
    """Running mean over the finite ones of the `width` values around each; NaN where the value itself is."""
    finite, window = np.isfinite(values), np.ones(width)
    total, count = (np.convolve(x, window, "same") for x in (np.where(finite, values, 0.0), finite))
    return np.where(finite, total / np.maximum(count, 1), np.nan)


def draw_curves(figure, logs):
    """logs: run -> the lines of its log.jsonl, dicts."""
    names = dict.fromkeys(name for lines in logs.values() for line in lines for name in line if name != "step")
    for i, name in enumerate(names):
        axes = figure.add_subplot(-(-len(names) // 4), 4, i + 1, title=name)
        for color, (run, lines) in enumerate(logs.items()):
            steps = [line["step"] for line in lines]
            values = np.array([line.get(name) for line in lines], dtype=float)  # None becomes NaN
            axes.plot(steps, values, color=f"C{color}", alpha=0.25, linewidth=0.8)
            axes.plot(steps, smooth(values, max(1, len(values) // 30)), color=f"C{color}", label=run)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center")


def save_figure(path, size, draw, *content):
    """draw(figure, *content), saved as a PNG."""
    with reading("matplotlib", "it for the figures: pip install matplotlib", errors=ImportError):
        from matplotlib.figure import Figure
    figure = Figure(size, layout="constrained")
    draw(figure, *content)
    atomic_save(path, lambda file: figure.savefig(file, format="png", dpi=90))


def script_parser(name, doc):
    """A parser that shows a script's docstring as it is written."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(name, None, doc, formatter_class=raw, allow_abbrev=False)


def run_script(parser, function):
    """function(options, what follows -- on the command line); an InputError is one line and status 2."""
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:end])
    try:
        function(args, sys.argv[end + 1 :])
    except InputError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def curves(args, _):
    logs = {}
    for run in args.runs:
        with reading(f"{run}/log.jsonl", "the log of a run", errors=(OSError, ValueError)):
            logs[run] = [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]
        expect(logs[run], f"{run}/log.jsonl: holds no step yet")
    out = args.out or Path(args.runs[0], "curves.png")
    save_figure(out, (16, 12), draw_curves, logs)
    print(out)


def main():
    parser = script_parser("curves.py", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--out", help="the picture [curves.png in the first run's folder]")
    run_script(parser, curves)


if __name__ == "__main__":
    main()
