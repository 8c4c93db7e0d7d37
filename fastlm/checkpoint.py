"""Models on disk: Hugging Face's folder of config.json and model.safetensors, or its shards.

A crash or a full disk leaves every file as it was before.
"""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .files import replacing, write_text
from .hub import Source

WEIGHTS, OLD_WEIGHTS, CONFIG = "model.safetensors", "pytorch_model.bin", "config.json"
TRUNK = ("wte", "wpe", "h", "ln_f")  # what the names of its tensors begin with
PREFIX = "transformer."  # of the trunk's tensors in a file saved from a model with a head
HEAD = "lm_head.weight"
CAUSAL_MASKS = (".attn.bias", ".attn.masked_bias")  # constants that old checkpoints carry


class CheckpointError(ValueError):
    """A file that is damaged, or that does not fit the model; the message names what."""


def save_model(model, folder: str | Path, max_shard_size: int | str = "50GB") -> None:
    """Writes config.json, generation_config.json and the tensors; a tied head is stored once."""
    folder = Path(folder)
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop(HEAD, None)
    shards = _shards(tensors, _in_bytes(max_shard_size))
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        with replacing(folder / name) as temporary:
            save_file(shard, temporary, metadata={"format": "pt"})
    if len(shards) > 1:
        places = {key: n for n, shard in zip(names, shards, strict=True) for key in shard}
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": places}
        names.append(f"{WEIGHTS}.index.json")
        write_text(folder / names[-1], json.dumps(index, indent=2) + "\n")
    for old in folder.glob("model*.safetensors*"):
        if old.name not in names:  # of what has been replaced
            old.unlink()
    settings = model.config.to_dict() | {"architectures": [type(model).__name__]}
    write_text(folder / CONFIG, json.dumps(settings, indent=2) + "\n")
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def _in_bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)B", size.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(
            f"save_pretrained: max_shard_size: got {size!r}, accepted are bytes and '200MB', '5GB'"
        )
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def _shards(tensors: dict[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """In order, each shard as full as it can be; a tensor above the limit has one to itself."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def load_config(config_class, source: Source):
    """The config of `source`; FileNotFoundError or CheckpointError where it has none to read."""
    path = source.require(CONFIG)
    try:
        return config_class.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_model(
    model_class,
    source: Source,
    config,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    use_safetensors: bool | None = None,
):
    """`model_class(config)` with `source`'s tensors, in eval mode; dtype None keeps the file's.

    Files with and without the "transformer." prefix are read. Raises FileNotFoundError, or
    CheckpointError where a file is damaged or its trunk is not the model's.
    """
    path, tensors = _read(source, use_safetensors)
    with torch.device("meta"):  # the initial values would be drawn only to be overwritten
        model = model_class(config)
    tensors = _rename(tensors, model)
    fresh = _check_fit(path, tensors, model)
    dtype = dtype or next(iter(tensors.values())).dtype
    model = model.to(dtype).to_empty(device=device)
    if fresh:
        model.init_weights()
    model.tie_weights()
    model.load_state_dict(tensors, strict=not fresh)
    if hasattr(model, "load_generation_config"):
        model.load_generation_config(source)
    return model.eval()


def _read(source: Source, use_safetensors: bool | None) -> tuple[Path, dict[str, Tensor]]:
    """The tensors, of one file or of all shards, and the path that errors name."""
    names = {None: (WEIGHTS, OLD_WEIGHTS), True: (WEIGHTS,), False: (OLD_WEIGHTS,)}
    kinds = names[use_safetensors]
    path = source.require(*(file for kind in kinds for file in (kind, f"{kind}.index.json")))
    if path.suffix != ".json":
        return path, read_tensors(path)
    try:
        shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not an index of shards: {error!r}") from error
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        tensors |= read_tensors(source.require(shard))
    return path, tensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a .bin, of which tensors alone are unpickled."""
    if path.suffix == ".bin":
        return unpickled(path, "file of tensors alone")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); copy or download it again"
        ) from error


def unpickled(path: Path, what: str) -> Any:
    """What torch.save wrote, without running code: tensors, numbers, text, lists and dicts.

    Raises CheckpointError, saying that it is not a whole `what`, where the file is anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged bytes may raise anything
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise CheckpointError(f"{path}: not a whole {what} ({reason})") from error


def _rename(tensors: dict[str, Tensor], model) -> dict[str, Tensor]:
    """The tensors under `model`'s own names, without what is no parameter of it."""
    own = {name.removeprefix(PREFIX): name for name in model.state_dict()}
    renamed = {
        own.get(name.removeprefix(PREFIX), name): tensor
        for name, tensor in tensors.items()
        if not name.endswith(CAUSAL_MASKS)
    }
    if HEAD in own and model.config.tie_word_embeddings and own["wte.weight"] in renamed:
        renamed[HEAD] = renamed[own["wte.weight"]]
    return renamed


def _check_fit(path: Path, tensors: dict[str, Tensor], model) -> list[str]:
    """The names of heads that are to be initialised; what the file has beyond is taken out.

    The trunk must fit tensor for tensor. Heads come and go (a classifier starts from a language
    model), so a difference there is a warning.
    """
    own = model.state_dict()
    trunk = model.base_model.state_dict().keys()
    missing = [name for name in own if name not in tensors]
    beyond = [name for name in tensors if name not in own]
    heads = [name for name in missing if name.removeprefix(PREFIX) not in trunk]
    others = [name for name in beyond if name.removeprefix(PREFIX).split(".")[0] not in TRUNK]
    wrong = [f"missing {name}" for name in missing if name not in heads]
    wrong += [f"unexpected {name}" for name in beyond if name not in others]
    wrong += [
        f"{name}: got shape {tuple(tensors[name].shape)}, accepted is {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(f"{path}: does not fit the config: {'; '.join(wrong[:5])}{more}")
    if heads:
        warnings.warn(
            f"{path}: has no {', '.join(heads)}: initialised, to be trained", stacklevel=4
        )
    for name in others:
        del tensors[name]
    if set(others) - {HEAD}:
        warnings.warn(f"{path}: {', '.join(others)}: not of this model, left out", stacklevel=4)
    return heads
