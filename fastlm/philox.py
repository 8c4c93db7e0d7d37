"""Philox4x32-7 in torch: the masks of dropout, the same on every device (csrc/cpu/philox.h)."""

import torch
from torch import Tensor


def _philox(seed: Tensor, column: Tensor, row: Tensor) -> list[Tensor]:
    """Philox4x32-7 (Salmon et al., SC 2011) of counter (column, 0, row low, row high): four words
    as int64.
    """
    mask = 0xFFFFFFFF
    c = [column & mask, torch.zeros_like(column), row & mask, (row >> 32) & mask]
    k0, k1 = seed & mask, (seed >> 32) & mask

    def multiply(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
        # 32 x 32 bits in signed 64-bit integers: by halves of m, so that nothing overflows.
        low, high = a * (m & 0xFFFF), a * (m >> 16)
        total = (low >> 16) + high
        return ((total << 16) | (low & 0xFFFF)) & mask, (total >> 16) & mask

    for _ in range(7):
        (low0, high0), (low2, high2) = multiply(c[0], 0xD2511F53), multiply(c[2], 0xCD9E8D57)
        c = [high2 ^ c[1] ^ k0, low2, high0 ^ c[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c


def dropout_factors(
    seed: Tensor, rows: Tensor, columns: int, p: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(rows, columns) of a floating-point dtype: 0 where dropped, 1 / (1 - p) elsewhere. The mask
    is the same on every device.
    """
    groups = torch.arange((columns + 3) // 4, device=rows.device)
    shape = (rows.shape[0], groups.shape[0])
    words = _philox(seed, groups.expand(shape), rows[:, None].expand(shape))
    random = torch.stack(words, -1).flatten(1)[:, :columns]
    keep = random >= min(int(p * 2**32), 2**32 - 1)
    return keep.to(dtype) / (1 - p) if p < 1 else torch.zeros_like(random, dtype=dtype)
