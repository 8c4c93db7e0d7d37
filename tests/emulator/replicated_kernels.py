"""Triton kernels whose tensors are smaller than the threads: several threads hold each element."""

import triton
import triton.language as tl


@triton.jit
def rotate_in_place(x_ptr, cos_ptr, sin_ptr, WIDTH: tl.constexpr):
    """Rotary embedding of heads of 2 * WIDTH, in place, one program for each."""
    x_ptr += 2 * WIDTH * tl.program_id(0)
    at = tl.arange(0, WIDTH)
    cos, sin = tl.load(cos_ptr + at), tl.load(sin_ptr + at)
    low, high = tl.load(x_ptr + at), tl.load(x_ptr + WIDTH + at)
    tl.store(x_ptr + at, low * cos - high * sin)
    tl.store(x_ptr + WIDTH + at, high * cos + low * sin)


@triton.jit
def double_and_spread(x_ptr, y_ptr, WIDTH: tl.constexpr):
    """x[0] is doubled in place, and what every thread has read of it is stored."""
    x = tl.load(x_ptr)
    tl.store(x_ptr, 2 * x)
    tl.store(y_ptr + tl.arange(0, WIDTH), x + tl.zeros([WIDTH], tl.float32))
