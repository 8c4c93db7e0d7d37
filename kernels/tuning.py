"""Block sizes that were measured: kept in a file, and used only where someone asks for it.

A kernel's block sizes come from one function, with its reasons. That function passes what may be
varied through `tuned`, under a key of the few facts that it looks at. `python -m benchmarks.tune`
varies it on a GPU and writes a file; after `use(path)` the file's sizes stand for the defaults, on
the device and with the triton that they were measured with. Nothing is read, tried or compiled
before that.
"""

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

Blocks = dict[str, int]

_in_force: dict[str, Blocks] = {}
_asked: dict[str, Blocks] | None = None  # what was asked for inside `trying`


def tuned(name: str, defaults: Blocks, **facts) -> Blocks:
    """`defaults`, or what is in force for a kernel of that name in a call of these facts.

    Raises ValueError where that names other sizes than `defaults`.
    """
    key = " ".join([name, *(f"{fact}={_text(value)}" for fact, value in facts.items())])
    if _asked is not None:
        _asked[key] = defaults
    found = _in_force.get(key, defaults)
    if found.keys() != defaults.keys():
        raise ValueError(
            f"tuning: {key}: expected {', '.join(defaults)}, got {', '.join(found)}: measured with "
            "another version of this kernel; tune again, or tuning.use(None)"
        )
    return found


def _text(value) -> str:
    return str(value).removeprefix("torch.")


def here() -> dict[str, str]:
    """What a file's sizes hold for: the current device's name, and triton's version."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"device": device, "triton": triton.__version__}


def use(path: str | Path | None) -> bool:
    """Put the block sizes of a file of benchmarks.tune in place of the defaults; None puts those
    back.

    Returns whether they are in force: a file from another device or another triton is left alone,
    with a warning. Raises FileNotFoundError, or ValueError for a file that is none of these.
    """
    global _in_force
    _in_force = {}
    if path is None:
        return False
    content = _read(Path(path))
    made = {name: content[name] for name in here()}
    if made != here():
        warnings.warn(
            f"tuning.use: {path} was measured on {_words(made)}, and this is {_words(here())}: the "
            "default block sizes stay",
            stacklevel=2,
        )
        return False
    _in_force = content["blocks"]
    return True


def _words(place: dict[str, str]) -> str:
    return f"{place['device']} with triton {place['triton']}"


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
        sizes = [size for blocks in content["blocks"].values() for size in blocks.values()]
        whole = all(type(size) is int and size > 0 for size in sizes)
        valid = whole and all(isinstance(content[name], str) for name in here())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise _not_a_file_of_ours(path, f"{type(error).__name__}: {error}") from error
    if not valid:
        raise _not_a_file_of_ours(path, "a size that is no positive number, or no name of a device")
    return content


def _not_a_file_of_ours(path: Path, found: str) -> ValueError:
    return ValueError(
        f"tuning.use: {path}: expected a JSON object with device, triton and blocks ({{key: "
        f"{{name: size}}}}) as benchmarks.tune writes it, got {found}"
    )


@contextlib.contextmanager
def trying(changes: dict[str, Blocks]) -> Iterator[dict[str, Blocks]]:
    """Only these sizes inside, for all threads; gives {key: defaults} of the kernels that ran."""
    global _in_force, _asked
    before, _in_force, _asked = (_in_force, _asked), changes, {}
    try:
        yield _asked
    finally:
        _in_force, _asked = before
