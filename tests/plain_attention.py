"""Attention in the plainest torch, with all that ops.attention takes: the truth of its tests."""

import philox
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


def visible(queries: int, keys: int, causal=False, window_size=(-1, -1)) -> Tensor:
    """Bool (queries, keys); positions are aligned at the bottom right."""
    left, right = window_size
    right = 0 if causal else right
    distance = torch.arange(keys) - (torch.arange(queries)[:, None] + keys - queries)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if right >= 0:
        seen &= distance <= right
    if left >= 0:
        seen &= distance >= -left
    return seen


def attention(
    q, k, v, seed=None, *, attn_mask=None, alibi_slopes=None, softmax_scale=None, softcap=0.0,
    dropout_p=0.0, **mask,
):  # fmt: skip
    """(o, lse) of (batch, sequence, heads, head_dim); lse in float32 or wider."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scale = max(q.shape[-1], 1) ** -0.5 if softmax_scale is None else softmax_scale
    seen = visible(q.shape[2], k.shape[2], **mask)
    bias = bias_of(q.shape[2], k.shape[2], attn_mask, alibi_slopes)
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = capped(q.to(wide) @ k.to(wide).mT * scale, softcap) + bias.to(wide)
    # A row without a key has an lse of -inf and no gradient.
    lse = lse.masked_fill(~seen, float("-inf"))
    dead = (lse == float("-inf")).all(-1, keepdim=True)
    lse = lse.masked_fill(dead, 0).logsumexp(-1).masked_fill(dead[..., 0], float("-inf"))
    if not softcap and not dropout_p and attn_mask is None and alibi_slopes is None:
        with sdpa_kernel(SDPBackend.MATH):
            o = scaled_dot_product_attention(q, k, v, seen, scale=scale)
        return o.transpose(1, 2), lse
    scores = capped(q @ k.mT * scale, softcap) + bias.to(q.dtype)
    seen = seen & (bias > float("-inf"))
    # A row without a key gives 0: neither -inf nor its softmax, NaN, may come near a gradient.
    p = scores.masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1) * seen
    if dropout_p:
        factors = philox.factors(seed, lse.numel(), k.shape[2], dropout_p)
        p = p * factors.view(p.shape).to(p.dtype)
    return (p @ v).transpose(1, 2), lse


def bias_of(queries: int, keys: int, attn_mask, alibi_slopes) -> Tensor:
    """What is added to the scores, broadcastable to (batch, heads, queries, keys)."""
    bias = torch.zeros(1, 1, queries, keys, dtype=torch.float64)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        bias = bias.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        bias = bias + attn_mask
    if alibi_slopes is not None:
        position = torch.arange(queries)[:, None] + keys - queries
        distance = (position - torch.arange(keys)).abs()
        bias = bias - alibi_slopes.double()[..., None, None] * distance
    return bias


def capped(scores: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def packed(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes=None, **options):
    """The same for (tokens, heads, head_dim), sequence by sequence; lse (heads, tokens)."""
    outputs = []
    for i in range(len(cu_seqlens_q) - 1):
        queries = slice(cu_seqlens_q[i], cu_seqlens_q[i + 1])
        keys = slice(cu_seqlens_k[i], cu_seqlens_k[i + 1])
        slopes = None if alibi_slopes is None else alibi_slopes[i : i + 1]
        one = (q[queries][None], k[keys][None], v[keys][None])
        outputs.append(attention(*one, alibi_slopes=slopes, **options))
    return torch.cat([o[0] for o, _ in outputs]), torch.cat([lse[0] for _, lse in outputs], -1)
