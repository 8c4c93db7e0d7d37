"""cross_entropy in Triton: csrc/cross_entropy.h says what is computed and saved.

A program has a row of logits and goes through it BLOCK at a time. The logits are read from memory
once: where forward writes the gradient too, its second sweep finds them in L2. A loss of a target
outside the classes is NaN: a device cannot raise without being waited for.

OPTIONS is whether there are class weights, label smoothing or a softcap; without them, which is
how models are trained, two thirds of the arithmetic fall out.
"""

import torch
import triton
import triton.language as tl

from .elementary import tanh
from .launch import divisor, launch
from .tuning import tuned

_RUNTIME = ["classes", "ignore_index", "has_weight"]


def blocks_of(logits: torch.Tensor) -> dict[str, int]:
    """16 elements of each thread: rows are long, and what is under way at a time hides memory."""
    return tuned("cross_entropy", {"BLOCK": 4096, "num_warps": 8}, dtype=logits.dtype)


@triton.jit
def _logits(ptr, row, col, classes, softcap, OPTIONS: tl.constexpr):
    """A block of a row in float32, -inf past its end; and the derivative of the softcap."""
    z = tl.load(ptr + row * classes + col, mask=col < classes, other=-float("inf")).to(tl.float32)
    slope = tl.full(z.shape, 1.0, tl.float32)
    if OPTIONS:
        if softcap > 0:
            t = tanh(z / softcap)
            z, slope = tl.where(col < classes, softcap * t, -float("inf")), 1.0 - t * t
    return z, slope


@triton.jit
def _weights(ptr, col, classes, has_weight):
    live = col < classes
    return tl.where(live, tl.load(ptr + col, mask=live & has_weight, other=1.0), 0.0)


@triton.jit
def _log_sum_exp(logits_ptr, row, classes, softcap, OPTIONS: tl.constexpr, BLOCK: tl.constexpr):
    """(base, log_total), whose sum is the lse, by online softmax. Apart, they give differences of
    logits that their sum would round away. The base is 0 where all logits are -inf.
    """
    base = -float("inf")
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, classes, BLOCK):
        z, _ = _logits(logits_ptr, row, start + tl.arange(0, BLOCK), classes, softcap, OPTIONS)
        higher = tl.maximum(base, tl.max(z, 0))
        finite = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(base - finite) + tl.exp(z - finite)
        base = higher
    return tl.where(base == -float("inf"), 0.0, base), tl.log(tl.sum(total, 0))


@triton.jit
def _write_gradient(
    dlogits_ptr, row, col, classes, z, slope, weight, base, log_total, target,
    dloss, factor, smooth, hard,
):  # fmt: skip
    """dloss * (factor * p_c - smooth * w_c - [c = target] * hard) * the softcap's derivative; 0
    where dloss is, whatever the logits are.
    """
    g = factor * tl.exp((z - base) - log_total) - smooth * weight
    g = dloss * (g - tl.where(col == target, hard, 0.0)) * slope
    g = tl.where(dloss == 0.0, 0.0, g).to(dlogits_ptr.dtype.element_ty)
    tl.store(dlogits_ptr + row * classes + col, g, mask=col < classes)


@triton.jit(do_not_specialize=_RUNTIME)
def cross_entropy_forward_kernel(
    loss_ptr, lse_ptr, dlogits_ptr, logits_ptr, target_ptr, weight_ptr, weight_total_ptr,
    classes, ignore_index, smoothing, lse_square_scale, softcap, dloss, has_weight,
    OPTIONS: tl.constexpr, DIVISOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """loss = (1 - e) w_t (lse - z_t) + e / classes * sum_c w_c (lse - z_c) + lse_square_scale *
    lse^2, or 0 for an ignored target; lse; and dloss * the gradient where dlogits is given, which
    may be logits.
    """
    row = tl.program_id(0).to(tl.int64)
    classes = classes // DIVISOR * DIVISOR
    target = tl.load(target_ptr + row)
    ignored = target == ignore_index
    within = (target >= 0) & (target < classes)
    # Read before anything of the row is written.
    z_target = tl.load(logits_ptr + row * classes + target, mask=within, other=float("nan"))
    z_target = z_target.to(tl.float32)
    weight_target, weight_total, smooth = 1.0, 1.0, 0.0
    if OPTIONS:
        if softcap > 0:
            z_target = softcap * tanh(z_target / softcap)
        weight_target = tl.load(weight_ptr + target, mask=within & has_weight, other=1.0)
        weight_total = tl.load(weight_total_ptr)
        smooth = smoothing / classes
    hard = (1.0 - smoothing) * weight_target
    base, log_total = _log_sum_exp(logits_ptr, row, classes, softcap, OPTIONS, BLOCK)
    lse = base + log_total
    loss = hard * ((base - z_target) + log_total) + lse_square_scale * lse * lse
    factor = hard + smooth * weight_total + 2.0 * lse_square_scale * lse
    dloss = tl.where(ignored, 0.0, tl.cast(dloss, tl.float32))
    if OPTIONS or dlogits_ptr is not None:
        distance = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, classes, BLOCK):
            col = start + tl.arange(0, BLOCK)
            z, slope = _logits(logits_ptr, row, col, classes, softcap, OPTIONS)
            weight = tl.zeros((BLOCK,), tl.float32)
            if OPTIONS:
                weight = _weights(weight_ptr, col, classes, has_weight)
                distance += tl.where(col < classes, weight * (base - z), 0.0)
            if dlogits_ptr is not None:
                _write_gradient(
                    dlogits_ptr, row, col, classes, z, slope, weight, base, log_total, target,
                    dloss, factor, smooth, hard,
                )  # fmt: skip
        if OPTIONS:
            if smoothing > 0:  # else a logit of -inf would add 0 * inf
                loss += smooth * (weight_total * log_total + tl.sum(distance, 0))
    tl.store(loss_ptr + row, tl.where(ignored, 0.0, loss))
    tl.store(lse_ptr + row, base.to(tl.float64) + log_total.to(tl.float64))


@triton.jit(do_not_specialize=_RUNTIME)
def cross_entropy_backward_kernel(
    dlogits_ptr, dloss_ptr, logits_ptr, target_ptr, weight_ptr, weight_total_ptr, lse_ptr,
    classes, ignore_index, smoothing, lse_square_scale, softcap, has_weight,
    OPTIONS: tl.constexpr, DIVISOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dlogits = dloss * d loss / d logits, from the lse; dlogits may be logits. Program (r, b) has
    block b of row r: nothing is summed.
    """
    row = tl.program_id(0).to(tl.int64)
    classes = classes // DIVISOR * DIVISOR
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(target_ptr + row)
    dloss = tl.where(target == ignore_index, 0.0, tl.load(dloss_ptr + row))
    wide = tl.load(lse_ptr + row)
    base = wide.to(tl.float32)  # and what it rounded away
    log_total = (wide - base.to(tl.float64)).to(tl.float32)
    weight = tl.zeros((BLOCK,), tl.float32)
    weight_target, weight_total, smooth = 1.0, 1.0, 0.0
    if OPTIONS:
        within = (target >= 0) & (target < classes)
        weight_target = tl.load(weight_ptr + target, mask=within & has_weight, other=1.0)
        weight_total = tl.load(weight_total_ptr)
        smooth = smoothing / classes
        weight = _weights(weight_ptr, col, classes, has_weight)
    hard = (1.0 - smoothing) * weight_target
    factor = hard + smooth * weight_total + 2.0 * lse_square_scale * (base + log_total)
    z, slope = _logits(logits_ptr, row, col, classes, softcap, OPTIONS)
    _write_gradient(
        dlogits_ptr, row, col, classes, z, slope, weight, base, log_total, target,
        dloss, factor, smooth, hard,
    )  # fmt: skip


def _options(weight, label_smoothing, softcap, classes, like):
    """(weight, its sum, whether there is any option); unused ones are some other tensor."""
    if weight is None and not label_smoothing and not softcap:
        return like, like, False
    if weight is None:
        return like, torch.full((1,), classes, dtype=torch.float32, device=like.device), True
    return weight, weight.sum(), True


def cross_entropy_forward(
    loss, lse, dlogits, logits, target, weight, ignore_index, label_smoothing, lse_square_scale,
    softcap, dloss, where,
) -> None:  # fmt: skip
    """loss and lse (rows); and dlogits, where it is not None, of dloss * loss.sum()."""
    rows, classes = logits.shape
    weights, total, options = _options(weight, label_smoothing, softcap, classes, loss)
    launch(
        cross_entropy_forward_kernel, (rows,), loss, lse, dlogits, logits, target, weights, total,
        classes, ignore_index, label_smoothing, lse_square_scale, softcap, dloss,
        weight is not None,
        OPTIONS=options, DIVISOR=divisor(classes), **blocks_of(logits),
    )  # fmt: skip


def cross_entropy_backward(
    dlogits, dloss, logits, target, weight, lse, ignore_index, label_smoothing, lse_square_scale,
    softcap, where,
) -> None:  # fmt: skip
    """dlogits; dloss (rows)."""
    rows, classes = logits.shape
    weights, total, options = _options(weight, label_smoothing, softcap, classes, dloss)
    blocks = blocks_of(logits)
    launch(
        cross_entropy_backward_kernel, (rows, triton.cdiv(classes, blocks["BLOCK"])),
        dlogits, dloss, logits, target, weights, total, lse, classes, ignore_index,
        label_smoothing, lse_square_scale, softcap, weight is not None,
        OPTIONS=options, DIVISOR=divisor(classes), **blocks,
    )  # fmt: skip
