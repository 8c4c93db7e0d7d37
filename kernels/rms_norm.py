"""rms_norm in Triton: csrc/rms_norm.h says what is computed and saved."""

import torch
import triton
import triton.language as tl

from .column_sums import column_sums
from .launch import divisor, launch, rows_and_cols
from .layer_norm import block_of, programs_of

_RUNTIME = ["rows", "cols", "has_weight"]


@triton.jit(do_not_specialize=_RUNTIME)
def rms_norm_forward_kernel(
    y_ptr, rstd_ptr, x_ptr, weight_ptr, cols, eps, has_weight,
    DIVISOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = x * rstd * weight, rstd = 1 / sqrt(average(x^2) + eps).

    A program has one row: it reads x once, weight from L2, and writes y and rstd.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = cols // DIVISOR * DIVISOR
    col = tl.arange(0, BLOCK)
    live = col < cols
    x = tl.load(x_ptr + row * cols + col, mask=live, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / cols + eps)
    weight = tl.load(weight_ptr + col, mask=live & has_weight, other=1.0).to(tl.float32)
    tl.store(y_ptr + row * cols + col, (x * rstd * weight).to(y_ptr.dtype.element_ty), mask=live)
    tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=_RUNTIME)
def rms_norm_backward_kernel(
    dx_ptr, partial_ptr, dy_ptr, x_ptr, weight_ptr, rstd_ptr, rows, cols, has_weight,
    DIVISOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With h = x * rstd and g = dy * weight:  dx = rstd * (g - h * average(g * h)).

    Program p of n has rows p, p + n, ...: it reads dy and x once, writes dx, and its sum of dy * h
    into row p of partial (n, cols).
    """
    cols = cols // DIVISOR * DIVISOR
    col = tl.arange(0, BLOCK)
    live = col < cols
    weight = tl.load(weight_ptr + col, mask=live & has_weight, other=1.0).to(tl.float32)
    sum_dyh = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0)
    for index in range(first, rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        at = row * cols + col
        dy = tl.load(dy_ptr + at, mask=live, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        h = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32) * rstd
        g = dy * weight
        dx = rstd * (g - h * (tl.sum(g * h, 0) / cols))
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=live)
        sum_dyh += dy * h
    tl.store(partial_ptr + tl.cast(first, tl.int64) * cols + col, sum_dyh, mask=live)


def rms_norm_forward(y, rstd, x, weight, eps, where) -> None:
    """y and rstd of rms_norm over x's last dimension (at most 65536)."""
    rows, cols = rows_and_cols(x)
    launch(
        rms_norm_forward_kernel, (rows,), y, rstd, x, rstd if weight is None else weight,
        cols, eps, weight is not None, DIVISOR=divisor(cols), **block_of(cols),
    )  # fmt: skip


def rms_norm_backward(dx, dweight, dy, x, weight, rstd, where) -> None:
    """dx, and dweight where it is not None."""
    rows, cols = rows_and_cols(x)
    programs = programs_of(rows)
    partial = torch.empty(programs, cols, dtype=torch.float32, device=x.device)
    launch(
        rms_norm_backward_kernel, (programs,), dx, partial, dy, x,
        rstd if weight is None else weight, rstd, rows, cols, weight is not None,
        DIVISOR=divisor(cols), **block_of(cols),
    )  # fmt: skip
    if dweight is not None:
        column_sums(dweight, partial)
