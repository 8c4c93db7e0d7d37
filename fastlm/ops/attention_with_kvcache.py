"""Attention of new queries over a cache of keys and values; for decoding. There is no backward."""

import torch
from torch import Tensor

from .. import reference
from ..backend import choose, where
from .attention import attention_forward
from .attention_arguments import (
    check_shapes,
    checked_mask,
    checked_slopes,
    last_dim_contiguous,
    position_options,
    widest,
)
from .define import define

# ---- implementation ----


def _append(kernels, k_cache, v_cache, k, v, cache_seqlens):
    kernels.cache_append(k_cache, v_cache, k, v, cache_seqlens, where(k))
    # A mutating schema alone does not tell autograd.
    torch.autograd.graph.increment_version((k_cache, v_cache))


# ---- schema and fake ----

cache_append = define(
    "cache_append",
    "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor cache_seqlens,"
    " str backend) -> ()",
    op="attention_with_kvcache",
    reference=reference.cache_append,
    native=_append,
)

# ---- public ----


def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cache_seqlens: Tensor | int = 0,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float | None = 0.0,
    attn_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Attention of new queries over a cache of keys and values, after appending theirs to it in
    place.

    Args:
        q: (batch, queries, heads, head_dim).
        k_cache, v_cache: (batch, capacity, kv_heads, head_dim or value_head_dim).
        k, v: (batch, new, kv_heads, head_dim or value_head_dim), written at cache_seqlens; None
            where the cache holds all.
        cache_seqlens: keys in use of each sequence before the append, int32 (batch), or one int for
            all.
        attn_mask: broadcastable to (batch, heads, queries, capacity).
        The rest is as for `attention`.
    Returns: q's shape with v_cache's last dimension. There is no backward.
    Raises: IndexError where a cache has no room, ValueError where shapes do not fit.
    """
    op = "attention_with_kvcache"
    check_shapes(op, q, k_cache, v_cache, packed=False)
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
    if cache_seqlens.shape != q.shape[:1] or cache_seqlens.dtype != torch.int32:
        raise ValueError(
            f"{op}: cache_seqlens: expected int32 ({q.shape[0]},), "
            f"got {cache_seqlens.dtype} {tuple(cache_seqlens.shape)}"
        )
    if (k is None) != (v is None):
        raise ValueError(f"{op}: k, v: expected both or neither, got one")
    position = position_options(op, q, causal, softmax_scale, window_size, softcap)
    mask = checked_mask(op, attn_mask, q, k_cache)
    slopes = checked_slopes(op, alibi_slopes, q.shape[0], q.shape[2])
    with torch.no_grad():
        if k is not None and v is not None:
            check_shapes(op, q, k, v, packed=False)
            for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
                if new.shape[2:] != cache.shape[2:]:
                    raise ValueError(
                        f"{op}: {name}: expected the cache's heads and head_dim "
                        f"{tuple(cache.shape[2:])}, got {tuple(new.shape[2:])}"
                    )
            appended = last_dim_contiguous(k), last_dim_contiguous(v)
            backend = choose(op, widest(k_cache, v_cache))
            cache_append(k_cache, v_cache, *appended, cache_seqlens, backend)
            cache_seqlens = cache_seqlens + k.shape[1]
        return attention_forward(
            last_dim_contiguous(q), k_cache, v_cache, None, None, cache_seqlens.to(torch.int32),
            mask, slopes, None, 0, 0, *position, 0.0,
            choose("attention", widest(q, v_cache), needs=lambda: ["cache lengths"]),
        )[0]  # fmt: skip


def _form(*args, **kwargs):
    return None


FORMS = {attention_with_kvcache: _form}
