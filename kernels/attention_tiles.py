"""What the attention kernels share: where tiles lie, what a query sees, scores, dropout.

Scores are in base 2 throughout: `scale` and `softcap` come multiplied by log2(e), so that an
exponential is one instruction; lse is natural outside.
"""

import triton
import triton.language as tl

from .philox import dropout_factors

# Sizes and options of a call. They change from call to call, and none needs a kernel of its own.
RUNTIME = [
    *(f"{t}_{stride}" for t in ("q", "k", "v", "o", "dout", "dq", "dk", "dv")
      for stride in ("batch", "row", "head")),
    "lse_batch", "lse_head", "queries", "keys", "heads", "group", "head_dim", "packed",
    "has_lengths", "splits", "left", "right", "has_dropout", "threshold",
]  # fmt: skip


@triton.jit
def sequence(offsets_ptr, batch, longest, packed):
    """(first token, length) of a sequence."""
    first = tl.load(offsets_ptr + batch, mask=packed, other=0)
    return first, tl.load(offsets_ptr + batch + 1, mask=packed, other=longest) - first


@triton.jit
def steps(count, stride, DIVISOR: tl.constexpr):
    """`count` strides: 64 bits."""
    return tl.cast(count, tl.int64) * (stride // DIVISOR * DIVISOR)


@triton.jit
def head_at(ptr, batch_stride, row_stride, head_stride, batch, row, head, DIVISOR: tl.constexpr):
    """Pointer to a row of one head."""
    place = steps(batch, batch_stride, DIVISOR) + steps(row, row_stride, DIVISOR)
    return ptr + place + steps(head, head_stride, DIVISOR)


@triton.jit
def tile(row_stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, DIVISOR: tl.constexpr):
    """Offsets (ROWS, BLOCK_D) from a row of a head; 32 bits, because each thread keeps many."""
    row_stride = tl.cast(row_stride, tl.int32) // DIVISOR * DIVISOR
    return tl.arange(0, ROWS)[:, None] * row_stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def load_rows(pointers, live, head_dim, BLOCK_D: tl.constexpr):
    """A tile, 0 in rows that are not live and past the head."""
    inside = tl.arange(0, BLOCK_D) < head_dim
    return tl.load(pointers, mask=live[:, None] & inside[None, :], other=0.0)


@triton.jit
def store_rows(pointers, rows, live, head_dim, BLOCK_D: tl.constexpr):
    inside = tl.arange(0, BLOCK_D) < head_dim
    rows = rows.to(pointers.dtype.element_ty)
    tl.store(pointers, rows, mask=live[:, None] & inside[None, :])


@triton.jit
def only_visible(s, position, key, keys, left, right, whole):
    """Scores with -inf where a query at `position` does not see a key; the two broadcast. `whole`
    tells of tiles, which are most, in which every query sees every key.
    """
    if not whole:
        seen = (key < keys) & (key <= position + right) & (key >= position - left)
        s = tl.where(seen, s, -float("inf"))
    return s


@triton.jit
def is_whole(
    first_position, first_key, keys, left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Whether BLOCK_M queries from a position on all see BLOCK_N keys."""
    last_key = first_key + BLOCK_N - 1
    seen = (last_key < keys) & (last_key <= first_position + right)
    return seen & (first_key >= first_position + BLOCK_M - 1 - left)


@triton.jit
def capped(scores, softcap, OPTIONS: tl.constexpr):
    """(scores, derivative of the softcap)."""
    slope = tl.full(scores.shape, 1.0, tl.float32)
    if OPTIONS:
        if softcap > 0:
            t = 2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0
            scores, slope = softcap * t, 1.0 - t * t
    return scores, slope


@triton.jit
def attention_factors(seed_ptr, lse_row, first_key, threshold, scale, BLOCK_N: tl.constexpr):
    """Dropout's factors (rows, BLOCK_N); a row of the mask is a query's index in lse."""
    group = first_key // 4 + tl.arange(0, BLOCK_N // 4)
    return dropout_factors(tl.load(seed_ptr), lse_row[:, None], group[None, :], threshold, scale)
