"""A disk that others use too: what cannot be read or written is one line that names it, and no save is half a file."""

import contextlib
import os
import pickle
import re
import sys
from pathlib import Path


class InputError(Exception):
    """What the user gave cannot be used. One line: option, file or data, what was expected, what to do."""


def expect(condition, message):
    """Raises InputError where what the user gave is not as it must be."""
    if not condition:
        raise InputError(message)


def tolerant_output():
    """Lets stdout and stderr replace what they cannot print: redirected output may be no UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's streams have not; a windowed program has none
            stream.reconfigure(errors="replace")


@contextlib.contextmanager
def reading(path, expected, errors=Exception, verb="read"):
    """Turns what is raised inside into InputError: for damage a library raises any of a dozen types.

    Code of ours stays outside, or `errors` is narrow: a bug of ours keeps its traceback.
    """
    try:
        yield
    except errors as error:
        reason = reason_of(Path(path), error) if verb == "read" else f"{error!r:.300}"
        raise InputError(f"{path}: cannot be {verb} ({reason}); expected {expected}") from error


def reason_of(path, error):
    """Why a file, or one in a folder, cannot be read: the error in the words that help."""
    for file in (path, *path.glob("*")):
        if is_pointer_or_page(file):
            return f"{file.name} is text: a Git-LFS pointer or a web page"
    other = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
    if other:
        return f"holds {other[1]} beside its tensors; save the weights alone"
    # PyTorch's own words for such a file advise to switch its protection off.
    return "holds code, or no weights" if isinstance(error, pickle.UnpicklingError) else f"{error!r:.300}"


def is_pointer_or_page(path):
    if not path.is_file() or not os.access(path, os.R_OK):
        return False
    with open(path, "rb") as file:
        return file.read(9).startswith((b"version h", b"<"))


def make_folder(path):
    with reading(path, "a folder that can be made; name another with --out", OSError, verb="made"):
        path.mkdir(parents=True, exist_ok=True)


def list_files(folder):
    """The files below a folder, sorted: links are followed (a loop of them ends), hidden ones left out.

    Prints which folders below it may not be read. Raises InputError where there is no such folder.
    """
    expect(os.path.isdir(folder), f"{folder}: no such folder")
    files, seen = [], set()
    for parent, folders, names in os.walk(folder, onerror=print, followlinks=True):
        if os.path.realpath(parent) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders[:] = [name for name in folders if name[0] != "."]
        files += [Path(parent, name) for name in names if name[0] != "."]
    return sorted(files)


def read_bytes(path, offset=0, size=-1):
    """The bytes of a file, or of `size` bytes in it, as a member of a tar is."""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def atomic_save(path, write):
    """Lets write(file) fill a file beside `path`, then renames it: a reader finds the old or the new one.

    Raises InputError where it cannot be written; what was there before is untouched.
    """
    partial = Path(path).with_name(f".{Path(path).name}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # a full disk is an OSError, but from torch.save a RuntimeError
        with contextlib.suppress(OSError):  # where there is no such folder, for one
            partial.unlink()
        raise InputError(f"{path}: cannot be written ({error}); what was there before is untouched") from error
