"""layer_norm and add_layer_norm in Triton: csrc/layer_norm.h says what is computed and saved."""

import torch
import triton
import triton.language as tl

from .column_sums import column_sums
from .launch import divisor, launch, rows_and_cols
from .philox import dropout_factors, dropout_rule
from .tuning import tuned

_RUNTIME = ["rows", "cols", "has_weight", "has_bias", "has_dz_out", "threshold"]


def block_of(cols: int) -> dict[str, int]:
    """Columns and warps of a program, which holds a row in registers.

    At least 1024 columns, so that narrow rows share one compiled kernel; 8 elements of each thread
    are two 16-byte loads in float32. From 4096 columns on more warps instead of more registers.
    """
    block = max(1024, triton.next_power_of_2(cols))
    warps = tuned("norm", {"num_warps": min(max(block // 256, 4), 32)}, cols=block)
    return {"BLOCK": block, **warps}


def programs_of(rows: int) -> int:
    """Programs that share the rows in backward, each of which leaves a row of partial sums: a few
    for each multiprocessor of a large GPU. Gradients depend on it, so it is no device's own.
    """
    return min(rows, 512)


# What is absent at run time is read through a mask of zeros, which costs nothing; only residual and
# seed change the code. So there are three kernels for each dtype and not twelve.


@triton.jit(do_not_specialize=_RUNTIME)
def layer_norm_forward_kernel(
    y_ptr, z_ptr, mean_ptr, rstd_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr,
    cols, eps, has_weight, has_bias, threshold, scale, DIVISOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z = dropout(x) + residual, or x;  y = (z - mean) * rstd * weight + bias.

    A program has one row: it reads x and residual once, weight and bias from L2, and writes y, z,
    mean and rstd. The statistics are those of z as it was rounded to its dtype.
    """
    row = tl.program_id(0).to(tl.int64)  # rows * cols passes 2^31
    cols = cols // DIVISOR * DIVISOR
    col = tl.arange(0, BLOCK)
    live = col < cols
    z = tl.load(x_ptr + row * cols + col, mask=live, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        group = tl.arange(0, BLOCK // 4)
        z *= dropout_factors(tl.load(seed_ptr), row, group, threshold, scale)
    if residual_ptr is not None:
        z += tl.load(residual_ptr + row * cols + col, mask=live, other=0.0).to(tl.float32)
        rounded = z.to(z_ptr.dtype.element_ty)
        tl.store(z_ptr + row * cols + col, rounded, mask=live)
        z = rounded.to(tl.float32)
    mean = tl.sum(z, 0) / cols
    centered = tl.where(live, z - mean, 0.0)  # dead lanes would add mean^2 to the variance
    # What the mean was rounded by is all that a constant row differs from it.
    rest = tl.sum(centered, 0) / cols
    centered = tl.where(live, centered - rest, 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, 0) / cols + eps)
    weight = tl.load(weight_ptr + col, mask=live & has_weight, other=1.0).to(tl.float32)
    bias = tl.load(bias_ptr + col, mask=live & has_bias, other=0.0).to(tl.float32)
    y = centered * rstd * weight + bias
    tl.store(y_ptr + row * cols + col, y.to(y_ptr.dtype.element_ty), mask=live)
    tl.store(mean_ptr + row, mean + rest)
    tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=_RUNTIME)
def layer_norm_backward_kernel(
    dz_ptr, dx_ptr, partial_ptr, dy_ptr, dz_out_ptr, z_ptr, weight_ptr, mean_ptr, rstd_ptr,
    seed_ptr, rows, cols, has_weight, has_dz_out, threshold, scale,
    DIVISOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With h = (z - mean) * rstd and g = dy * weight:
    dz = rstd * (g - average(g) - h * average(g * h)) + dz_out;  dx = dropout(dz).

    Program p of n has rows p, p + n, ...: it reads dy, z and dz_out once, writes dz and dx, and
    keeps sums of dy * h and of dy in registers: rows p and n + p of partial (2 * n, cols).
    """
    cols = cols // DIVISOR * DIVISOR
    col = tl.arange(0, BLOCK)
    live = col < cols
    weight = tl.load(weight_ptr + col, mask=live & has_weight, other=1.0).to(tl.float32)
    sum_dyh = tl.zeros((BLOCK,), tl.float32)
    sum_dy = tl.zeros((BLOCK,), tl.float32)
    first, programs = tl.program_id(0), tl.num_programs(0)
    for index in range(first, rows, programs):
        row = tl.cast(index, tl.int64)
        at = row * cols + col
        dy = tl.load(dy_ptr + at, mask=live, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + at, mask=live, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        h = tl.where(live, (z - tl.load(mean_ptr + row)) * rstd, 0.0)
        g = dy * weight
        dz = rstd * (g - tl.sum(g, 0) / cols - h * (tl.sum(g * h, 0) / cols))
        dz += tl.load(dz_out_ptr + at, mask=live & has_dz_out, other=0.0).to(tl.float32)
        dz = dz.to(dz_ptr.dtype.element_ty)
        tl.store(dz_ptr + at, dz, mask=live)
        if seed_ptr is not None:
            group = tl.arange(0, BLOCK // 4)
            kept = dropout_factors(tl.load(seed_ptr), row, group, threshold, scale)
            tl.store(dx_ptr + at, (dz * kept).to(dx_ptr.dtype.element_ty), mask=live)
        sum_dyh += dy * h
        sum_dy += dy
    place = partial_ptr + tl.cast(first, tl.int64) * cols + col
    tl.store(place, sum_dyh, mask=live)
    tl.store(place + tl.cast(programs, tl.int64) * cols, sum_dy, mask=live)


def layer_norm_forward(y, mean, rstd, x, weight, bias, eps, where) -> None:
    """y, mean, rstd of layer_norm over x's last dimension (at most 65536)."""
    add_layer_norm_forward(y, None, mean, rstd, x, None, weight, bias, None, eps, 0.0, where)


def add_layer_norm_forward(
    y, residual_out, mean, rstd, x, residual, weight, bias, seed, eps, dropout_p, where
) -> None:
    """The same of residual_out = dropout(x) + residual, which is written too."""
    rows, cols = rows_and_cols(x)
    threshold, scale = dropout_rule(dropout_p)
    some = next((p for p in (weight, bias) if p is not None), mean)
    launch(
        layer_norm_forward_kernel, (rows,), y, residual_out, mean, rstd, x, residual,
        some if weight is None else weight, some if bias is None else bias, seed,
        cols, eps, weight is not None, bias is not None, threshold, scale,
        DIVISOR=divisor(cols), **block_of(cols),
    )  # fmt: skip


def layer_norm_backward(dx, dweight, dbias, dy, x, weight, mean, rstd, where) -> None:
    """dx, and dweight and dbias where they are not None."""
    add_layer_norm_backward(
        None, dx, dweight, dbias, dy, None, x, weight, mean, rstd, None, 0.0, where
    )


def add_layer_norm_backward(
    dx, dresidual, dweight, dbias, dy, dresidual_out, residual_out, weight, mean, rstd, seed,
    dropout_p, where,
) -> None:  # fmt: skip
    """dx is None where nothing was dropped: it equals dresidual."""
    rows, cols = rows_and_cols(residual_out)
    threshold, scale = dropout_rule(dropout_p)
    programs = programs_of(rows)
    partial = torch.empty(2, programs, cols, dtype=torch.float32, device=dy.device)
    launch(
        layer_norm_backward_kernel, (programs,), dresidual, dx, partial, dy,
        dy if dresidual_out is None else dresidual_out, residual_out,
        mean if weight is None else weight, mean, rstd, seed, rows, cols,
        weight is not None, dresidual_out is not None, threshold, scale,
        DIVISOR=divisor(cols), **block_of(cols),
    )  # fmt: skip
    for parameter, sums in zip((dweight, dbias), partial, strict=True):
        if parameter is not None:
            column_sums(parameter, sums)
