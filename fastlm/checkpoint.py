"""Models on disk: Hugging Face's folder of config.json and model.safetensors.

Every file is written under a temporary name beside its place and renamed when it is whole, so a
crash or a full disk leaves what was there before.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS, CONFIG = "model.safetensors", "config.json"
PREFIX = "transformer."  # of the trunk's tensors in a file saved from a model with a head
HEAD = "lm_head.weight"
CAUSAL_MASKS = (".attn.bias", ".attn.masked_bias")  # constants that old checkpoints carry


class CheckpointError(ValueError):
    """A file that is damaged, or that does not fit the model; the message names what."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path; when the block ends well its file takes the place of `path`.

    When it does not, the temporary file is removed and `path` stays as it was. A failure to write
    is an OSError that names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    os.fchmod(handle, 0o666 & ~_umask())
    os.close(handle)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path}: could not be written and is as it was before: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_model(model, folder: str | Path) -> None:
    """Writes `model.config` and `model`'s tensors; a tied head is stored once, as the embedding."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop(HEAD, None)
    with replacing(Path(folder) / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_text(Path(folder) / CONFIG, model.config.to_json())


def load_config(config_class, folder: str | Path):
    """The config of `folder`; FileNotFoundError or CheckpointError where it has none to read."""
    path = _existing(folder, CONFIG)
    try:
        return config_class.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_model(
    model_class,
    folder: str | Path,
    config,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
):
    """`model_class(config)` with `folder`'s tensors, in eval mode; dtype None keeps the file's.

    Files with and without the "transformer." prefix are read. Raises FileNotFoundError, or
    CheckpointError where the file is damaged or its tensors are not the model's.
    """
    path = _existing(folder, WEIGHTS)
    tensors = read_tensors(path)
    with torch.device("meta"):  # the initial values would be drawn only to be overwritten
        model = model_class(config)
    tensors = _rename(tensors, model)
    _check_fit(path, tensors, model)
    dtype = dtype or next(iter(tensors.values())).dtype
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()
    model.load_state_dict(tensors)
    return model.eval()


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); copy or download it again"
        ) from error


def _existing(folder: str | Path, name: str) -> Path:
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; accepted is a folder that holds {CONFIG} and {WEIGHTS}"
        )
    return path


def _rename(tensors: dict[str, Tensor], model) -> dict[str, Tensor]:
    """The tensors under `model`'s own names, without what is no parameter of it."""
    own = {name.removeprefix(PREFIX): name for name in model.state_dict()}
    renamed = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix(PREFIX)
        headless = bare == HEAD and HEAD not in own  # the trunk, from a file with a head
        if not headless and not name.endswith(CAUSAL_MASKS):
            renamed[own.get(bare, name)] = tensor
    if HEAD in own and model.config.tie_word_embeddings and own["wte.weight"] in renamed:
        renamed[HEAD] = renamed[own["wte.weight"]]
    return renamed


def _check_fit(path: Path, tensors: dict[str, Tensor], model) -> None:
    own = model.state_dict()
    wrong = [f"missing {name}" for name in own if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in own]
    wrong += [
        f"{name}: got shape {tuple(tensors[name].shape)}, accepted is {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(f"{path}: does not fit the config: {'; '.join(wrong[:5])}{more}")
