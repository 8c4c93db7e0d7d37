"""Cross-entropy of a linear layer's output that never holds all of the logits.

On the CPU a tile of classes for all rows at a time (as Wijmans et al. 2024, "Cut Your Losses in
Large-Vocabulary Language Models"): forward keeps each row's log-sum-exp, backward makes the tile's
logits again, turns them into their gradient in the cache, and adds up input's gradient over the
tiles. Every product accumulates in float32. On a GPU some rows at a time, over all classes.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import memory, reference
from ..backend import choose, where
from .cross_entropy import as_reduction, check_target, checked_weight, denominator_of
from .define import define, statistics_like

# ---- implementation, on the CPU: tiles of classes ----


def _tiles(x, linear_weight, linear_bias):
    """(first class, the tile's part of linear_weight, logits), the logits in one buffer.

    256 to 1024 classes make products that run at full speed, of 2 to 3 % of the logits.
    """
    classes = linear_weight.shape[0]
    width = max(256, min(1024, classes // 32))
    buffer = memory.empty((x.shape[0] * min(width, classes),), x.dtype, x.device)
    for first in range(0, classes, width):
        part = linear_weight[first : first + width]
        logits = buffer[: x.shape[0] * part.shape[0]].view(x.shape[0], part.shape[0])
        if linear_bias is None:
            torch.mm(x, part.t(), out=logits)
        else:
            torch.addmm(linear_bias[first : first + width], x, part.t(), out=logits)
        yield first, part, logits


def _part(weight: Tensor | None, first: int, logits: Tensor) -> Tensor | None:
    return None if weight is None else weight[first : first + logits.shape[1]]


def _forward_by_tiles(kernels, x, linear_weight, linear_bias, target, weight, options):
    ignore_index, label_smoothing, lse_square_scale, softcap = options
    base = statistics_like(x, target.shape).fill_(-torch.inf)
    total, target_logit = torch.zeros_like(base), torch.zeros_like(base)
    weighted = target.new_zeros(target.shape, dtype=torch.float64) if label_smoothing else None
    for first, _, logits in _tiles(x, linear_weight, linear_bias):
        kernels.cross_entropy_tile_forward(
            base, total, target_logit, weighted, logits, target, _part(weight, first, logits),
            first, softcap, where(x),
        )  # fmt: skip
    lse = base.double() + total.double().log()
    ignored = target == ignore_index
    hard, weights_sum = _hard_weights(target, ignored, weight, linear_weight.shape[0])
    loss = (1 - label_smoothing) * hard * (lse - target_logit) + lse_square_scale * lse.square()
    if weighted is not None:
        loss += label_smoothing / linear_weight.shape[0] * (weights_sum * lse - weighted)
    return loss.masked_fill_(ignored, 0).to(base.dtype), lse


def _hard_weights(target, ignored, weight, classes):
    """Of each row the weight of its target, and the sum of all weights."""
    if weight is None:
        return 1.0, float(classes)
    return weight[target.masked_fill(ignored, 0)], weight.sum(dtype=torch.float64)


def _backward_by_tiles(
    kernels, dloss, x, linear_weight, linear_bias, target, weight, lse, options, grads
):
    ignore_index, label_smoothing, lse_square_scale, softcap = options
    ignored = target == ignore_index
    hard, weights_sum = _hard_weights(target, ignored, weight, linear_weight.shape[0])
    dloss = dloss.masked_fill(ignored, 0)
    hard = (1 - label_smoothing) * hard * dloss
    smooth = label_smoothing / linear_weight.shape[0] * dloss
    softmax = hard + smooth * weights_sum + 2 * lse_square_scale * lse * dloss
    rows = tuple(t.to(dloss.dtype) for t in (softmax, smooth, hard))
    dx, dlinear_weight, dlinear_bias = grads
    dx_sum = None if dx is None else dx if dx.dtype == dloss.dtype else torch.empty_like(x.float())
    for first, part, logits in _tiles(x, linear_weight, linear_bias):
        kernels.cross_entropy_tile_backward(
            logits, target, _part(weight, first, logits), lse, *rows, first, softcap, where(x)
        )
        if dx_sum is not None:
            _add_product(dx_sum, logits, part, fresh=first == 0)
        if dlinear_weight is not None:
            torch.mm(logits.t(), x, out=dlinear_weight[first : first + part.shape[0]])
        if dlinear_bias is not None:
            dlinear_bias[first : first + part.shape[0]] = logits.sum(0, dtype=dloss.dtype)
    if dx is not None and dx_sum is not dx:
        dx.copy_(dx_sum)


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, fresh: bool) -> None:
    """total (float32 or float64) += a @ b, or = where it is fresh; some rows at a time where the
    product must be rounded to a's dtype first.
    """
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=0 if fresh else 1, out=total)
        return
    if fresh:
        total.zero_()
    for rows, products in zip(total.split(256), a.split(256), strict=True):
        rows.add_(products @ b)


# ---- implementation, on a GPU: chunks of rows ----

_ROWS = 512  # a chunk's logits of GPT-2, 51 MB in bfloat16, stay in the L2 cache of a large GPU


def _chunks(x, linear_weight, linear_bias):
    """(rows, logits)."""
    for first in range(0, x.shape[0], _ROWS):
        rows = slice(first, first + _ROWS)
        yield rows, torch.nn.functional.linear(x[rows], linear_weight, linear_bias)


def _forward_by_rows(kernels, x, linear_weight, linear_bias, target, weight, options):
    loss = statistics_like(x, target.shape)
    lse = target.new_empty(target.shape, dtype=torch.float64)
    for rows, logits in _chunks(x, linear_weight, linear_bias):
        kernels.cross_entropy_forward(
            loss[rows], lse[rows], None, logits, target[rows], weight, *options, 0.0, where(x)
        )
    return loss, lse


def _backward_by_rows(
    kernels, dloss, x, linear_weight, linear_bias, target, weight, lse, options, grads
):
    dx, dlinear_weight, dlinear_bias = grads
    sums = [None if t is None else t.new_zeros(t.shape, dtype=dloss.dtype) for t in grads[1:]]
    for rows, logits in _chunks(x, linear_weight, linear_bias):
        kernels.cross_entropy_backward(
            logits, dloss[rows], logits, target[rows], weight, lse[rows], *options, where(x)
        )
        if dx is not None:
            torch.mm(logits, linear_weight, out=dx[rows])
        if dlinear_weight is not None:
            sums[0] += logits.t() @ x[rows]
        if dlinear_bias is not None:
            sums[1] += logits.sum(0, dtype=dloss.dtype)
    for grad, total in zip(grads[1:], sums, strict=True):
        if grad is not None:
            grad.copy_(total)


def _forward(kernels, x, linear_weight, linear_bias, target, weight, *options):
    tiled = hasattr(kernels, "cross_entropy_tile_forward")
    if tiled:
        check_target("linear_cross_entropy", target, linear_weight.shape[0], options[0])
    run = _forward_by_tiles if tiled else _forward_by_rows
    return run(kernels, x, linear_weight, linear_bias, target, weight, options)


def _backward(
    kernels, dloss, x, linear_weight, linear_bias, target, weight, lse,
    input_grad, linear_weight_grad, linear_bias_grad, *options,
):  # fmt: skip
    wanted = (x, input_grad), (linear_weight, linear_weight_grad), (linear_bias, linear_bias_grad)
    grads = [memory.empty_like(t) if wants else None for t, wants in wanted]
    tiled = hasattr(kernels, "cross_entropy_tile_backward")
    run = _backward_by_tiles if tiled else _backward_by_rows
    run(kernels, dloss, x, linear_weight, linear_bias, target, weight, lse, options, grads)
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


# ---- schema and fake ----

_LINEAR = "Tensor x, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight"
_OPTIONS = "int ignore_index, float label_smoothing, float lse_square_scale, float softcap"

linear_cross_entropy_forward = define(
    "linear_cross_entropy_forward",
    f"({_LINEAR}, {_OPTIONS}, str backend) -> (Tensor, Tensor)",
    op="linear_cross_entropy",
    reference=reference.linear_cross_entropy_forward,
    native=_forward,
)
linear_cross_entropy_backward = define(
    "linear_cross_entropy_backward",
    f"(Tensor dloss, {_LINEAR}, Tensor lse, bool input_grad, bool linear_weight_grad,"
    f" bool linear_bias_grad, {_OPTIONS}, str backend) -> (Tensor, Tensor, Tensor)",
    op="linear_cross_entropy",
    reference=reference.linear_cross_entropy_backward,
    native=_backward,
)

# ---- autograd ----


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss of each row."""

    @staticmethod
    def forward(ctx, x, linear_weight, linear_bias, target, weight, options, backend):
        inputs = x, linear_weight, linear_bias, target, weight
        loss, lse = linear_cross_entropy_forward(*inputs, *options, backend)
        ctx.save_for_backward(*inputs, lse)
        ctx.options, ctx.backend = options, backend
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        wanted = ctx.needs_input_grad[:3]
        grads = linear_cross_entropy_backward(
            dloss.contiguous(), *ctx.saved_tensors, *wanted, *ctx.options, ctx.backend
        )
        found = (g if wants else None for g, wants in zip(grads, wanted, strict=True))
        return *found, None, None, None, None


# ---- public ----


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """cross_entropy(linear(input, linear_weight, linear_bias), target), without the logits.

    Args:
        input: (*, features), float32, bfloat16 or float64. linear_weight: (classes, features),
            linear_bias: (classes) or None, both of input's dtype. Under autocast all three are cast
            to its dtype, as torch.nn.functional.linear casts them.
        target: int64 class indices of input's shape without features.
        ignore_index: None is -100.
        The rest is as for `cross_entropy`.
    Returns: the loss, float32 whatever input's dtype (float64 for float64); rows are 0 where
        ignored.
    Raises: IndexError for a target outside the classes (on the CPU), ValueError or RuntimeError for
        shapes, dtypes and options that do not fit. The second derivative is refused.
    """
    reduction = as_reduction("linear_cross_entropy", reduction, label_smoothing)
    if _autocasts(input):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, linear_weight = input.to(dtype), linear_weight.to(dtype)
        linear_bias = None if linear_bias is None else linear_bias.to(dtype)
    _check(input, linear_weight, linear_bias, target)
    backend = choose("linear_cross_entropy", input)
    ignore_index = -100 if ignore_index is None else ignore_index
    if weight is not None:
        classes = linear_weight.shape[0]
        weight = checked_weight("linear_cross_entropy", weight, classes)
        weight = weight.to(reference.accumulation_dtype(input)).contiguous()
    x, rows = input.reshape(-1, input.shape[-1]).contiguous(), target.reshape(-1).contiguous()
    options = (ignore_index, label_smoothing, lse_square_scale, softcap or 0.0)
    bias = None if linear_bias is None else linear_bias.contiguous()
    inputs = x, linear_weight.contiguous(), bias, rows, weight
    losses = _LinearCrossEntropy.apply(*inputs, options, backend)
    if reduction == "none":
        return losses.view(target.shape)
    denominator = denominator_of(rows, weight, ignore_index, reduction)
    return losses.sum() if denominator is None else losses.sum() / denominator


def _autocasts(input: Tensor) -> bool:
    device = input.device.type
    known = device in ("cpu", "cuda") and input.dtype != torch.float64
    return known and torch.is_autocast_enabled(device)


def _check(input, linear_weight, linear_bias, target) -> None:
    op = "linear_cross_entropy"
    if linear_weight.dim() != 2 or input.dim() == 0 or input.shape[-1] != linear_weight.shape[1]:
        raise RuntimeError(
            f"{op}: linear_weight: expected (classes, features) with input's features, "
            f"got {tuple(linear_weight.shape)} for input {tuple(input.shape)}"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        raise RuntimeError(
            f"{op}: linear_bias: expected shape {tuple(linear_weight.shape[:1])}, "
            f"got {tuple(linear_bias.shape)}"
        )
    for name, t in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if t is not None and t.dtype != input.dtype:
            raise RuntimeError(f"{op}: {name}: expected input's {input.dtype}, got {t.dtype}")
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"{op}: target: expected shape {tuple(input.shape[:-1])} for input "
            f"{tuple(input.shape)}, got {tuple(target.shape)}"
        )
    if target.dtype != torch.int64:
        raise RuntimeError(f"{op}: target: expected int64 class indices, got {target.dtype}")


FORMS = {linear_cross_entropy: lambda *args, **options: None}
