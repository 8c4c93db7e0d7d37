"""Attention backward in Triton, in two kernels without atomics: csrc/attention.h says what is
computed.

With p = exp(s - lse), dp = dout v^T and delta = sum over d of dout * o, less the gradient of lse:
  ds = p * (dp - delta) * softcap'(s);  dq = scale * ds k;  dk = scale * ds^T q;  dv = p^T dout
and under dropout's factors f:  dp * f instead of dp,  p * f instead of p in dv.
"""

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
    lse_in_base_2,
    only_visible,
    sequence,
    steps,
    store_rows,
    tile,
)


@triton.jit(do_not_specialize=RUNTIME)
def attention_backward_dq_kernel(
    dq_ptr, delta_ptr, dout_ptr, dlse_ptr, has_dlse, q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr,
    dq_batch, dq_row, dq_head, dout_batch, dout_row, dout_head, q_batch, q_row, q_head,
    k_batch, k_row, k_head, v_batch, v_row, v_head, o_batch, o_row, o_head,
    offsets_q_ptr, offsets_k_ptr, seed_ptr, mask_ptr, slopes_ptr,
    mask_batch, mask_head, mask_query, mask_key, slope_batch, has_mask, has_slopes,
    lse_batch, lse_head, queries, keys, group, head_dim, value_head_dim, packed,
    scale, softcap, left, right, has_dropout, threshold, dropout_scale,
    OPTIONS: tl.constexpr, BIAS: tl.constexpr, DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq, and delta for the kernel of dk and dv. Program (m, h, b) has BLOCK_M queries of head h of
    sequence b in registers and goes through the keys that they see, BLOCK_N at a time.
    """
    batch, head = tl.program_id(2), tl.program_id(1)
    start_q, queries = sequence(offsets_q_ptr, batch, queries, packed)
    start_k, keys = sequence(offsets_k_ptr, batch, keys, packed)
    head_dim = head_dim // DIVISOR * DIVISOR
    value_head_dim = value_head_dim // DIVISOR * DIVISOR
    bias = (
        mask_ptr, slopes_ptr, mask_batch, mask_head, mask_query, mask_key, slope_batch, has_mask,
        has_slopes,
    )  # fmt: skip
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    query = first_query + tl.arange(0, BLOCK_M)
    first_position = first_query + (keys - queries)
    position = first_position + tl.arange(0, BLOCK_M)
    end = tl.minimum(keys, first_position + BLOCK_M + right)
    end = tl.where(first_query < queries, end, 0)
    start = tl.maximum(first_position - left, 0) // BLOCK_N * BLOCK_N

    row, live = start_q + first_query, query < queries
    q_at = head_at(q_ptr, q_batch, q_row, q_head, batch, row, head, DIVISOR)
    dout_at = head_at(dout_ptr, dout_batch, dout_row, dout_head, batch, row, head, DIVISOR)
    o_at = head_at(o_ptr, o_batch, o_row, o_head, batch, row, head, DIVISOR)
    q = load_rows(q_at + tile(q_row, BLOCK_M, BLOCK_D, DIVISOR), live, head_dim, BLOCK_D)
    dout_tile = tile(dout_row, BLOCK_M, BLOCK_D, DIVISOR)
    dout = load_rows(dout_at + dout_tile, live, value_head_dim, BLOCK_D)
    o = load_rows(o_at + tile(o_row, BLOCK_M, BLOCK_D, DIVISOR), live, value_head_dim, BLOCK_D)
    delta = tl.sum(dout.to(tl.float32) * o.to(tl.float32), 1)
    lse_first = steps(batch, lse_batch, 1) + steps(head, lse_head, 1)
    lse_row = lse_first + start_q + query
    delta -= tl.load(dlse_ptr + lse_row, mask=live & has_dlse, other=0.0).to(tl.float32)
    tl.store(delta_ptr + lse_row, delta, mask=live)
    lse, lse_rest = lse_in_base_2(lse_ptr + lse_row, live)

    kv_head, first_row = head // group, start_k + start
    k_at = head_at(k_ptr, k_batch, k_row, k_head, batch, first_row, kv_head, DIVISOR)
    v_at = head_at(v_ptr, v_batch, v_row, v_head, batch, first_row, kv_head, DIVISOR)
    k_tile = tile(k_row, BLOCK_N, BLOCK_D, DIVISOR)
    v_tile = tile(v_row, BLOCK_N, BLOCK_D, DIVISOR)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first_key in range(start, end, BLOCK_N):
        key = first_key + tl.arange(0, BLOCK_N)
        k = load_rows(k_at + k_tile, key < keys, head_dim, BLOCK_D)
        v = load_rows(v_at + v_tile, key < keys, value_head_dim, BLOCK_D)
        s, slope = capped(tl.dot(q, tl.trans(k), input_precision="ieee") * scale, softcap, OPTIONS)
        s = biased(
            s, bias, batch, head, query[:, None], key[None, :], position[:, None], queries, keys,
            BIAS,
        )  # fmt: skip
        whole = is_whole(first_position, first_key, keys, left, right, BLOCK_M, BLOCK_N)
        s = only_visible(s, position[:, None], key[None, :], keys, left, right, whole)
        p = tl.exp2((s - lse[:, None]) - lse_rest[:, None])
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        if OPTIONS:
            if has_dropout:
                dp *= attention_factors(
                    seed_ptr, lse_row, first_key, threshold, dropout_scale, BLOCK_N
                )
        ds = p * (dp - delta[:, None]) * slope
        dq = add_product(dq, ds.to(k.dtype), k)
        k_at += steps(BLOCK_N, k_row, DIVISOR)
        v_at += steps(BLOCK_N, v_row, DIVISOR)
    dq *= scale * 0.6931471805599453
    dq_at = head_at(dq_ptr, dq_batch, dq_row, dq_head, batch, row, head, DIVISOR)
    store_rows(dq_at + tile(dq_row, BLOCK_M, BLOCK_D, DIVISOR), dq, live, head_dim, BLOCK_D)


@triton.jit(do_not_specialize=RUNTIME)
def attention_backward_dkv_kernel(
    dk_ptr, dv_ptr, delta_ptr, dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr,
    dk_batch, dk_row, dk_head, dv_batch, dv_row, dv_head, dout_batch, dout_row, dout_head,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    offsets_q_ptr, offsets_k_ptr, seed_ptr, mask_ptr, slopes_ptr,
    mask_batch, mask_head, mask_query, mask_key, slope_batch, has_mask, has_slopes,
    lse_batch, lse_head, queries, keys, group, head_dim, value_head_dim, packed,
    scale, softcap, left, right, has_dropout, threshold, dropout_scale,
    OPTIONS: tl.constexpr, BIAS: tl.constexpr, DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv. Program (n, h, b) has BLOCK_N keys of key head h of sequence b in registers and
    goes through the queries that see them, BLOCK_M at a time, of each query head of its group.
    Scores are transposed, (keys, queries), so that they are operands of dk and dv as they stand.
    """
    batch, kv_head = tl.program_id(2), tl.program_id(1)
    start_q, queries = sequence(offsets_q_ptr, batch, queries, packed)
    start_k, keys = sequence(offsets_k_ptr, batch, keys, packed)
    head_dim = head_dim // DIVISOR * DIVISOR
    value_head_dim = value_head_dim // DIVISOR * DIVISOR
    bias = (
        mask_ptr, slopes_ptr, mask_batch, mask_head, mask_query, mask_key, slope_batch, has_mask,
        has_slopes,
    )  # fmt: skip
    first_key = tl.program_id(0) * BLOCK_N
    key = first_key + tl.arange(0, BLOCK_N)
    start = tl.maximum(first_key - right - (keys - queries), 0) // BLOCK_M * BLOCK_M
    end = tl.minimum(queries, first_key + BLOCK_N + left - (keys - queries))
    end = tl.where(first_key < keys, end, 0)

    row, live_keys = start_k + first_key, key < keys
    k_at = head_at(k_ptr, k_batch, k_row, k_head, batch, row, kv_head, DIVISOR)
    v_at = head_at(v_ptr, v_batch, v_row, v_head, batch, row, kv_head, DIVISOR)
    k = load_rows(k_at + tile(k_row, BLOCK_N, BLOCK_D, DIVISOR), live_keys, head_dim, BLOCK_D)
    v_tile = tile(v_row, BLOCK_N, BLOCK_D, DIVISOR)
    v = load_rows(v_at + v_tile, live_keys, value_head_dim, BLOCK_D)
    q_tile = tile(q_row, BLOCK_M, BLOCK_D, DIVISOR)
    dout_tile = tile(dout_row, BLOCK_M, BLOCK_D, DIVISOR)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    m = tl.arange(0, BLOCK_M)
    head, row_q = kv_head * group, start_q + start
    q_first = head_at(q_ptr, q_batch, q_row, q_head, batch, row_q, head, DIVISOR)
    dout_first = head_at(dout_ptr, dout_batch, dout_row, dout_head, batch, row_q, head, DIVISOR)
    lse_first = steps(batch, lse_batch, 1) + steps(head, lse_head, 1) + start_q
    for _ in range(group):
        q_at, dout_at = q_first, dout_first
        for first_query in range(start, end, BLOCK_M):
            query = first_query + m
            live = query < queries
            lse_row = lse_first + query
            q = load_rows(q_at + q_tile, live, head_dim, BLOCK_D)
            dout = load_rows(dout_at + dout_tile, live, value_head_dim, BLOCK_D)
            lse, lse_rest = lse_in_base_2(lse_ptr + lse_row, live)
            delta = tl.load(delta_ptr + lse_row, mask=live, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
            s, slope = capped(s, softcap, OPTIONS)
            first_position = first_query + (keys - queries)
            whole = is_whole(first_position, first_key, keys, left, right, BLOCK_M, BLOCK_N)
            position = first_position + m
            s = biased(
                s, bias, batch, head, query[None, :], key[:, None], position[None, :], queries,
                keys, BIAS,
            )  # fmt: skip
            s = only_visible(s, position[None, :], key[:, None], keys, left, right, whole)
            p = tl.exp2((s - lse[None, :]) - lse_rest[None, :])
            dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
            kept = p
            if OPTIONS:
                if has_dropout:
                    factors = tl.trans(
                        attention_factors(
                            seed_ptr, lse_row, first_key, threshold, dropout_scale, BLOCK_N
                        )
                    )
                    dp, kept = dp * factors, p * factors
            dv = add_product(dv, kept.to(dout.dtype), dout)
            ds = p * (dp - delta[None, :]) * slope
            dk = add_product(dk, ds.to(q.dtype), q)
            q_at += steps(BLOCK_M, q_row, DIVISOR)
            dout_at += steps(BLOCK_M, dout_row, DIVISOR)
        q_first += steps(1, q_head, DIVISOR)
        dout_first += steps(1, dout_head, DIVISOR)
        lse_first += lse_head
        head += 1
    dk *= scale * 0.6931471805599453
    dk_at = head_at(dk_ptr, dk_batch, dk_row, dk_head, batch, row, kv_head, DIVISOR)
    dv_at = head_at(dv_ptr, dv_batch, dv_row, dv_head, batch, row, kv_head, DIVISOR)
    dk_at += tile(dk_row, BLOCK_N, BLOCK_D, DIVISOR)
    dv_at += tile(dv_row, BLOCK_N, BLOCK_D, DIVISOR)
    store_rows(dk_at, dk, live_keys, head_dim, BLOCK_D)
    store_rows(dv_at, dv, live_keys, value_head_dim, BLOCK_D)
