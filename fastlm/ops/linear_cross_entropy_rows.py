"""linear_cross_entropy on a GPU: some rows at a time, over all classes."""

import torch
from torch import Tensor

from .. import memory
from ..backend import where
from .define import statistics_like

_ROWS = 512  # a chunk's logits of GPT-2, 51 MB in bfloat16, stay in the L2 cache of a large GPU


def forward(kernels, x, linear_weight, linear_bias, target, weight, options):
    """(loss, lse), nothing kept."""
    loss = statistics_like(x, target.shape)
    lse = target.new_empty(target.shape, dtype=torch.float64)
    for rows, logits in _chunks(x, linear_weight, linear_bias):
        kernels.cross_entropy_forward(
            loss[rows], lse[rows], None, logits, target[rows], weight, *options, 0.0, where(x)
        )
    return loss, lse


def backward(kernels, dloss, x, linear_weight, linear_bias, target, weight, lse, options, wanted):
    """(dx, dlinear_weight, dlinear_bias), None where not wanted; makes all logits again."""
    sums = _Gradients(x, linear_weight, linear_bias, wanted)
    for rows, logits in _chunks(x, linear_weight, linear_bias):
        kernels.cross_entropy_backward(
            logits, dloss[rows], logits, target[rows], weight, lse[rows], *options, where(x)
        )
        sums.add(rows, logits)
    return sums.results()


def gradients(kernels, dloss, x, linear_weight, linear_bias, target, weight, options, wanted):
    """(loss, lse, dx, dlinear_weight, dlinear_bias) of sum(dloss * loss), None where not wanted:
    the logits of a chunk are there once for all of it.
    """
    loss = statistics_like(x, target.shape)
    lse = target.new_empty(target.shape, dtype=torch.float64)
    sums = _Gradients(x, linear_weight, linear_bias, wanted)
    for rows, logits in _chunks(x, linear_weight, linear_bias):
        labels = target[rows], weight
        kernels.cross_entropy_forward(
            loss[rows], lse[rows], None, logits, *labels, *options, 0.0, where(x)
        )
        kernels.cross_entropy_backward(
            logits, dloss[rows], logits, *labels, lse[rows], *options, where(x)
        )
        sums.add(rows, logits)
    return loss, lse, *sums.results()


def _chunks(x, linear_weight, linear_bias):
    """(rows, logits)."""
    for first in range(0, x.shape[0], _ROWS):
        rows = slice(first, first + _ROWS)
        yield rows, torch.nn.functional.linear(x[rows], linear_weight, linear_bias)


class _Gradients:
    """Those that are wanted; the parameters' are summed over the chunks in float32 or float64."""

    def __init__(self, x, linear_weight, linear_bias, wanted):
        self.x, self.linear_weight, self.linear_bias = x, linear_weight, linear_bias
        self.dx = memory.empty_like(x) if wanted[0] else None
        self.dlinear_weight, self.dlinear_bias = (
            statistics_like(x, t.shape).zero_() if w else None
            for t, w in ((linear_weight, wanted[1]), (linear_bias, wanted[2]))
        )

    def add(self, rows: slice, dlogits: Tensor) -> None:
        if self.dx is not None:
            torch.mm(dlogits, self.linear_weight, out=self.dx[rows])
        if self.dlinear_weight is not None:
            self.dlinear_weight += dlogits.t() @ self.x[rows]
        if self.dlinear_bias is not None:
            self.dlinear_bias += dlogits.sum(0, dtype=self.dlinear_bias.dtype)

    def results(self) -> tuple[Tensor | None, ...]:
        parameters = (
            None if t is None else t.to(self.x.dtype)
            for t in (self.dlinear_weight, self.dlinear_bias)
        )
        return self.dx, *parameters
