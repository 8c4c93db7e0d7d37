"""What a model's forward returns: fields by name, by index, or unpacked like a tuple."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ..generation.cache import KVCache


class ModelOutput:
    """Base of the outputs. A field that is None has no place in the tuple, as in transformers."""

    def to_tuple(self) -> tuple:
        values = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return tuple(value for value in values if value is not None)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __getitem__(self, key: str | int | slice) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]


@dataclass
class TrunkOutput(ModelOutput):
    last_hidden_state: Tensor  # (B, T, n_embd)
    past_key_values: KVCache | None = None


@dataclass
class CausalLMOutput(ModelOutput):
    loss: Tensor | None = None  # float32 scalar
    logits: Tensor | None = None  # (B, T or logits_to_keep, vocab_size)
    past_key_values: KVCache | None = None
