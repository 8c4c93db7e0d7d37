"""Attention forward in Triton (Dao et al. 2022): csrc/attention.h says what is computed."""

import triton
import triton.language as tl

from .attention_tiles import (
    RUNTIME,
    add_product,
    attention_factors,
    biased,
    capped,
    head_at,
    is_whole,
    load_rows,
    only_visible,
    sequence,
    steps,
    store_rows,
    tile,
)


@triton.jit(do_not_specialize=RUNTIME)
def attention_forward_kernel(
    o_ptr, lse_ptr, q_ptr, k_ptr, v_ptr,
    o_batch, o_row, o_head, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    splits, offsets_q_ptr, offsets_k_ptr, lengths_ptr, seed_ptr, mask_ptr, slopes_ptr,
    mask_batch, mask_head, mask_query, mask_key, slope_batch, has_mask, has_slopes,
    lse_batch, lse_head, queries, keys, heads, group, head_dim, value_head_dim, packed, has_lengths,
    scale, softcap, headroom, left, right, has_dropout, threshold, dropout_scale,
    OPTIONS: tl.constexpr, BIAS: tl.constexpr, DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """o = softmax(scale * q k^T + bias) v and lse, by online softmax. Exponentials are smaller by
    `headroom`, in base 2, than relative to the highest score.

    Program (m, h, b * splits + s) has BLOCK_M queries of head h of sequence b, which it keeps in
    registers, and part s of the keys that they see, which it goes through BLOCK_N at a time. With
    several splits o and lse are partial ones, in float32, that attention_combine_kernel joins.
    """
    outer, head = tl.program_id(2), tl.program_id(1)
    batch, split = outer // splits, outer % splits
    start_q, queries = sequence(offsets_q_ptr, batch, queries, packed)
    start_k, keys = sequence(offsets_k_ptr, batch, keys, packed)
    keys = tl.load(lengths_ptr + batch, mask=has_lengths, other=keys)
    head_dim = head_dim // DIVISOR * DIVISOR
    value_head_dim = value_head_dim // DIVISOR * DIVISOR
    bias = (
        mask_ptr, slopes_ptr, mask_batch, mask_head, mask_query, mask_key, slope_batch, has_mask,
        has_slopes,
    )  # fmt: skip
    # The longest rows of a causal mask start first.
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    query = first_query + tl.arange(0, BLOCK_M)
    first_position = first_query + (keys - queries)
    position = first_position + tl.arange(0, BLOCK_M)
    end = tl.minimum(keys, first_position + BLOCK_M + right)
    end = tl.where(first_query < queries, end, 0)
    start = tl.maximum(first_position - left, 0) // BLOCK_N * BLOCK_N
    part = tl.cdiv(tl.cdiv(tl.maximum(end - start, 0), BLOCK_N), splits) * BLOCK_N
    start += split * part
    end = tl.minimum(end, start + part)

    live, row = query < queries, start_q + first_query
    q_at = head_at(q_ptr, q_batch, q_row, q_head, batch, row, head, DIVISOR)
    q = load_rows(q_at + tile(q_row, BLOCK_M, BLOCK_D, DIVISOR), live, head_dim, BLOCK_D)
    kv_head, first_row = head // group, start_k + start
    k_at = head_at(k_ptr, k_batch, k_row, k_head, batch, first_row, kv_head, DIVISOR)
    v_at = head_at(v_ptr, v_batch, v_row, v_head, batch, first_row, kv_head, DIVISOR)
    k_tile = tile(k_row, BLOCK_N, BLOCK_D, DIVISOR)
    v_tile = tile(v_row, BLOCK_N, BLOCK_D, DIVISOR)
    lse_first = steps(batch, lse_batch, 1) + steps(head, lse_head, 1) + start_q
    highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    o = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first_key in range(start, end, BLOCK_N):
        key = first_key + tl.arange(0, BLOCK_N)
        k = load_rows(k_at + k_tile, key < keys, head_dim, BLOCK_D)
        s, _ = capped(tl.dot(q, tl.trans(k), input_precision="ieee") * scale, softcap, OPTIONS)
        s = biased(
            s, bias, batch, head, query[:, None], key[None, :], position[:, None], queries, keys,
            BIAS,
        )  # fmt: skip
        whole = is_whole(first_position, first_key, keys, left, right, BLOCK_M, BLOCK_N)
        s = only_visible(s, position[:, None], key[None, :], keys, left, right, whole)
        higher = tl.maximum(highest, tl.max(s, 1))
        seen = tl.where(higher == -float("inf"), 0.0, higher)  # -inf - -inf is not 0
        p = tl.exp2(s - (seen + headroom)[:, None])
        fade = tl.exp2(highest - seen)
        total = total * fade + tl.sum(p, 1)
        highest = higher
        if OPTIONS:
            if has_dropout:
                p *= attention_factors(
                    seed_ptr, lse_first + query, first_key, threshold, dropout_scale, BLOCK_N
                )
        v = load_rows(v_at + v_tile, key < keys, value_head_dim, BLOCK_D)
        o = add_product(o * fade[:, None], p.to(v.dtype), v)
        k_at += steps(BLOCK_N, k_row, DIVISOR)
        v_at += steps(BLOCK_N, v_row, DIVISOR)

    o = tl.where(total > 0, 1.0 / total, 0.0)[:, None] * o
    o_at = head_at(o_ptr, o_batch, o_row, o_head, outer, row, head, DIVISOR)
    o_at += tile(o_row, BLOCK_M, BLOCK_D, DIVISOR)
    store_rows(o_at, o, live, value_head_dim, BLOCK_D)
    lse_at = lse_ptr + steps(outer, lse_batch, 1) + steps(head, lse_head, 1)
    # In float64: backward takes differences of it and of scores that may be large.
    lse = (highest.to(tl.float64) + headroom + tl.log2(total)) * 0.6931471805599453
    tl.store(lse_at + start_q + query, lse, mask=live)


@triton.jit(do_not_specialize=RUNTIME)
def attention_combine_kernel(
    o_ptr, lse_ptr, part_o_ptr, part_lse_ptr, o_batch, o_row, o_head,
    splits, queries, heads, value_head_dim, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """o = sum over splits of exp(lse_s - lse) * o_s, with lse their log-sum-exp.

    Program (i, h, b) has one query of one head. Reads part_o (batch, splits, queries, heads,
    value_head_dim) and part_lse (batch, splits, heads, queries).
    """
    query, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    split, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    outer = batch * splits + split
    lse_s = tl.load(
        part_lse_ptr + (outer * heads + head) * queries + query,
        mask=split < splits, other=-float("inf"),
    )  # fmt: skip
    highest = tl.max(lse_s, 0)
    base = tl.where(highest == -float("inf"), 0.0, highest)
    weight = tl.exp((lse_s - base).to(tl.float32))
    total = tl.sum(weight, 0)
    weight *= tl.where(total > 0, 1.0 / total, 0.0)
    part_o = tl.load(
        part_o_ptr + ((outer * queries + query) * heads + head)[:, None] * value_head_dim
        + d[None, :],
        mask=(split < splits)[:, None] & (d < value_head_dim)[None, :], other=0.0,
    )  # fmt: skip
    o = tl.sum(weight[:, None] * part_o, 0)
    tl.store(
        o_ptr + batch * o_batch + tl.cast(query, tl.int64) * o_row + head * o_head + d,
        o.to(o_ptr.dtype.element_ty), mask=d < value_head_dim,
    )  # fmt: skip
    tl.store(
        lse_ptr + (batch * heads + head) * queries + query, base + tl.log(total).to(tl.float64)
    )
