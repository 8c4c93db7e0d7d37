"""The whole state of a training run on disk, from which it continues bit for bit.

`out_dir/checkpoints/step-00001000/` is a folder that `from_pretrained` reads, with the optimiser's
state beside the model. It is written under another name and renamed, so it is whole if it is there.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import CheckpointError, replacing

STATE = "training_state.pt"


def save(out_dir: Path, step: int, model, tokenizer, state: dict[str, Any], keep: int) -> Path:
    """Writes the checkpoint of `step`, then removes all but the `keep` newest.

    Raises OSError, naming the folder, where it cannot be written; no older one is lost then.
    """
    folder = out_dir / "checkpoints" / f"step-{step:08d}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _write_state(state, temporary / STATE)
        os.chmod(temporary, 0o755)  # mkdtemp's folders are closed to others
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
    except OSError as error:
        raise OSError(f"{folder}: the checkpoint could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in every(out_dir)[:-keep]:
        shutil.rmtree(old)
    return folder


def _write_state(state: dict[str, Any], path: Path) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch hides the OSError of a failed write under its own
            raise OSError(error.__context__ or error) from error


def every(out_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((out_dir / "checkpoints").glob("step-*"))


def newest(folder: str | Path) -> Path:
    """The newest checkpoint where `folder` is a run's, otherwise `folder` itself."""
    found = every(Path(folder))
    return found[-1] if found else Path(folder)


def load_state(folder: Path) -> dict[str, Any]:
    """What `save` was given as `state`; CheckpointError where the file is damaged."""
    path = folder / STATE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; accepted is a checkpoint of a training run")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole training state: {error}") from error
