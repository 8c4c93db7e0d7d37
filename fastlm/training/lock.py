"""One process at a time trains in a folder: two would interleave their logs and checkpoints."""

import os
import socket
import sys
from pathlib import Path

from ..files import lock

NAME = "run.lock"

# The open files whose locks this process has. The kernel drops a lock when its process dies.
_held: dict[Path, int] = {}


def hold(out_dir: Path) -> None:
    """Takes the folder for this process until `release`; ValueError names the one that has it."""
    path = out_dir.resolve() / NAME
    if path in _held:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    free = lock(handle)
    if free is False:
        holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
        os.close(handle)
        raise ValueError(
            f"train: {out_dir}: {holder or 'another process'} is training in this folder: stop it "
            "first, or choose another --out-dir"
        )
    if free is None:
        print(
            f"fastlm: warning: {path}: this file system has no locks: a second process that trains "
            "in this folder will not be noticed",
            file=sys.stderr,
        )
    _held[path] = handle
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError as error:
        release(out_dir)
        raise OSError(f"{path}: could not be written: {error}") from error


def release(out_dir: Path) -> None:
    """Lets another process train in the folder."""
    handle = _held.pop(out_dir.resolve() / NAME, None)
    if handle is not None:
        os.close(handle)
