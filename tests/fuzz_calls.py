"""A random call of a public op: its inputs, ours and torch's."""

from dataclasses import dataclass, field, fields
from functools import partial

import torch
from cases import F64, LAYOUTS, randn
from fuzz_torch import TORCH
from torch import Tensor

from fastlm import ops

INF, NAN = float("inf"), float("nan")


@dataclass(frozen=True)
class Input:
    """One tensor. Its numbers follow from these words and the seed of its call."""

    shape: tuple[int, ...] = ()
    fill: str = "normal"
    layout: str = "contiguous"
    values: int | tuple[int, ...] | None = None  # integers; takes the place of `shape` and `fill`
    limit: int = 0  # the classes, where `fill` is "classes"; some rows hold `ignored`
    ignored: int = -100
    grad: bool = True

    def __repr__(self) -> str:
        given = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]
        words = [f"{name}={value!r}" for name, value, usual in given if value != usual]
        return f"Input({', '.join(words)})"


@dataclass(frozen=True)
class Call:
    op: str
    dtype: str
    inputs: dict[str, Input]
    options: dict = field(default_factory=dict)
    upstream: str = "random"  # or "transposed"; or "ones", expanded, as sum() gives it
    seed: int = 0

    def make(self) -> dict[str, Tensor]:
        """The inputs in the call's dtype, each in its layout."""
        dtype = getattr(torch, self.dtype)
        with torch.random.fork_rng([]), torch.device("cpu"):
            torch.default_generator.manual_seed(self.seed)
            return {name: _made(given, dtype) for name, given in self.inputs.items()}

    def ours(self, **inputs):
        result = getattr(ops, self.op)(**inputs, **self.options)
        if self.op == "attention_with_kvcache":
            return result, inputs["k_cache"], inputs["v_cache"]
        return result

    def theirs(self, **inputs):
        """The same in torch's ops, in the dtype of `inputs`: float64 for the truth."""
        return TORCH[self.op](**inputs, **self.options)


def _made(given: Input, dtype: torch.dtype) -> Tensor:
    if given.values is not None:
        whole = isinstance(given.values, int)
        return torch.tensor(given.values, dtype=torch.int64 if whole else torch.int32)
    t = _FILLS[given.fill](given)
    t = t.to(dtype) if t.is_floating_point() else t
    if given.fill == "nan" and t.numel() and dtype == torch.float32:
        payload = (0x7FC00000, 0x7FC00001, 0x7FFFFFFF, -0x3FFFFF)[t.numel() % 4]
        t.view(torch.int32).view(-1)[_somewhere(t)] = payload
    return _LAYOUTS[given.layout](t)


def _somewhere(t: Tensor) -> int:
    return int(torch.randint(t.numel(), ()))


def _one(value: float, given: Input) -> Tensor:
    t = randn(*given.shape)
    if t.numel():
        t.view(-1)[_somewhere(t)] = value
    return t


def _some(value: float, given: Input) -> Tensor:
    """But not the first of a row: a row of -inf alone is NaN."""
    chosen = torch.rand(given.shape) < 0.3
    chosen[..., :1] = False
    return randn(*given.shape).masked_fill_(chosen, value)


def _classes(given: Input) -> Tensor:
    t = torch.randint(given.limit, given.shape)
    return torch.where(torch.rand(given.shape) < 0.2, given.ignored, t)


def _probabilities(given: Input) -> Tensor:
    return randn(*given.shape).softmax(1 if len(given.shape) > 1 else 0)


_FILLS = {
    "normal": lambda given: randn(*given.shape),
    "large": lambda given: randn(*given.shape, scale=30.0),
    "huge": lambda given: randn(*given.shape, scale=1e30),
    "tiny": lambda given: randn(*given.shape, scale=1e-20),
    "denormal": lambda given: randn(*given.shape, scale=1e-40),
    "far": lambda given: randn(*given.shape, shift=1000.0),
    "constant": lambda given: randn(*given.shape[:-1], 1, scale=1000.0).expand(given.shape),
    "zero": lambda given: torch.zeros(given.shape, dtype=F64),
    "nan": partial(_one, NAN),
    "inf": partial(_one, INF),
    "-inf": partial(_one, -INF),
    "masked": partial(_some, -INF),
    "lowest": partial(_some, -1e9),
    "hidden": lambda given: randn(*given.shape).masked_fill_(
        torch.arange(given.shape[-1]) < given.shape[-1] // 2, -INF
    ),
    "slopes": lambda given: torch.randint(256, given.shape).double() / 256,
    "seen": lambda given: torch.rand(given.shape) < 0.7,
    "classes": _classes,
    "kept": lambda given: torch.randint(given.limit, given.shape),
    "probabilities": _probabilities,
}
_LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    **{layout.__name__: layout for layout in LAYOUTS},
    # Every index of the first dimension is the same memory.
    "expanded": lambda t: t[:1].contiguous().expand(t.shape) if t.dim() > 1 else t,
}
LAYOUT_NAMES = tuple(_LAYOUTS)
