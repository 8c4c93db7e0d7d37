"""A case: one way to call an op, what torch has for it, inputs, and the reason why it is there."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from accuracy import cast, results
from torch import Tensor

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    name: str
    ours: Callable
    theirs: Callable  # torch's own op, or a plain composition of its ops; in float64 the truth
    inputs: Callable  # fresh ones; the floating-point ones are float64, and get gradients
    why: str
    options: dict = field(default_factory=dict, compare=False)  # of both calls
    cancels: float = 1e-30  # the size of terms that cancel to a truth of zero

    def __str__(self) -> str:
        return self.name

    def make(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The same inputs at every call, rounded to `dtype`, on torch's default device."""
        with torch.random.fork_rng(), torch.device("cpu"):
            torch.manual_seed(0)
            inputs = cast(self.inputs(), dtype)
        return tuple(t.to(torch.get_default_device()) for t in inputs)

    def run(self, *inputs):
        return self.ours(*inputs, **self.options)

    def run_theirs(self, *inputs):
        return self.theirs(*inputs, **self.options)


@lru_cache(maxsize=64)
def expected(case: Case, dtype: torch.dtype) -> tuple[dict, dict]:
    """What torch gives at that dtype, and the truth: float64 from the same rounded inputs."""
    with torch.device("cpu"):
        inputs = case.make(dtype)
        theirs = results(case.run_theirs, inputs, dtype)
        return theirs, results(case.run_theirs, cast(inputs, F64), dtype)


def randn(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return torch.randn(shape, dtype=F64) * scale + shift


# ---- layouts: the same values, placed otherwise; what lies between them is NaN ----


def at_odd_offset(t: Tensor) -> Tensor:
    """Contiguous, but one element away from where vectors are aligned."""
    return _room(t, t.numel() + 1)[1:].view(t.shape).copy_(t)


def every_other(t: Tensor) -> Tensor:
    """The last dimension has stride 2."""
    return _room(t, 2 * t.numel()).view(*t.shape, 2)[..., 0].copy_(t)


def transposed(t: Tensor) -> Tensor:
    """The first dimension is the one that is contiguous."""
    return _room(t, t.numel()).view(t.shape[::-1]).permute(tuple(range(t.dim()))[::-1]).copy_(t)


def _room(t: Tensor, count: int) -> Tensor:
    return torch.full((count,), torch.nan if t.is_floating_point() else -1).to(t.dtype)


LAYOUTS = (at_odd_offset, every_other, transposed)
