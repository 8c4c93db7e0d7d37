"""attention, and the append to its cache.

q, k, v are (batch, sequence, heads, head_dim), or (tokens, heads, head_dim) with the offsets
cu_seqlens of the sequences that are packed one after the other; those are one batch here whose mask
keeps sequences apart.
"""

import torch
from torch import Tensor

from ..philox import dropout_factors
from .precision import wide


def _places(tokens: int, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each packed token: its sequence, its index there, and that sequence's length."""
    token = torch.arange(tokens, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].long(), token, right=True)
    return sequence, token - cu_seqlens[sequence], (cu_seqlens[1:] - cu_seqlens[:-1])[sequence]


def _visible(q, k, cu_q, cu_k, seqlens_k, window) -> tuple[Tensor, Tensor]:
    """Bool (batch, queries, keys) of what each query sees, and each key's index in its sequence
    (keys).
    """
    queries, keys = q.shape[-3], k.shape[-3]
    key = torch.arange(keys, device=q.device)
    if cu_q is None:
        length = (
            torch.full((1, 1, 1), keys, device=q.device)
            if seqlens_k is None
            else seqlens_k[:, None, None]
        )
        position = torch.arange(queries, device=q.device)[:, None] + length - queries
        seen = key < length
    else:
        sequence_q, query, length_q = _places(queries, cu_q)
        sequence_k, key, _ = _places(keys, cu_k)
        length_k = (cu_k[1:] - cu_k[:-1])[sequence_q]
        position = (query + length_k - length_q)[None, :, None]
        seen = (sequence_q[:, None] == sequence_k)[None]
    left, right = window
    if right >= 0:
        seen = seen & (key <= position + right)
    if left >= 0:
        seen = seen & (key >= position - left)
    return seen, key


def _batched(*tensors: Tensor) -> list[Tensor]:
    return [t if t.dim() == 4 else t[None] for t in tensors]


def _scores(q, k, visible, softmax_scale, softcap):
    """Scores (batch, heads, queries, keys), -inf where not visible, and the derivative of the
    softcap or None.
    """
    raw = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
    t = torch.tanh(raw / softcap) if softcap else None
    scores = raw if t is None else softcap * t
    return scores.masked_fill(
        ~visible[:, None], float("-inf")
    ), None if t is None else 1 - t.square()


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """A query that sees nothing has lse = -inf and probabilities of 0."""
    return (scores - lse.masked_fill(lse == float("-inf"), 0)[..., None]).exp()


def _attention_factors(seed, p, lse, key):
    rows = torch.arange(lse.numel(), device=lse.device)
    return dropout_factors(seed, rows, key.shape[0], p)[:, key].view(*lse.shape, -1)


def attention_forward(
    q,
    k,
    v,
    cu_q,
    cu_k,
    seqlens_k,
    seed,
    max_q,
    max_k,
    softmax_scale,
    softcap,
    window_left,
    window_right,
    dropout_p,
):
    """(o, lse): o like q; lse (batch, heads, queries) or (heads, tokens), natural log."""
    visible, key = _visible(q, k, cu_q, cu_k, seqlens_k, (window_left, window_right))
    group = q.shape[-2] // k.shape[-2]
    queries, keys, values = (wide(t) for t in _batched(q, k, v))
    if seqlens_k is not None:
        # What lies past the keys in use may be NaN, and 0 * NaN is not 0.
        values = values.masked_fill(~(key < seqlens_k[:, None])[:, :, None, None], 0)
    scores, _ = _scores(queries, keys.repeat_interleave(group, 2), visible, softmax_scale, softcap)
    lse = scores.logsumexp(-1)
    p = _probabilities(scores, lse)
    if seed is not None:
        p = p * _attention_factors(seed, dropout_p, lse, key)
    o = torch.einsum("bhqk,bkhd->bqhd", p, values.repeat_interleave(group, 2))
    o = o.to(q.dtype).contiguous()
    return (o, lse) if q.dim() == 4 else (o[0], lse[0])


def attention_backward(
    dout,
    q,
    k,
    v,
    o,
    lse,
    cu_q,
    cu_k,
    seed,
    max_q,
    max_k,
    softmax_scale,
    softcap,
    window_left,
    window_right,
    dropout_p,
):
    """(dq, dk, dv)."""
    visible, key = _visible(q, k, cu_q, cu_k, None, (window_left, window_right))
    group = q.shape[-2] // k.shape[-2]
    packed = q.dim() == 3
    lse = lse[None] if packed else lse
    dout, queries, keys, values, o = (wide(t) for t in _batched(dout, q, k, v, o))
    keys, values = keys.repeat_interleave(group, 2), values.repeat_interleave(group, 2)
    scores, slope = _scores(queries, keys, visible, softmax_scale, softcap)
    p = _probabilities(scores, lse)
    dp = torch.einsum("bqhd,bkhd->bhqk", dout, values)
    kept = p
    if seed is not None:
        factors = _attention_factors(seed, dropout_p, lse, key)
        dp, kept = dp * factors, p * factors
    delta = torch.einsum("bqhd,bqhd->bhq", dout, o)
    ds = p * (dp - delta[..., None]) * softmax_scale
    ds = ds if slope is None else ds * slope
    dq = torch.einsum("bhqk,bkhd->bqhd", ds, keys)
    dk = torch.einsum("bhqk,bqhd->bkhd", ds, queries).unflatten(2, (-1, group)).sum(3)
    dv = torch.einsum("bhqk,bqhd->bkhd", kept, dout).unflatten(2, (-1, group)).sum(3)
    grads = [g.to(q.dtype).contiguous() for g in (dq, dk, dv)]
    return tuple(g[0] for g in grads) if packed else tuple(grads)


def cache_append(k_cache, v_cache, k, v, cache_seqlens):
    """Writes k, v (batch, length, heads, head_dim) into the caches from cache_seqlens (batch)
    on.
    """
    batch = torch.arange(k.shape[0], device=k.device)[:, None]
    position = cache_seqlens[:, None].long() + torch.arange(k.shape[1], device=k.device)
    k_cache[batch, position] = k
    v_cache[batch, position] = v
