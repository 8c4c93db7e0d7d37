"""The second half of every sum over rows: gradients of weights and biases.

A backward kernel leaves one row of partial sums for each of its programs; here they are added in
order, so that the result has the same bits every time. There are no atomics.
"""

import torch
import triton
import triton.language as tl

from .launch import launch

_ROWS, _COLS = 16, 64


@triton.jit(do_not_specialize=["rows", "cols"])
def column_sums_kernel(y_ptr, x_ptr, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """y[c] = sum over r of x[r, c].

    Reads x (rows, cols), float32; writes y (cols), of any float type. A program has COLS columns
    and goes down them ROWS at a time.
    """
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    sums = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, rows, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        live = (row < rows)[:, None] & (col < cols)[None, :]
        sums += tl.load(x_ptr + row[:, None] * cols + col[None, :], mask=live, other=0.0)
    tl.store(y_ptr + col, tl.sum(sums, 0).to(y_ptr.dtype.element_ty), mask=col < cols)


def column_sums(y: torch.Tensor, x: torch.Tensor) -> None:
    """y (cols) = x.sum(0) for float32 x (rows, cols)."""
    rows, cols = x.shape
    grid = (triton.cdiv(cols, _COLS),)
    launch(column_sums_kernel, grid, y, x, rows, cols, ROWS=_ROWS, COLS=_COLS, num_warps=4)
