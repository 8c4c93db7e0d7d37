"""The whole state of a training run on disk, from which it continues bit for bit.

`out_dir/checkpoints/step-00001000/` is a folder that `from_pretrained` reads, with the optimiser's
state beside the model. It is written under another name and renamed, so it is whole if it is there.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import CheckpointError, unpickled
from ..files import remove_folder, replacing, replacing_folder

STATE = "training_state.pt"
NAME = re.compile("step-[0-9]{8}")
ENTRIES: dict[str, Any] = {
    "optimizer": dict,
    "step": int,
    "position": int,
    "tokens": int,
    "seconds": float,
    "text": str,
    "recent": torch.Tensor,
    "samples": int | None,
}


def save(out_dir: Path, step: int, model, tokenizer, state: dict[str, Any], keep: int) -> Path:
    """Writes the checkpoint of `step`, then removes all but the `keep` newest.

    Raises OSError, naming the folder, where it cannot be written; no older one is lost then.
    """
    folder = out_dir / "checkpoints" / f"step-{step:08d}"
    with replacing_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _write_state(state, temporary / STATE)
    for old in every(out_dir)[:-keep]:
        if not old.is_symlink():  # to one that the user has moved
            remove_folder(old)
    return folder


@contextmanager
def saved_if_writing_fails(save: Callable[[], Path], out_dir: Path) -> Iterator[None]:
    """Calls `save` on an OSError: a log that cannot be written must not cost the steps since."""
    try:
        yield
    except BrokenPipeError:  # of the terminal; the command tells it from a file's failure
        save()
        raise
    except OSError as error:
        try:
            folder = save()
        except OSError as second:
            raise OSError(f"{error}; then {second}") from error
        raise OSError(
            f"{error}; saved {folder}: go on with: fastlm train --resume {out_dir}"
        ) from error


def _write_state(state: dict[str, Any], path: Path) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch hides the OSError of a failed write under its own
            raise OSError(error.__context__ or error) from error


def every(out_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; a folder with any other name is not ours."""
    folders = (out_dir / "checkpoints").glob("step-*")
    return sorted(each for each in folders if NAME.fullmatch(each.name) and each.is_dir())


def newest(folder: str | Path) -> Path:
    """The newest checkpoint where `folder` is a run's, otherwise `folder` itself."""
    found = every(Path(folder))
    return found[-1] if found else Path(folder)


def load_state(folder: Path) -> dict[str, Any]:
    """What `save` was given as `state`; CheckpointError, naming the entry, for anything else."""
    path = folder / STATE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; accepted is a checkpoint of a training run")
    state = unpickled(path, "training state")
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not a whole training state (a {type(state).__name__})")
    # Checkpoints did not always have these.
    state = {"text": "", "recent": torch.empty(0, 2), "samples": None, **state}
    for name, kind in ENTRIES.items():
        value = state.get(name)
        if not isinstance(value, kind):
            raise CheckpointError(
                f"{path}: {name}: expected {getattr(kind, '__name__', kind)}, got "
                f"{type(value).__name__}"
            )
        if isinstance(value, int | float) and not value >= 0:
            raise CheckpointError(f"{path}: {name}: expected >= 0, got {value}")
    if state["recent"].shape[1:] != (2,):
        raise CheckpointError(
            f"{path}: recent: expected shape (steps, 2), got {tuple(state['recent'].shape)}"
        )
    return state
