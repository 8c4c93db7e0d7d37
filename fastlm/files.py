"""Replacing a file or a folder whole: what is on disk is either the old one or the new one.

The new one is written in a temporary folder beside its place, synced to the disk and renamed. Then
the folder around it is synced too: without that a power failure may undo the rename. The temporary
folder stays locked while it is used. The kernel drops the lock when the process dies, however it
dies, so `remove_leftovers` can tell what a dead process left from what a living one is writing.
"""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

SUFFIX = ".fastlm-tmp"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a path to write to; when the block ends well its file takes the place of `path`.

    When it does not, what was written is removed and `path` stays as it was. A failure to write
    is an OSError that names `path`.
    """
    path = Path(path)
    # A folder around the file: some libraries replace a file to write it, and its lock with it.
    with _failures_named(path), _temporary(path) as folder:
        temporary = folder / path.name
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        _sync(temporary)
        os.replace(temporary, path)
    _sync(path.parent)


@contextmanager
def replacing_folder(path: str | Path, *, keep_existing: bool = False) -> Iterator[Path]:
    """The same for a folder with all that is in it; the one that it yields is there and empty.

    keep_existing: if `path` is there when the block ends, because another process has made it
    in the meantime, it stays, and the new one is removed.
    """
    path = Path(path)
    with _failures_named(path), _temporary(path) as temporary:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        for each in (*temporary.rglob("*"), temporary):
            _sync(each)
        _rename_folder(temporary, path, keep_existing)
    _sync(path.parent)


def remove_folder(path: Path) -> None:
    """Removes a folder in one step: killed on the way, no part of it stays under its name."""
    with _temporary(path) as aside:
        os.rename(path, aside)


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_leftovers(folder: Path) -> None:
    """Removes the temporaries of dead processes from `folder`."""
    for path in folder.glob(f".*{SUFFIX}"):
        # What is not ours to open is not ours to remove; what has gone has been renamed.
        with suppress(FileNotFoundError, PermissionError), _opened(path) as handle:
            if lock(handle):
                shutil.rmtree(path, ignore_errors=True)


def lock(handle: int) -> bool | None:
    """Locks an open file or folder until it is closed, or until the process dies.

    False if another process has locked it, None if the file system has no locks.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def _failures_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path}: could not be written and is as it was before: {error}") from error


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, locked; removed at the end if it still has its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = None
    while handle is None:
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=SUFFIX))
        handle = _locked(temporary)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(handle)


def _locked(path: Path) -> int | None:
    """A handle of `path`; None if another process took it for a leftover before it was locked."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if lock(handle) is False or not path.exists():
        os.close(handle)
        return None
    return handle


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def _rename_folder(temporary: Path, path: Path, keep_existing: bool) -> None:
    try:
        os.rename(temporary, path)
    except OSError:
        # Only an empty folder can be replaced by a rename.
        if not path.is_dir():
            raise
        if not keep_existing:
            _exchange(temporary, path)


def _exchange(temporary: Path, path: Path) -> None:
    with _temporary(path) as aside:
        os.rename(path, aside)
        try:
            os.rename(temporary, path)
        except OSError:
            os.rename(aside, path)
            raise


def _sync(path: Path) -> None:
    with _opened(path) as handle:
        try:
            os.fsync(handle)
        except OSError as error:
            # Some file systems cannot sync a folder, and have no safer rename to offer.
            if error.errno != errno.EINVAL or not path.is_dir():
                raise OSError(f"{path}: could not be synced to the disk: {error}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
