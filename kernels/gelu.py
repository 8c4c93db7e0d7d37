"""gelu, with the bias before it, in Triton: csrc/elementwise.h says what is computed."""

import torch
import triton
import triton.language as tl

from .column_sums import column_sums
from .launch import divisor, launch, rows_and_cols
from .tuning import tuned

_ROWS, _COLS = 8, 128  # of a step of backward: 256 bytes of a row at a time in 16 bits
_RUNTIME = ["rows", "cols", "tanh_form", "has_bias"]


def blocks_of(x: torch.Tensor) -> dict[str, int]:
    """Forward's: 8 elements of each thread are two 16-byte loads in float32."""
    return tuned("gelu forward", {"BLOCK": 1024, "num_warps": 4}, dtype=x.dtype)


@triton.jit
def _normal_cdf(x, tanh_form):
    """The normal distribution function, or its approximation by tanh; and its derivative."""
    if tanh_form:
        # 0.5 (1 + tanh(u)) = sigmoid(2 u) for u = sqrt(2 / pi) (x + 0.044715 x^3). Beyond 20 it is
        # 0 or 1 in float32, and x^3 would overflow.
        c = tl.minimum(tl.maximum(x, -20.0), 20.0)
        cdf = tl.sigmoid(1.5957691216057308 * (c + 0.044715 * c * c * c))
        slope = cdf * (1.0 - cdf) * 1.5957691216057308 * (1.0 + 0.134145 * c * c)
    else:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return cdf, slope


@triton.jit(do_not_specialize=_RUNTIME)
def gelu_forward_kernel(
    y_ptr, x_ptr, bias_ptr, cols, tanh_form, has_bias, DIVISOR: tl.constexpr, BLOCK: tl.constexpr
):
    """y = u * cdf(u), u = x + bias. A program has BLOCK columns of a row, read and written once."""
    cols = cols // DIVISOR * DIVISOR
    tiles = tl.cdiv(cols, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    col = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    live = col < cols
    u = tl.load(x_ptr + row * cols + col, mask=live, other=0.0).to(tl.float32)
    u += tl.load(bias_ptr + col, mask=live & has_bias, other=0.0).to(tl.float32)
    y = u * _normal_cdf(u, tanh_form)[0]
    tl.store(y_ptr + row * cols + col, y.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=_RUNTIME)
def gelu_backward_kernel(
    dx_ptr, partial_ptr, dy_ptr, x_ptr, bias_ptr, rows, cols, tanh_form, has_bias,
    DIVISOR: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dx = dy * (cdf(u) + u * cdf'(u)), u = x + bias; dbias = sum over rows of dx.

    Program (c, p) of (tiles, n) has COLS columns of rows p * ROWS, (p + n) * ROWS, ...: it reads
    dy and x once, writes dx, and its sums over rows into row p of partial (n, cols), if has_bias.
    """
    cols = cols // DIVISOR * DIVISOR
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    bias = tl.load(bias_ptr + col, mask=(col < cols) & has_bias, other=0.0).to(tl.float32)
    sums = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        at = row[:, None] * cols + col[None, :]
        live = (row < rows)[:, None] & (col < cols)[None, :]
        dy = tl.load(dy_ptr + at, mask=live, other=0.0).to(tl.float32)
        u = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32) + bias[None, :]
        cdf, slope = _normal_cdf(u, tanh_form)
        dx = dy * (cdf + u * slope)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=live)
        sums += dx
    place = partial_ptr + tl.program_id(1).to(tl.int64) * cols + col
    tl.store(place, tl.sum(sums, 0), mask=(col < cols) & has_bias)


def gelu_forward(y, x, bias, tanh_form, where) -> None:
    """y = gelu(x + bias); bias may be None."""
    rows, cols = rows_and_cols(x)
    blocks = blocks_of(x)
    launch(
        gelu_forward_kernel, (rows * triton.cdiv(cols, blocks["BLOCK"]),), y, x,
        x if bias is None else bias, cols, tanh_form, bias is not None,
        DIVISOR=divisor(cols), **blocks,
    )  # fmt: skip


def gelu_backward(dx, dbias, dy, x, bias, tanh_form, where) -> None:
    """dx, and dbias where it is not None."""
    rows, cols = rows_and_cols(x)
    tiles = triton.cdiv(cols, _COLS)
    # About 2048 programs fill a large GPU; fewer down the rows leave fewer partial sums.
    programs = min(triton.cdiv(rows, _ROWS), max(2048 // max(tiles, 1), 1))
    partial = torch.empty(
        programs if dbias is not None else 0, cols, dtype=torch.float32, device=x.device
    )
    launch(
        gelu_backward_kernel, (tiles, programs), dx, partial, dy, x,
        x if bias is None else bias, rows, cols, tanh_form, bias is not None,
        DIVISOR=divisor(cols), ROWS=_ROWS, COLS=_COLS, num_warps=4,
    )  # fmt: skip
    if dbias is not None:
        column_sums(dbias, partial)
