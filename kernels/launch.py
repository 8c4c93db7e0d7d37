"""The one way in which these kernels are launched: on a GPU, interpreted, or emulated."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton

# What launches a kernel on CPU tensors, as kernel[grid] would: fastlm.backend puts the emulator
# here for "emulated:triton". Nothing in this folder imports it.
emulate: Callable[[Any], Any] | None = None


def launch(kernel, grid: tuple[int, ...], *arguments, **constexprs) -> None:
    """kernel[grid](*arguments, **constexprs), on torch's current stream of the tensors' device.

    CPU tensors run in Triton's interpreter where TRITON_INTERPRET=1, or through `emulate`. An empty
    grid launches nothing. Raises RuntimeError for CPU tensors where neither is in force.
    """
    if 0 in grid:
        return
    # What triton 3.6 to 3.9 do unasked, and 3.10 will not: a * b + c rounds once.
    options = {"enable_fp_fusion": True, **constexprs}
    device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*arguments, **options)
    elif not isinstance(kernel, triton.JITFunction):  # TRITON_INTERPRET=1 when it was decorated
        kernel[grid](*arguments, **options)
    elif emulate is not None:
        _emulated(emulate, kernel)[grid](*arguments, **options)
    else:
        raise RuntimeError(
            f"{kernel.__name__}: tensors: expected CUDA tensors, got {device}; "
            'fastlm.use("emulated:triton") or TRITON_INTERPRET=1 take those of the CPU'
        )


@functools.cache
def _emulated(launcher, kernel):
    """One for each kernel: it keeps what it compiled."""
    return launcher(kernel)


def rows_and_cols(x: torch.Tensor) -> tuple[int, int]:
    """A tensor as rows of its last dimension."""
    cols = x.shape[-1] if x.dim() else 1
    return (x.numel() // cols if cols else 0), cols


def divisor(*sizes: int, of: int = 16) -> int:
    """What a kernel may take for granted that all `sizes` are multiples of: `of`, or 1.

    Kernels take such a size unspecialised and write `size // DIVISOR * DIVISOR`: the compiler then
    knows what it needs for wide loads, and compiles no kernel of its own for a size of 1.
    """
    return of if all(size % of == 0 for size in sizes) else 1
