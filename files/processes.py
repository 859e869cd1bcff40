"""Other processes: one run a folder, signals that end a step and not a run, and torchrun's."""

import contextlib
import os
import signal
import sys
import threading
from datetime import timedelta

import filelock
import torch
import torch.distributed as dist

from files.disk import InputError, make_folder


@contextlib.contextmanager
def alone_in(out):
    """Makes a run's folder and keeps a second run out of it for as long as this process lives."""
    make_folder(out)
    lock = filelock.FileLock(out / ".lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise InputError(f"--out {out}: another run is going on there; name another folder") from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def noted_signals():
    """A list to which Ctrl-C and SIGTERM are added, for the step's end; after the first, Ctrl-C ends at once.

    Handlers are put back at the end. Outside of the main thread Python allows none: nothing is noted there.
    """
    received, before = [], {}

    def note(number, frame):
        received.append(number)
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        with contextlib.suppress(OSError, RuntimeError):  # a screen that is gone, or in the middle of a line
            print("\nending after this step, and saving; Ctrl-C ends at once", file=sys.stderr, flush=True)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def init_distributed(device):
    """This process' rank and how many torchrun started; (0, 1) without it."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # The others wait while the first evaluates.
        dist.init_process_group(dist.get_default_backend_for_device(device), timeout=timedelta(hours=12))
    return rank, world_size


def any_process(number, device):
    """The largest of all processes' numbers: all stop after the same step."""
    number = torch.tensor(number, device=device)
    if dist.is_initialized():
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def mean_over_processes(logs, device):
    """Numbers by name, each the mean of all processes'."""
    if not dist.is_initialized():
        return logs
    values = torch.tensor(list(logs.values()), dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return dict(zip(logs, (values / dist.get_world_size()).tolist()))
