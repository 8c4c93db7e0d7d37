"""linear_cross_entropy on the CPU: a tile of classes for all rows at a time.

As Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models": one sweep over the
tiles keeps each row's log-sum-exp, a second one turns a tile's logits into their gradient in the
cache and multiplies it with both operands. Where the weight gets a gradient, the first sweep leaves
its logits in the memory of that gradient, as codes of three quarters of their size
(csrc/cpu/kept_logits.h): of a third more rows than there are features. Those of further rows are
made again.
Every product accumulates in float32. In bfloat16 the buffers of a tile lie in the memory of input's
gradient, which is written last.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import memory
from ..backend import where
from .define import statistics_like


def forward(kernels, x, linear_weight, linear_bias, target, weight, options):
    """(loss, lse), nothing kept."""
    return _Tiles(kernels, x, linear_weight, linear_bias, target, weight, options).losses()


def backward(kernels, dloss, x, linear_weight, linear_bias, target, weight, lse, options, wanted):
    """(dx, dlinear_weight, dlinear_bias), None where not wanted; makes all logits again."""
    outputs = _empty(wanted, x, linear_weight, linear_bias)
    tiles = _Tiles(
        kernels, x, linear_weight, linear_bias, target, weight, options, spare=outputs[0]
    )
    return tiles.gradients(dloss, lse, *outputs)


def gradients(kernels, dloss, x, linear_weight, linear_bias, target, weight, options, wanted):
    """(loss, lse, dx, dlinear_weight, dlinear_bias) of sum(dloss * loss), None where not wanted."""
    outputs = _empty(wanted, x, linear_weight, linear_bias)
    tiles = _Tiles(
        kernels, x, linear_weight, linear_bias, target, weight, options, outputs[1], outputs[0]
    )
    loss, lse = tiles.losses()
    return loss, lse, *tiles.gradients(dloss, lse, *outputs)


def _empty(wanted, x, *parameters):
    """The gradients. Input's is small: the pool's whole huge pages would be a third more."""
    dx = torch.empty_like(x) if wanted[0] else None
    grads = zip(wanted[1:], parameters, strict=True)
    return [dx, *(memory.empty_like(p) if w else None for w, p in grads)]


class _Tile(NamedTuple):
    """Some classes: their part of each parameter, and where their logits of `kept` rows wait."""

    first: int
    linear_weight: Tensor
    linear_bias: Tensor | None
    weight: Tensor | None
    ahead: Tensor  # the linear_weight of the next, of the first after the last
    kept: tuple[Tensor, Tensor, int]  # as the kernels take it: room, scales, how many rows


class _Tiles:
    """One call: its operands, and the buffers that its tiles share.

    `logits` holds those of a tile in the accumulation type. From the first sweep to the second they
    lie in `room`, the memory of the weight's gradient; `spare` is that of input's.
    """

    def __init__(
        self, kernels, x, linear_weight, linear_bias, target, weight, options, room=None, spare=None
    ):
        self.kernels, self.x, self.target, self.weight = kernels, x, target, weight
        self.ignore_index, self.label_smoothing, self.lse_square_scale, self.softcap = options
        self.where = where(x)
        rows, features = x.shape
        self.classes = linear_weight.shape[0]
        self.width = min(_width(rows, features, self.classes, x.dtype), self.classes)
        self.sums_dtype = statistics_like(x, ()).dtype
        self.narrow = x.dtype != self.sums_dtype
        self.tiles = self._tiles_of(linear_weight, linear_bias, weight, room)
        size = self.width * (max(rows, features) if self.narrow else rows)
        if not self.narrow:
            self.logits = self.dlogits = memory.empty((size,), x.dtype, x.device)
            return
        if spare is None or spare.numel() < 2 * size + rows * self.width:
            spare = memory.empty((2 * size + rows * self.width,), x.dtype, x.device)
        self.logits = spare.view(-1)[: 2 * size].view(self.sums_dtype)
        self.dlogits = spare.view(-1)[2 * size :]

    def _tiles_of(self, linear_weight, linear_bias, weight, room) -> list[_Tile]:
        """All at once: between two products every call of torch's leaves the threads waiting."""
        firsts = range(0, self.classes, self.width)
        parameters = [self._parts(t) for t in (linear_weight, linear_bias, weight)]
        ahead = [*parameters[0][1:], parameters[0][0]]
        nothing = self.x.new_empty(0)
        rooms = [nothing if part is None else part for part in self._parts(room)]
        rows = [min(len(self.x), _rows_in(part)) for part in rooms]
        dtype = torch.uint8 if self.x.dtype == torch.bfloat16 else self.x.dtype
        scales = self.x.new_empty((len(firsts), max(rows)), dtype=dtype).unbind()
        scales = [of_tile[:n] for of_tile, n in zip(scales, rows, strict=True)]
        kept = zip(rooms, scales, rows, strict=True)
        return list(map(_Tile, firsts, *parameters, ahead, kept))

    def _parts(self, t: Tensor | None) -> Sequence[Tensor | None]:
        """What each tile has of a tensor of all classes, None of None."""
        tiles = -(-self.classes // self.width)
        return [None] * tiles if t is None else t.split(self.width)

    def losses(self) -> tuple[Tensor, Tensor]:
        """The first sweep: (loss, lse)."""
        base = statistics_like(self.x, self.target.shape).fill_(-torch.inf)
        total, target_logit = torch.zeros_like(base), torch.zeros_like(base)
        weighted = torch.zeros_like(base, dtype=torch.float64) if self.label_smoothing else None
        for tile in self.tiles:
            logits = self._make(0, tile)
            self.kernels.cross_entropy_tile_forward(
                base, total, target_logit, weighted, *tile.kept, logits, self.target, tile.weight,
                tile.first, self.softcap, self.where,
            )  # fmt: skip
        lse = base.double() + total.double().log()
        hard, weights_sum = self._hard_weights()
        loss = (1 - self.label_smoothing) * hard * (lse - target_logit)
        loss += self.lse_square_scale * lse.square()
        if weighted is not None:
            loss += self.label_smoothing / self.classes * (weights_sum * lse - weighted)
        return loss.masked_fill_(self.target == self.ignore_index, 0).to(base.dtype), lse

    def gradients(self, dloss, lse, dx, dlinear_weight, dlinear_bias):
        """The second sweep: fills and returns (dx, dlinear_weight, dlinear_bias)."""
        scales = self._scales(dloss, lse)
        dx_sums = torch.empty_like(self.x, dtype=self.sums_dtype) if self.narrow else dx
        if dx is not None:
            dx_sums.zero_()
        dparameters = self._parts(dlinear_weight), self._parts(dlinear_bias)
        for tile, dweight, dbias in zip(self.tiles, *dparameters, strict=True):
            part = tile.linear_weight
            dlogits = _matrix(self.dlogits, self.x.shape[0], part.shape[0])
            logits = self._make(tile.kept[2], tile)
            self.kernels.cross_entropy_tile_backward(
                dlogits, *tile.kept, logits, self.target, tile.weight, lse, *scales, tile.first,
                self.softcap, self.where,
            )  # fmt: skip
            if dx is not None:
                self._product(dx_sums, dlogits, part, add=True)
            if dweight is not None:  # over the logits that it kept
                sums = _matrix(self.logits, *part.shape) if self.narrow else dweight
                rounded = dweight if self.narrow else None
                self._product(sums, dlogits.t(), self.x, rounded=rounded, ahead=tile.ahead)
            if dbias is not None:
                dbias.copy_(dlogits.sum(0, dtype=dloss.dtype))
        if dx is not None and self.narrow:  # over the tile's buffers
            dx.copy_(dx_sums)
        return dx, dlinear_weight, dlinear_bias

    def _make(self, start: int, tile: _Tile) -> Tensor:
        """The logits of a tile in the rows from `start` on."""
        part = tile.linear_weight
        logits = _matrix(self.logits, self.x.shape[0], part.shape[0])[start:]
        if len(logits):
            self._product(logits, self.x[start:], part.t(), ahead=tile.ahead)
            if tile.linear_bias is not None:
                logits += tile.linear_bias
        return logits

    def _product(self, out, a, b, *, rounded=None, add=False, ahead=None) -> None:
        self.kernels.product(out, rounded, a, b, add, ahead, self.where)

    def _hard_weights(self):
        """Of each row the weight of its target, and the sum of all weights."""
        if self.weight is None:
            return 1.0, float(self.classes)
        safe = self.target.masked_fill(self.target == self.ignore_index, 0)
        return self.weight[safe], self.weight.sum(dtype=torch.float64)

    def _scales(self, dloss: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        """What each row's softmax, its smoothing and its target are multiplied by."""
        dloss = dloss.masked_fill(self.target == self.ignore_index, 0)
        hard, weights_sum = self._hard_weights()
        hard = (1 - self.label_smoothing) * hard * dloss
        smooth = self.label_smoothing / self.classes * dloss
        softmax = hard + smooth * weights_sum + 2 * self.lse_square_scale * lse * dloss
        return tuple(t.to(dloss.dtype) for t in (softmax, smooth, hard))


def _width(rows: int, features: int, classes: int, dtype: torch.dtype) -> int:
    """Classes of a tile. The wider it is, the less often input is packed for the weight's gradient;
    its logits stay at 2 % of all of them or, in bfloat16, where float32 ones and their gradient are
    held, at 1 % or in the memory of input's gradient.
    """
    width = classes // 64
    if dtype == torch.bfloat16:
        width = max(classes // 256, rows * features // (2 * max(rows, features) + rows))
    return max(64, min(576, width) // 64 * 64)  # whole register tiles of two threads


def _rows_in(room: Tensor) -> int:
    """Of how many rows the gradient of a tile's weight has room for the logits."""
    size = len(room) * room.element_size()
    return room.nbytes // max(1, size if room.dtype == torch.float64 else -(-size * 3 // 4))


def _matrix(memory_of: Tensor, rows: int, cols: int) -> Tensor:
    return memory_of[: rows * cols].view(rows, cols)
