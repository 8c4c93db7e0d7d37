"""dropout in Triton: csrc/elementwise.h says what is computed; no mask is stored."""

import triton
import triton.language as tl

from .launch import divisor, launch, rows_and_cols
from .philox import dropout_factors, dropout_rule

_BLOCK = 1024  # 8 elements of each of 128 threads: two calls of the generator


@triton.jit(do_not_specialize=["cols", "threshold"])
def dropout_kernel(
    y_ptr, x_ptr, seed_ptr, cols, threshold, scale, DIVISOR: tl.constexpr, BLOCK: tl.constexpr
):
    """y = x * scale where kept, 0 elsewhere. A program has BLOCK columns of a row, read and written
    once. Columns are where Philox counts from: BLOCK is a multiple of 4.
    """
    cols = cols // DIVISOR * DIVISOR
    tiles = tl.cdiv(cols, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    start = tl.program_id(0) % tiles * BLOCK
    col = start + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * cols + col, mask=col < cols, other=0.0).to(tl.float32)
    group = start // 4 + tl.arange(0, BLOCK // 4)
    y = x * dropout_factors(tl.load(seed_ptr), row, group, threshold, scale)
    tl.store(y_ptr + row * cols + col, y.to(y_ptr.dtype.element_ty), mask=col < cols)


def dropout(y, x, seed, p, where) -> None:
    """y = x with elements dropped with probability p; the rest is scaled by 1 / (1 - p)."""
    rows, cols = rows_and_cols(x)
    launch(
        dropout_kernel, (rows * triton.cdiv(cols, _BLOCK),), y, x, seed, cols, *dropout_rule(p),
        DIVISOR=divisor(cols), BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
