"""Each op in plain torch: the oracle of the tests, the fallback on any device, the fake kernel of
torch.compile, and the definition that every kernel is documented by.

Arguments and results are those of the registered ops (fastlm/ops). Statistics and losses are
float32, or float64 for float64 inputs. Nothing here depends on values for its shapes, so that all
of it runs on the meta device. Longer than other files, so that an op's definition has one place.
"""

import torch
from torch import Tensor

from .philox import dropout_factors


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x))


# ---- dropout -----------------------------------------------------------------------------------


def _factors_like(x: Tensor, seed: Tensor, p: float) -> Tensor:
    columns = x.shape[-1] if x.dim() else 1
    rows = x.numel() // columns if columns else 0
    return dropout_factors(seed, torch.arange(rows, device=x.device), columns, p).view(x.shape)


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return (_wide(x) * _factors_like(x, seed, p)).to(x.dtype)


# ---- layer_norm ----------------------------------------------------------------------------------


def layer_norm_forward(x, weight, bias, eps):
    """(y, mean, rstd); mean and rstd have x's shape without the last dimension."""
    wide = _wide(x)
    mean = wide.mean(-1)
    centered = wide - mean[..., None]
    rstd = (centered.square().mean(-1) + eps).rsqrt()
    y = centered * rstd[..., None]
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype), mean, rstd


def _layer_norm_grads(dy, x, weight, mean, rstd):
    """dx, dweight, dbias, all wide."""
    dy, h = _wide(dy), (_wide(x) - mean[..., None]) * rstd[..., None]
    g = dy if weight is None else dy * weight
    dx = rstd[..., None] * (g - g.mean(-1, keepdim=True) - h * (g * h).mean(-1, keepdim=True))
    return dx, _sum_of_rows(dy * h), _sum_of_rows(dy)


def _sum_of_rows(t: Tensor) -> Tensor:
    return (
        t[None].flatten(0, -2).sum(0)
    )  # [None]: a single row may come without a dimension of rows


def layer_norm_backward(dy, x, weight, bias, mean, rstd):
    """(dx, dweight, dbias); the last two are empty where there is no weight or bias."""
    dx, dweight, dbias = _layer_norm_grads(dy, x, weight, mean, rstd)
    return dx.to(x.dtype), _parameter_grad(dweight, weight), _parameter_grad(dbias, bias)


def _parameter_grad(grad: Tensor, parameter: Tensor | None) -> Tensor:
    return grad.new_empty(0) if parameter is None else grad.to(parameter.dtype)


def add_layer_norm_forward(x, residual, weight, bias, seed, eps, dropout_p):
    """(y, residual_out, mean, rstd)."""
    kept = _wide(x) if seed is None else _wide(x) * _factors_like(x, seed, dropout_p)
    residual_out = (kept + _wide(residual)).to(x.dtype)
    y, mean, rstd = layer_norm_forward(residual_out, weight, bias, eps)
    return y, residual_out, mean, rstd


def add_layer_norm_backward(
    dy, dresidual_out, residual_out, weight, bias, mean, rstd, seed, dropout_p
):
    """(dx, dresidual, dweight, dbias); dx is empty where nothing was dropped: it equals
    dresidual.
    """
    dz, dweight, dbias = _layer_norm_grads(dy, residual_out, weight, mean, rstd)
    if dresidual_out is not None:
        dz = dz + _wide(dresidual_out)
    dz = dz.to(residual_out.dtype)
    dx = dz.new_empty(0) if seed is None else dropout(dz, seed, dropout_p)
    return dx, dz, _parameter_grad(dweight, weight), _parameter_grad(dbias, bias)


# ---- gelu ----------------------------------------------------------------------------------------


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    return _wide(x) if bias is None else _wide(x) + bias


def gelu_forward(x, bias, approximate):
    u = _biased(x, bias)
    return torch.nn.functional.gelu(u, approximate=approximate).to(x.dtype)


def gelu_backward(dy, x, bias, approximate):
    """(dx, dbias); dbias is empty where there is no bias."""
    grad = torch.ops.aten.gelu_backward(_wide(dy), _biased(x, bias), approximate=approximate)
    if bias is None:
        return grad.to(x.dtype), grad.new_empty(0)
    return grad.to(x.dtype), _sum_of_rows(grad).to(bias.dtype)


# ---- cross_entropy -------------------------------------------------------------------------------


def _capped(logits: Tensor, softcap: float) -> Tensor:
    z = _wide(logits)
    return softcap * torch.tanh(z / softcap) if softcap else z


def cross_entropy_forward(
    logits, target, weight, ignore_index, label_smoothing, lse_square_scale, softcap, dloss
):
    """(loss, lse, dlogits), loss and float64 lse (rows). dlogits, the gradient of
    dloss * loss.sum(), is empty where dloss is None.
    """
    z = _capped(logits, softcap)
    lse = z.double().logsumexp(-1)  # float64: differences with large logits are taken of it
    ignored = target == ignore_index
    safe = target.masked_fill(ignored, 0)[:, None]
    w = z.new_ones(z.shape[1]) if weight is None else weight
    hard = w[safe[:, 0]] * (lse - z.gather(1, safe)[:, 0])
    loss = (1 - label_smoothing) * hard + lse_square_scale * lse.square()
    if label_smoothing:  # else a logit of -inf would add 0 * inf
        loss = loss + label_smoothing / z.shape[1] * (w.sum() * lse - (z * w).sum(-1))
    loss = loss.masked_fill(ignored, 0).to(z.dtype)
    if dloss is None:
        return loss, lse, logits.new_empty(0)
    options = (ignore_index, label_smoothing, lse_square_scale, softcap)
    return (
        loss,
        lse,
        cross_entropy_backward(torch.full_like(loss, dloss), logits, target, weight, lse, *options),
    )


def cross_entropy_backward(
    dloss, logits, target, weight, lse, ignore_index, label_smoothing, lse_square_scale, softcap
):
    """dlogits, like logits; dloss (rows)."""
    z = _capped(logits, softcap)
    ignored = target == ignore_index
    safe = target.masked_fill(ignored, 0)[:, None]
    w = z.new_ones(z.shape[1]) if weight is None else weight
    hard, smooth = (1 - label_smoothing) * w[safe], label_smoothing / z.shape[1]
    slope = hard + smooth * w.sum() + 2 * lse_square_scale * lse[:, None]
    # Not exp(z - lse): an lse near 100, rounded, would be wrong by 4e-6, and so would all of this.
    grad = z.softmax(-1) * slope - smooth * w
    grad = grad.scatter_add(1, safe, -hard.to(grad.dtype))
    if softcap:
        grad = grad * (1 - (z / softcap).square())
    return (grad * dloss.masked_fill(ignored, 0)[:, None]).to(logits.dtype)


# ---- attention -----------------------------------------------------------------------------------
#
# q, k, v are (batch, sequence, heads, head_dim), or (tokens, heads, head_dim) with the offsets
# cu_seqlens of the sequences that are packed one after the other; those are one batch here whose
# mask keeps sequences apart.


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
    queries, keys, values = (_wide(t) for t in _batched(q, k, v))
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
    dout, queries, keys, values, o = (_wide(t) for t in _batched(dout, q, k, v, o))
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
