"""Philox4x32 (Salmon et al., SC 2011) in numpy, from the paper and from nothing in fastlm."""

import numpy as np
import torch
from torch import Tensor


def philox4x32(counter: np.ndarray, key: tuple[int, int], rounds: int) -> np.ndarray:
    """Four random words for each counter (..., 4)."""
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    key0, key1 = np.uint64(key[0]), np.uint64(key[1])
    low_word, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(rounds):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> half) ^ c[1] ^ key0, b & low_word, (a >> half) ^ c[3] ^ key1, a & low_word]
        key0 = (key0 + np.uint64(0x9E3779B9)) & low_word
        key1 = (key1 + np.uint64(0xBB67AE85)) & low_word
    return np.stack(c, -1).astype(np.uint32)


def factors(seed: Tensor, rows: int, columns: int, p: float, first_row: int = 0) -> Tensor:
    """What dropout multiplies (rows, columns) by, in float64; csrc/cpu/philox.h has the rule."""
    row = np.arange(first_row, first_row + rows, dtype=np.uint64)[:, None]
    group = np.arange((columns + 3) // 4, dtype=np.uint64)
    row, group = np.broadcast_arrays(row, group)
    low_word, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    counter = np.stack([group, np.zeros_like(group), row & low_word, row >> half], -1)
    bits = int(seed) & (2**64 - 1)
    words = philox4x32(counter, (bits & 0xFFFFFFFF, bits >> 32), rounds=7)
    kept = words.reshape(rows, 4 * group.shape[1])[:, :columns] >= min(int(p * 2**32), 2**32 - 1)
    return torch.from_numpy(kept.astype(np.float64) / (1 - p) if p < 1 else kept * 0.0)
