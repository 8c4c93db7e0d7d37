"""Attention of new queries over a cache of keys and values; for decoding. There is no backward."""

import torch
from torch import Tensor

from .. import reference
from ..backend import choose, where
from .attention import attention_forward, check_shapes, last_dim_contiguous, position_options
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
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """Attention of new queries over a cache of keys and values, after appending theirs to it in
    place.

    Args:
        q: (batch, queries, heads, head_dim). k_cache, v_cache: (batch, capacity, kv_heads,
            head_dim).
        k, v: (batch, new, kv_heads, head_dim), written at cache_seqlens; None where the cache holds
            all.
        cache_seqlens: keys in use of each sequence before the append, int32 (batch), or one int for
            all.
        The rest is as for `attention`.
    Returns: like q. There is no backward.
    Raises: IndexError where a cache has no room, ValueError where shapes do not fit.
    """
    check_shapes("attention_with_kvcache", q, k_cache, v_cache, packed=False)
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
    if cache_seqlens.shape != q.shape[:1] or cache_seqlens.dtype != torch.int32:
        raise ValueError(
            f"attention_with_kvcache: cache_seqlens: expected int32 ({q.shape[0]},), "
            f"got {cache_seqlens.dtype} {tuple(cache_seqlens.shape)}"
        )
    if (k is None) != (v is None):
        raise ValueError("attention_with_kvcache: k, v: expected both or neither")
    with torch.no_grad():
        if k is not None and v is not None:
            check_shapes("attention_with_kvcache", q, k, v, packed=False)
            backend = choose("attention_with_kvcache", k_cache)
            cache_append(
                k_cache,
                v_cache,
                last_dim_contiguous(k),
                last_dim_contiguous(v),
                cache_seqlens,
                backend,
            )
            cache_seqlens = cache_seqlens + k.shape[1]
        options = (0, 0, *position_options(q, causal, softmax_scale, window_size, softcap), 0.0)
        q = last_dim_contiguous(q)
        seqlens = cache_seqlens.to(torch.int32)
        return attention_forward(
            q, k_cache, v_cache, None, None, seqlens, None, *options,
            choose("attention", q, needs=lambda: ["cache lengths"]),
        )[0]  # fmt: skip


def _form(*args, **kwargs):
    return None


FORMS = {attention_with_kvcache: _form}
