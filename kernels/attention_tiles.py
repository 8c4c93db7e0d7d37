"""What the attention kernels share: where tiles lie, what a query sees, scores, dropout.

Scores are in base 2 throughout: `scale` and `softcap` come multiplied by log2(e), so that an
exponential is one instruction; lse is natural, and float64, outside.
"""

import triton
import triton.language as tl

from .elementary import tanh
from .philox import dropout_factors

# Sizes and options of a call. They change from call to call, and none needs a kernel of its own.
RUNTIME = [
    *(f"{t}_{stride}" for t in ("q", "k", "v", "o", "dout", "dq", "dk", "dv")
      for stride in ("batch", "row", "head")),
    "lse_batch", "lse_head", "queries", "keys", "heads", "group", "head_dim", "value_head_dim",
    "packed", "has_lengths", "splits", "left", "right", "has_dropout", "threshold", "has_dlse",
    "mask_batch", "mask_head", "mask_query", "mask_key", "slope_batch", "has_mask", "has_slopes",
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
def add_product(sums, a, b):
    """sums + a b. In float32 the product is summed from zero: a sum of short sums rounds less than
    a long one. It is subtracted, because triton turns its addition into one long sum. Tensor cores
    add to what is there.
    """
    if a.dtype == tl.float32:
        sums -= tl.dot(-a, b, input_precision="ieee")
    else:
        sums = tl.dot(a, b, sums)
    return sums


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
            t = tanh(scores / softcap)
            scores, slope = softcap * t, 1.0 - t * t
    return scores, slope


@triton.jit
def biased(scores, bias, batch, head, query, key, position, queries, keys, BIAS: tl.constexpr):
    """Scores plus the mask and ALiBi, in base 2; query, key and position broadcast to them. `bias`
    is (mask, slopes, mask's strides, slopes' stride, has_mask, has_slopes).
    """
    if BIAS:
        (
            mask_ptr,
            slopes_ptr,
            of_batch,
            of_head,
            of_query,
            of_key,
            slope_batch,
            has_mask,
            has_slopes,
        ) = bias
        if has_mask:
            at = steps(batch, of_batch, 1) + steps(head, of_head, 1)
            at = at + tl.cast(query, tl.int64) * of_query + tl.cast(key, tl.int64) * of_key
            live = (query < queries) & (key < keys)
            if mask_ptr.dtype.element_ty == tl.uint8:
                # 0 or -inf: a comparison would move bits between layouts, which triton cannot.
                shown = tl.load(mask_ptr + at, mask=live, other=1).to(tl.float32)
                scores += 1.0 - 1.0 / shown
            else:
                added = tl.load(mask_ptr + at, mask=live, other=0.0).to(tl.float32)
                # Finite in base 2 too: where every key is hidden by a huge number, torch's softmax
                # is uniform.
                added = tl.where((added < -2e38) & (added > -float("inf")), -2e38, added)
                scores += added * 1.4426950408889634
        if has_slopes:
            slope = tl.load(slopes_ptr + batch * slope_batch + head) * 1.4426950408889634
            scores -= slope * tl.abs(position - key).to(tl.float32)
    return scores


@triton.jit
def lse_in_base_2(pointers, live):
    """(lse, what that was rounded by) of queries; infinity past the end, and where a query sees no
    key: their probabilities are 0.
    """
    lse = tl.load(pointers, mask=live, other=-float("inf")) * 1.4426950408889634
    lse = tl.where(lse == -float("inf"), float("inf"), lse)
    rounded = lse.to(tl.float32)
    rest = (lse - rounded.to(tl.float64)).to(tl.float32)
    return rounded, tl.where(rounded == float("inf"), 0.0, rest)


@triton.jit
def attention_factors(seed_ptr, lse_row, first_key, threshold, scale, BLOCK_N: tl.constexpr):
    """Dropout's factors (rows, BLOCK_N); a row of the mask is a query's index in lse."""
    group = first_key // 4 + tl.arange(0, BLOCK_N // 4)
    return dropout_factors(tl.load(seed_ptr), lse_row[:, None], group[None, :], threshold, scale)
