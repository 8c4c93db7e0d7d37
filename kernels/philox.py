"""Dropout factors of Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011): the same mask, bit for bit, as csrc/cpu/philox.h and fastlm/philox.py.

Element (row, column) is dropped where word column % 4 of the generator with key `seed` and counter
(column / 4, 0, row mod 2^32, row / 2^32) is below p * 2^32.
"""

import triton
import triton.language as tl


def dropout_rule(p: float) -> tuple[int, float]:
    """(threshold, scale) for dropout_factors. The threshold is 2^31 lower than p * 2^32, so that it
    is an int32 for every p.
    """
    return min(int(p * 2**32), 2**32 - 1) - 2**31, 1.0 / (1.0 - p) if p < 1 else 0.0


@triton.jit
def _factor(word, threshold, scale):
    # The highest bit inverted: what is ordered as unsigned becomes ordered as signed.
    ordered = (word ^ 0x80000000).to(tl.int32, bitcast=True)
    return tl.where(ordered >= threshold, scale, 0.0)


@triton.jit
def dropout_factors(seed, row, group, threshold, scale):
    """0 where dropped, `scale` elsewhere; of columns 4 * group to 4 * group + 3.

    seed: int64 scalar. row: int64, group: int32; they broadcast, and the result's last dimension is
    four times theirs. One call of the generator serves four neighbours.
    """
    row, group = tl.broadcast(row, group)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0 = group.to(tl.uint32)
    c1 = c0 ^ c0
    c2 = (row & 0xFFFFFFFF).to(tl.uint32)
    c3 = ((row >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(7):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high2, low2 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    even = tl.interleave(_factor(c0, threshold, scale), _factor(c2, threshold, scale))
    odd = tl.interleave(_factor(c1, threshold, scale), _factor(c3, threshold, scale))
    return tl.interleave(even, odd)
