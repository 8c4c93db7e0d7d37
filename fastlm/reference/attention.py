"""attention, and the append to its cache.

q, k, v are (batch, sequence, heads, head_dim), or (tokens, heads, head_dim) with the offsets
cu_seqlens of the sequences that are packed one after the other; those are one batch here whose mask
keeps sequences apart.
"""

import torch
from torch import Tensor

from ..philox import dropout_factors
from .precision import accumulation_dtype, wide


def _places(tokens: int, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each packed token: its sequence, its index there, and that sequence's length."""
    token = torch.arange(tokens, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].long(), token, right=True)
    return sequence, token - cu_seqlens[sequence], (cu_seqlens[1:] - cu_seqlens[:-1])[sequence]


def _visible(q, k, cu_q, cu_k, seqlens_k, window) -> tuple[Tensor, Tensor, Tensor]:
    """Bool (batch, queries, keys) of what each query sees, each key's index in its sequence (keys),
    and the queries' positions among the keys (batch, queries, 1).
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
    return seen, key, position


def _batched(*tensors: Tensor) -> list[Tensor]:
    return [t if t.dim() == 4 else t[None] for t in tensors]


def _bias(q, k, cu_q, key, position, attn_mask, alibi_slopes):
    """What is added to the scores, broadcastable to (batch, heads, queries, keys), or None."""
    bias = None
    if attn_mask is not None:
        hides = attn_mask.dtype == torch.uint8
        dtype = accumulation_dtype(q)
        bias = (
            torch.zeros(attn_mask.shape, dtype=dtype, device=q.device).masked_fill(
                attn_mask == 0, float("-inf")
            )
            if hides
            else attn_mask.to(dtype)
        )
    if alibi_slopes is not None:
        slopes = alibi_slopes if alibi_slopes.dim() == 2 else alibi_slopes[None]
        if cu_q is None:
            slopes = slopes[..., None, None]
        else:
            sequence, _, _ = _places(q.shape[-3], cu_q)
            slopes = slopes.expand(cu_q.numel() - 1, -1)[sequence].mT[None, ..., None]
        alibi = -slopes * (position - key).abs()[:, None]
        bias = alibi if bias is None else bias + alibi
    return bias


def _scores(q, k, visible, bias, softmax_scale, softcap):
    """Scores (batch, heads, queries, keys), -inf where not visible, and the derivative of the
    softcap or None.
    """
    raw = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
    t = torch.tanh(raw / softcap) if softcap else None
    scores = raw if t is None else softcap * t
    scores = scores if bias is None else scores + bias
    return scores.masked_fill(
        ~visible[:, None], float("-inf")
    ), None if t is None else 1 - t.square()


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """A query that sees nothing has lse = -inf and probabilities of 0."""
    difference = scores.double() - lse.masked_fill(lse == float("-inf"), 0)[..., None]
    return difference.exp().to(scores.dtype)


def _attention_factors(seed, p, lse, key, dtype):
    rows = torch.arange(lse.numel(), device=lse.device)
    keys = key.shape[0]
    return dropout_factors(seed, rows, keys, p, dtype)[:, key].view(*lse.shape, keys)


def attention_forward(
    q, k, v, cu_q, cu_k, seqlens_k, attn_mask, alibi_slopes, seed, max_q, max_k,
    softmax_scale, softcap, window_left, window_right, dropout_p,
):  # fmt: skip
    """(o, lse): o of q's shape with v's head_dim; lse float64 (batch, heads, queries) or (heads,
    tokens), natural log. attn_mask (batch, heads, queries, keys): uint8, or added.
    """
    visible, key, position = _visible(q, k, cu_q, cu_k, seqlens_k, (window_left, window_right))
    group = q.shape[-2] // k.shape[-2]
    queries, keys, values = (wide(t) for t in _batched(q, k, v))
    if seqlens_k is not None:
        # What lies past the keys in use may be NaN, and 0 * NaN is not 0.
        values = values.masked_fill(~(key < seqlens_k[:, None])[:, :, None, None], 0)
    bias = _bias(q, k, cu_q, key, position, attn_mask, alibi_slopes)
    keys = keys.repeat_interleave(group, 2)
    scores, _ = _scores(queries, keys, visible, bias, softmax_scale, softcap)
    lse = scores.double().logsumexp(-1)
    p = _probabilities(scores, lse)
    if seed is not None:
        p = p * _attention_factors(seed, dropout_p, lse, key, p.dtype)
    o = torch.einsum("bhqk,bkhd->bqhd", p, values.repeat_interleave(group, 2))
    o = o.to(q.dtype).contiguous()
    return (o, lse) if q.dim() == 4 else (o[0], lse[0])


def attention_backward(
    dout, dlse, q, k, v, o, lse, cu_q, cu_k, attn_mask, alibi_slopes, seed, max_q, max_k,
    softmax_scale, softcap, window_left, window_right, dropout_p,
):  # fmt: skip
    """(dq, dk, dv) of sum(dout * o) + sum(dlse * lse); dlse may be None."""
    visible, key, position = _visible(q, k, cu_q, cu_k, None, (window_left, window_right))
    group = q.shape[-2] // k.shape[-2]
    packed = q.dim() == 3
    lse = lse[None] if packed else lse
    bias = _bias(q, k, cu_q, key, position, attn_mask, alibi_slopes)
    dout, queries, keys, values = (wide(t) for t in _batched(dout, q, k, v))
    keys, values = keys.repeat_interleave(group, 2), values.repeat_interleave(group, 2)
    scores, slope = _scores(queries, keys, visible, bias, softmax_scale, softcap)
    p = _probabilities(scores, lse)
    dp = torch.einsum("bqhd,bkhd->bhqk", dout, values)
    kept = p
    if seed is not None:
        factors = _attention_factors(seed, dropout_p, lse, key, p.dtype)
        dp, kept = dp * factors, p * factors
    # The sum of dout * o too, but of o as it was before it was rounded.
    delta = (p * dp).sum(-1)
    if dlse is not None:
        delta = delta - (dlse[None] if packed else dlse).to(delta.dtype)
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
