"""The append of attention_with_kvcache in Triton: csrc/attention.h says what is computed."""

import triton
import triton.language as tl

from .launch import launch

_RUNTIME = [
    *(f"{t}_{stride}" for t in ("k", "v", "k_cache", "v_cache")
      for stride in ("batch", "row", "head")),
    "capacity", "kv_heads", "head_dim", "value_head_dim",
]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME)
def cache_append_kernel(
    k_cache_ptr, v_cache_ptr, k_ptr, v_ptr, lengths_ptr,
    k_cache_batch, k_cache_row, k_cache_head, v_cache_batch, v_cache_row, v_cache_head,
    k_batch, k_row, k_head, v_batch, v_row, v_head, capacity, kv_heads, head_dim,
    value_head_dim, BLOCK: tl.constexpr,
):  # fmt: skip
    """k_cache[b, lengths[b] + i] = k[b, i], and likewise v.

    Program (i, b) has one token: all its heads, BLOCK elements at a time. A token for which the
    cache has no room is not written: a device cannot raise without being waited for.
    """
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    place = tl.load(lengths_ptr + batch) + row
    room = (place >= 0) & (place < capacity)
    for start in range(0, kv_heads * head_dim, BLOCK):
        index = start + tl.arange(0, BLOCK)
        head, d = index // head_dim, index % head_dim
        live = (head < kv_heads) & room
        k = tl.load(k_ptr + batch * k_batch + row * k_row + head * k_head + d, mask=live, other=0.0)
        k_at = batch * k_cache_batch + place * k_cache_row + head * k_cache_head + d
        tl.store(k_cache_ptr + k_at, k, mask=live)
    for start in range(0, kv_heads * value_head_dim, BLOCK):
        index = start + tl.arange(0, BLOCK)
        head, d = index // value_head_dim, index % value_head_dim
        live = (head < kv_heads) & room
        v = tl.load(v_ptr + batch * v_batch + row * v_row + head * v_head + d, mask=live, other=0.0)
        v_at = batch * v_cache_batch + place * v_cache_row + head * v_cache_head + d
        tl.store(v_cache_ptr + v_at, v, mask=live)


def cache_append(k_cache, v_cache, k, v, cache_seqlens, where) -> None:
    """Writes k, v (batch, length, kv_heads, head_dim) into the caches from cache_seqlens on."""
    batch, length, kv_heads, head_dim = k.shape
    launch(
        cache_append_kernel, (length, batch), k_cache, v_cache, k, v, cache_seqlens,
        *(s for t in (k_cache, v_cache, k, v) for s in t.stride()[:3]),
        k_cache.shape[1], kv_heads, head_dim, v.shape[-1], BLOCK=1024, num_warps=4,
    )  # fmt: skip
