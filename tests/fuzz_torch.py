"""What torch has for each public op, with all that the op takes: in the call's dtype and, for the
truth, in float64.
"""

import philox
import plain_attention
import torch
from rounding import stored
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def _add_layer_norm(x, residual, weight=None, bias=None, seed=None, eps=1e-5, dropout_p=0.0):
    wide = torch.promote_types(x.dtype, torch.float32)
    kept = _dropout(x.to(wide), seed=seed, p=dropout_p) if dropout_p else x.to(wide)
    added = stored((kept + residual.to(wide)).to(x.dtype))  # rounded once
    return F.layer_norm(added, x.shape[-1:], weight, bias, eps), added


def _dropout(input, seed, p):
    columns = input.shape[-1]
    rows = input.numel() // max(columns, 1)
    return input * philox.factors(seed, rows, columns, p).view(input.shape).to(input.dtype)


def _gelu(input, bias=None, approximate="none"):
    return F.gelu(input if bias is None else input + bias, approximate=approximate)


def _cross_entropy(
    input, target, weight=None, softcap=None, lse_square_scale=0.0, inplace_backward=False,
    **options,
):  # fmt: skip
    wide = torch.promote_types(input.dtype, torch.float32)
    input, weight = input.to(wide), None if weight is None else weight.to(wide)
    target = target.to(wide) if target.is_floating_point() else target
    z = plain_attention.capped(input, softcap)
    loss = F.cross_entropy(z, target, weight, **options)
    if not lse_square_scale:
        return loss
    ignored = target == options.get("ignore_index", -100)
    squares = z.logsumexp(min(z.dim() - 1, 1)).square().masked_fill(ignored, 0)
    if options.get("reduction", "mean") == "none":
        return loss + lse_square_scale * squares
    if options.get("reduction", "mean") == "mean":
        classes = z.shape[1] if z.dim() > 1 else z.shape[0]
        weights = z.new_ones(classes) if weight is None else weight
        kept = weights[target.masked_fill(ignored, 0)].masked_fill(ignored, 0)
        return loss + lse_square_scale * squares.sum() / kept.sum()
    return loss + lse_square_scale * squares.sum()


def _linear_cross_entropy(input, linear_weight, target, linear_bias=None, **options):
    logits = stored(F.linear(input, linear_weight, linear_bias))
    loss = _cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1), **options)
    return loss.view(target.shape) if options.get("reduction") == "none" else loss


def _attention(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, return_lse=False, **options):
    if cu_seqlens_q is None:
        o, lse = plain_attention.attention(q, k, v, **options)
    else:
        slopes = options.pop("alibi_slopes", None)
        if slopes is not None:
            options["alibi_slopes"] = slopes.expand(cu_seqlens_q.numel() - 1, q.shape[1])
        o, lse = plain_attention.packed(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)
    return (o, lse) if return_lse else o


def _attention_with_kvcache(
    q, k_cache, v_cache, cache_seqlens, k=None, v=None, attn_mask=None, alibi_slopes=None, **options
):  # fmt: skip
    """Sequence by sequence."""
    heads = q.shape[2]
    shape = (q.shape[0], heads, q.shape[1], k_cache.shape[1])
    mask = None if attn_mask is None else attn_mask.expand(shape)
    slopes = None if alibi_slopes is None else alibi_slopes.expand(q.shape[0], heads)
    outputs = []
    for b, length in enumerate(cache_seqlens.tolist()):
        if k is not None:
            k_cache[b, length : length + k.shape[1]] = k[b]
            v_cache[b, length : length + k.shape[1]] = v[b]
            length += k.shape[1]
        o, _ = plain_attention.attention(
            q[b : b + 1], k_cache[b : b + 1, :length], v_cache[b : b + 1, :length],
            attn_mask=None if mask is None else mask[b : b + 1, :, :, :length],
            alibi_slopes=None if slopes is None else slopes[b : b + 1],
            **{"causal": True, **options},
        )  # fmt: skip
        outputs.append(o)
    o = torch.cat(outputs) if outputs else q.new_zeros(*q.shape[:-1], v_cache.shape[-1])
    return o, k_cache, v_cache


def _sdpa(query, key, value, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )


TORCH = {
    "layer_norm": F.layer_norm,
    "add_layer_norm": _add_layer_norm,
    "rms_norm": F.rms_norm,
    "gelu": _gelu,
    "dropout": _dropout,
    "linear": F.linear,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "attention": _attention,
    "attention_with_kvcache": _attention_with_kvcache,
    "scaled_dot_product_attention": _sdpa,
}
