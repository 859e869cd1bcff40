"""A run's numbers: a line a step for people, one for machines, and a table at the end."""

import contextlib
import json
import math

from files.disk import reading


def log_step(path, step, max_steps, logs):
    """A line for people and one of JSON for machines, where numbers that are not finite are null."""
    bad = [name for name, value in logs.items() if not math.isfinite(value)]
    shown = [name for name in logs if name in ("reward", "kl", "seconds") or name.endswith(("_loss", "_grad_norm"))]
    line = "  ".join(f"{name} {logs[name]:.3g}" for name in shown)
    kept = [name.removesuffix("_grad_norm") for name in bad if name.endswith("_grad_norm")]
    if kept:
        line += f"  NO UPDATE of {', '.join(kept)}"
    if bad:
        line += f"  not finite: {', '.join(bad)}"
    with contextlib.suppress(OSError):  # Ctrl-C ends a `| tee` at once; the step is saved all the same
        print(f"step {step}/{max_steps}  {line}", flush=True)
    with reading(path, "a disk with room", OSError, verb="written"), open(path, "a") as file:
        file.write(json.dumps({"step": step} | logs | dict.fromkeys(bad)) + "\n")


def read_log(path, steps):
    """The log's lines of the first `steps` steps."""
    with reading(path, "the run's log; an empty file will do"):
        return "".join(path.read_text().splitlines(keepends=True)[:steps])


def print_table(rows):
    lines = [list(rows[0]), *([f"{x:.3f}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows)]
    widths = [max(map(len, column)) + 2 for column in zip(*lines)]
    print()
    for line in lines:
        print("".join(cell.rjust(width) for cell, width in zip(line, widths)))
