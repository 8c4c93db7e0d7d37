"""What a model's forward returns: fields by name, by index, or unpacked like a tuple."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..generation.cache import KVCache


class ModelOutput:
    """Base of the outputs. A field that is None has no place in the tuple, as in transformers."""

    def keys(self) -> list[str]:
        """The names of the fields that are not None; nothing is computed for the answer."""
        named = self.__dict__
        values = {field.name: named.get(field.name) for field in fields(self)}  # type: ignore[arg-type]
        return [name for name, value in values.items() if value is not None]

    def to_tuple(self) -> tuple:
        return tuple(getattr(self, name) for name in self.keys())

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, name: str) -> bool:
        return name in self.keys()

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            return getattr(self, key)
        if isinstance(key, int):
            return getattr(self, self.keys()[key])
        return self.to_tuple()[key]


@dataclass
class TrunkOutput(ModelOutput):
    last_hidden_state: Tensor  # (B, T, n_embd)
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None  # n_layer + 1 of (B, T, n_embd)
    attentions: tuple[Tensor, ...] | None = None  # n_layer of (B, n_head, T, keys)


class DeferredLogits:
    """head(hidden), computed when it is asked for, under the modes its forward ran under."""

    def __init__(self, head: nn.Module, hidden: Tensor):
        self.head, self.hidden = head, hidden
        self.grad = torch.is_grad_enabled()
        kind = hidden.device.type
        self.autocast = kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self.version = None if torch.compiler.is_compiling() else self._version()

    def _version(self) -> int:
        return sum(parameter._version for parameter in self.head.parameters())

    def compute(self) -> Tensor:
        if self.version not in (None, self._version()):
            raise RuntimeError(
                "CausalLMOutput: logits: the weights have changed since the forward; with labels, "
                "logits are computed when they are first read: read them before optimizer.step()"
            )
        kind, enabled, dtype = self.autocast
        with torch.set_grad_enabled(self.grad), torch.autocast(kind, dtype, enabled=enabled):
            return self.head(self.hidden)


class _Logits:
    """The field `logits`, of outputs that may have to compute it."""

    def __get__(self, output, kind=None):
        if output is None:
            return None  # the dataclass's default
        value = output.__dict__["logits"]
        if isinstance(value, DeferredLogits):
            value = output.__dict__["logits"] = value.compute()
        return value

    def __set__(self, output, value):
        output.__dict__["logits"] = value


@dataclass
class CausalLMOutput(ModelOutput):
    """With labels, logits are computed when first read: a training step needs the loss alone."""

    loss: Tensor | None = None  # float32 scalar
    logits: Any = _Logits()  # (B, T or logits_to_keep, vocab_size)
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class DoubleHeadsOutput(ModelOutput):
    loss: Tensor | None = None
    mc_loss: Tensor | None = None
    logits: Any = _Logits()  # (B, choices, T, vocab_size)
    mc_logits: Tensor | None = None  # (B, choices)
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class ClassifierOutput(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None  # (B, num_labels), or (B, T, num_labels) per token
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class QuestionAnsweringOutput(ModelOutput):
    loss: Tensor | None = None
    start_logits: Tensor | None = None  # (B, T)
    end_logits: Tensor | None = None  # (B, T)
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
