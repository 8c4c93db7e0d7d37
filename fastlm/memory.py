"""Results of the CPU kernels, from a pool that recycles memory.

The C library gives a block of over 32 MB back to the system when it is freed, and the first touch
of a fresh one costs about ten times what a kernel needs to fill it. Large results therefore come
from a pool that keeps up to a limit (an eighth of the machine's memory, 4 GiB at most) for the next
ones.
"""

import torch
from torch import Tensor
from torch.utils import dlpack

# Below this the C library keeps blocks itself, and a plain torch.empty is quicker.
_POOLED_BYTES = 1 << 20
_DLPACK_CODES = {torch.float32: (2, 32), torch.float64: (2, 64), torch.bfloat16: (4, 16)}


def empty(shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous tensor, from the pool where that pays."""
    pooled = device.type == "cpu" and dtype in _DLPACK_CODES
    if not pooled or torch.Size(shape).numel() * dtype.itemsize < _POOLED_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    from fastlm import _cpu

    return dlpack.from_dlpack(_cpu.empty(list(shape), *_DLPACK_CODES[dtype]))


def empty_like(x: Tensor) -> Tensor:
    """`empty` with x's shape, dtype and device; always contiguous."""
    return empty(x.shape, x.dtype, x.device)


def empty_cache() -> None:
    """Give every block that no tensor uses back to the system."""
    from fastlm import _cpu

    _cpu.empty_cache()


def set_limit(num_bytes: int) -> None:
    """Keep at most `num_bytes` for reuse. Raises ValueError for a negative number."""
    if num_bytes < 0:
        raise ValueError(f"memory.set_limit: num_bytes: expected 0 or more, got {num_bytes}")
    from fastlm import _cpu

    _cpu.set_memory_limit(num_bytes)


def stats() -> dict[str, int]:
    """Bytes: `in_use` by tensors and calls, `held` for reuse, `limit` of what is held."""
    from fastlm import _cpu

    return _cpu.memory_stats()
