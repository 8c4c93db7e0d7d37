"""linear_cross_entropy on the CPU: a tile of classes for all rows at a time.

As Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models": one sweep over the
tiles keeps each row's log-sum-exp, a second one turns a tile's logits into their gradient in the
cache and multiplies it with both operands. Where the weight gets a gradient, the first sweep leaves
its logits in that gradient's memory: a class has as much of it as a logit of `features` rows takes.
Only rows beyond those are made again. Every product accumulates in float32.
"""

import torch
from torch import Tensor

from .. import memory
from ..backend import where
from .define import statistics_like


def forward(kernels, x, linear_weight, linear_bias, target, weight, options):
    """(loss, lse), nothing kept."""
    tiles = _Tiles(kernels, x, linear_weight, linear_bias, target, weight, options)
    return tiles.losses()


def backward(kernels, dloss, x, linear_weight, linear_bias, target, weight, lse, options, wanted):
    """(dx, dlinear_weight, dlinear_bias), None where not wanted; makes all logits again."""
    tiles = _Tiles(kernels, x, linear_weight, linear_bias, target, weight, options)
    return tiles.gradients(dloss, lse, wanted[0], *_empty(wanted[1:], linear_weight, linear_bias))


def gradients(kernels, dloss, x, linear_weight, linear_bias, target, weight, options, wanted):
    """(loss, lse, dx, dlinear_weight, dlinear_bias) of sum(dloss * loss), None where not wanted."""
    dlinear_weight, dlinear_bias = _empty(wanted[1:], linear_weight, linear_bias)
    tiles = _Tiles(
        kernels, x, linear_weight, linear_bias, target, weight, options, stash=dlinear_weight
    )
    loss, lse = tiles.losses()
    return loss, lse, *tiles.gradients(dloss, lse, wanted[0], dlinear_weight, dlinear_bias)


def _empty(wanted, *models):
    return [memory.empty_like(m) if w else None for w, m in zip(wanted, models, strict=True)]


class _Tiles:
    """One call: its operands, and the buffers that its tiles share.

    The first `kept` rows have their logits in `stash`, the weight's gradient; those of the others
    are in a buffer while they are used.
    """

    def __init__(self, kernels, x, linear_weight, linear_bias, target, weight, options, stash=None):
        self.kernels, self.x, self.target, self.weight = kernels, x, target, weight
        self.linear_weight, self.linear_bias = linear_weight, linear_bias
        self.ignore_index, self.label_smoothing, self.lse_square_scale, self.softcap = options
        self.stash = stash
        rows, features = x.shape
        self.kept = 0 if stash is None else min(rows, features)
        groups = slice(0, self.kept), slice(self.kept, rows)
        self.groups = [g for g in groups if g.start < g.stop] or [slice(0, 0)]
        self.width = _width(linear_weight.shape[0], x.dtype)
        self.sums_dtype = statistics_like(x, ()).dtype
        self.buffer = memory.empty(((rows - self.kept) * self.width,), x.dtype, x.device)
        sums = self.width * (features if x.dtype == self.sums_dtype else max(rows, features))
        self.sums = memory.empty((sums,), self.sums_dtype, x.device)

    def losses(self) -> tuple[Tensor, Tensor]:
        """The first sweep: (loss, lse)."""
        base = statistics_like(self.x, self.target.shape).fill_(-torch.inf)
        total, target_logit = torch.zeros_like(base), torch.zeros_like(base)
        weighted = torch.zeros_like(base, dtype=torch.float64) if self.label_smoothing else None
        for first, part in self._parts():
            for rows in self.groups:
                logits = self._place(rows, first, part)
                self._make(logits, rows, first, part)
                self.kernels.cross_entropy_tile_forward(
                    base[rows], total[rows], target_logit[rows],
                    None if weighted is None else weighted[rows], logits, self.target[rows],
                    self._weight_of(first, part), first, self.softcap, where(self.x),
                )  # fmt: skip
        lse = base.double() + total.double().log()
        hard, weights_sum = self._hard_weights()
        loss = (1 - self.label_smoothing) * hard * (lse - target_logit)
        loss += self.lse_square_scale * lse.square()
        if weighted is not None:
            classes = self.linear_weight.shape[0]
            loss += self.label_smoothing / classes * (weights_sum * lse - weighted)
        return loss.masked_fill_(self.target == self.ignore_index, 0).to(base.dtype), lse

    def gradients(self, dloss, lse, input_grad: bool, dlinear_weight, dlinear_bias):
        """The second sweep: (dx, dlinear_weight, dlinear_bias)."""
        scales = self._scales(dloss, lse)
        dx = torch.zeros_like(self.x, dtype=self.sums_dtype) if input_grad else None
        for first, part in self._parts():
            dweight = self.sums[: part.numel()].view(part.shape)
            dbias = dloss.new_zeros(part.shape[0])
            for rows in reversed(self.groups):  # making logits needs the memory of dweight
                logits = self._place(rows, first, part)
                if rows.start >= self.kept:
                    self._make(logits, rows, first, part)
                self.kernels.cross_entropy_tile_backward(
                    logits, self.target[rows], self._weight_of(first, part), lse[rows],
                    *(scale[rows] for scale in scales), first, self.softcap, where(self.x),
                )  # fmt: skip
                if dx is not None:
                    self._product(dx[rows], logits, part, add=True)
                if dlinear_weight is not None:
                    self._product(dweight, logits.t(), self.x[rows], add=rows is not self.groups[-1])
                if dlinear_bias is not None:
                    dbias += logits.sum(0, dtype=dloss.dtype)
            if dlinear_weight is not None:  # over the logits, which are no longer needed
                dlinear_weight[first : first + part.shape[0]] = dweight
            if dlinear_bias is not None:
                dlinear_bias[first : first + part.shape[0]] = dbias
        self.buffer = self.sums = None  # before input's gradient is there in two dtypes
        return None if dx is None else dx.to(self.x.dtype), dlinear_weight, dlinear_bias

    def _parts(self):
        """(first class, the tile's part of linear_weight)."""
        for first in range(0, self.linear_weight.shape[0], self.width):
            yield first, self.linear_weight[first : first + self.width]

    def _place(self, rows: slice, first: int, part: Tensor) -> Tensor:
        """Where a group's logits of a tile are."""
        shape = rows.stop - rows.start, part.shape[0]
        memory_of = self.buffer
        if rows.start < self.kept:
            memory_of = self.stash[first : first + part.shape[0]].view(-1)
        return memory_of[: shape[0] * shape[1]].view(shape)

    def _make(self, logits: Tensor, rows: slice, first: int, part: Tensor) -> None:
        """The logits, rounded to x's dtype once."""
        wide = logits
        if logits.dtype != self.sums_dtype:
            wide = self.sums[: logits.numel()].view(logits.shape)
        self._product(wide, self.x[rows], part.t(), add=False)
        if self.linear_bias is not None:
            wide += self.linear_bias[first : first + part.shape[0]]
        if wide is not logits:
            logits.copy_(wide)

    def _product(self, out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
        self.kernels.product(out, a, b, add, where(self.x))

    def _weight_of(self, first: int, part: Tensor) -> Tensor | None:
        return None if self.weight is None else self.weight[first : first + part.shape[0]]

    def _hard_weights(self):
        """Of each row the weight of its target, and the sum of all weights."""
        if self.weight is None:
            return 1.0, float(self.linear_weight.shape[0])
        safe = self.target.masked_fill(self.target == self.ignore_index, 0)
        return self.weight[safe], self.weight.sum(dtype=torch.float64)

    def _scales(self, dloss: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        """What each row's softmax, its smoothing and its target are multiplied by."""
        dloss = dloss.masked_fill(self.target == self.ignore_index, 0)
        hard, weights_sum = self._hard_weights()
        hard = (1 - self.label_smoothing) * hard * dloss
        smooth = self.label_smoothing / self.linear_weight.shape[0] * dloss
        softmax = hard + smooth * weights_sum + 2 * self.lse_square_scale * lse * dloss
        return tuple(t.to(dloss.dtype) for t in (softmax, smooth, hard))


def _width(classes: int, dtype: torch.dtype) -> int:
    """Classes of a tile: products run at full speed from about 200 on, and the buffers are to stay
    below 3 % of the logits, which bfloat16 makes half as large.
    """
    return max(96, min(384, classes // (256 if dtype == torch.bfloat16 else 128)))
