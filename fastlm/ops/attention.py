"""Attention (Vaswani et al. 2017), in blocks with online softmax (Dao et al. 2022)."""

import functools

import torch
from torch import Tensor

from .. import memory, reference
from ..backend import choose, where
from .attention_arguments import (
    check_shapes,
    checked_longest,
    checked_mask,
    checked_slopes,
    last_dim_contiguous,
    position_options,
    widest,
)
from .autograd import differentiable
from .define import check_probability, contiguous_like, define, draw_seed

# ---- implementation ----


def _output_like(q: Tensor, v: Tensor) -> Tensor:
    return memory.empty((*q.shape[:-1], v.shape[-1]), q.dtype, q.device)


def _lse_like(q: Tensor) -> Tensor:
    shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    return torch.empty(shape, dtype=torch.float64, device=q.device)


def _forward(kernels, q, k, v, *options):
    o, lse = _output_like(q, v), _lse_like(q)
    kernels.attention_forward(o, lse, q, k, v, kernels.AttentionOptions(*options), where(q))
    return o, lse


def _backward(kernels, dout, dlse, q, k, v, o, lse, cu_q, cu_k, *options):
    dq, dk, dv = (memory.empty_like(t) for t in (q, k, v))
    bundle = kernels.AttentionOptions(cu_q, cu_k, None, *options)
    kernels.attention_backward(dq, dk, dv, dout, dlse, q, k, v, o, lse, bundle, where(q))
    return dq, dk, dv


# ---- schema and fake ----

_OPTIONS = (
    "Tensor? attn_mask, Tensor? alibi_slopes, Tensor? seed, int max_q, int max_k,"
    " float softmax_scale, float softcap, int window_left, int window_right, float dropout_p"
)


def _forward_fake(q, k, v, *_):
    return q.new_empty((*q.shape[:-1], v.shape[-1])), _lse_like(q)


attention_forward = define(
    "attention_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
    f" Tensor? seqlens_k, {_OPTIONS}, str backend) -> (Tensor, Tensor)",
    op="attention",
    reference=reference.attention_forward,
    native=_forward,
    fake=_forward_fake,
)
attention_backward = define(
    "attention_backward",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse,"
    f" Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, {_OPTIONS}, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    op="attention",
    reference=reference.attention_backward,
    native=_backward,
    fake=lambda dout, dlse, *qkv_and_more: tuple(contiguous_like(t) for t in qkv_and_more[:3]),
)

# ---- autograd ----


def _keep(ctx, inputs, output):
    q, k, v, cu_q, cu_k, _, attn_mask, alibi_slopes, seed, *ctx.options, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k, attn_mask, alibi_slopes, seed)
    # lse is seldom an output that a loss depends on.
    ctx.set_materialize_grads(False)


def _gradients(ctx, saved, dout, dlse):
    o = saved[3]
    dout = torch.zeros_like(o) if dout is None else last_dim_contiguous(dout)
    dlse = None if dlse is None else dlse.contiguous()
    grads = attention_backward(dout, dlse, *saved, *ctx.options, ctx.backend)
    return *grads, *(None,) * 14


_attention = differentiable(
    attention_forward, _keep, _gradients, reference=reference.attention_forward, outputs=2
)


# ---- public ----


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float | None = 0.0,
    attn_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
):
    """softmax(softmax_scale * q k^T) v, with flash-attention's layout and conventions.

    Args:
        q: (batch, queries, heads, head_dim); k: (batch, keys, kv_heads, head_dim); v: (batch, keys,
            kv_heads, value_head_dim); kv_heads a divisor of heads.
            Or packed: (tokens, heads, head_dim) with cu_seqlens_q, cu_seqlens_k, int32 (batch + 1)
                offsets.
            float32, bfloat16 or float64; any strides with a contiguous last dimension.
        causal: aligned at the bottom right: query i sees key j <= i + keys - queries.
        softmax_scale: None is 1 / sqrt(head_dim).
        window_size: (left, right) keys seen beside that position; -1 or None is no bound.
        softcap: scores are softcap * tanh(scores / softcap); 0, None and inf are none.
        attn_mask: broadcastable to (batch, heads, queries, keys); bool, True where a query may see
            a key, or floating-point, added to the scores after the softcap. Not for packed
            sequences. A call with a mask that needs a gradient runs on the reference.
        alibi_slopes: (heads) or (batch, heads); -slope * |i + keys - queries - j| is added to the
            score of query i and key j (Press et al. 2022).
        dropout_p, seed: dropout of the probabilities; see ops.dropout.
        max_seqlen_q, max_seqlen_k: longest packed sequences; computed when None.
        return_lse: also return the log-sum-exp of the scores, float32 (float64 for float64),
            (batch, heads, queries) or (heads, tokens). It can be differentiated.
    Returns: q's shape with v's last dimension, or that and lse. A query that sees no key gives 0
        and lse = -inf.
    Raises: ValueError naming the argument that does not fit. The second derivative is refused.
    """
    packed = cu_seqlens_q is not None
    check_shapes("attention", q, k, v, packed=packed)
    check_probability("attention", "dropout_p", dropout_p)
    q, k, v = (last_dim_contiguous(t) for t in (q, k, v))
    position = position_options("attention", q, causal, softmax_scale, window_size, softcap)
    if packed and attn_mask is not None:
        raise ValueError("attention: attn_mask: expected None with cu_seqlens_q, got a tensor")
    mask = checked_mask("attention", attn_mask, q, k)
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    slopes = checked_slopes("attention", alibi_slopes, batch, q.shape[-2])
    call = {
        "softmax_scale": softmax_scale, "softcap": softcap, "dropout_p": dropout_p,
        "cu_seqlens_q": cu_seqlens_q, "attn_mask": attn_mask, "alibi_slopes": alibi_slopes,
    }  # fmt: skip
    needs = functools.partial(needs_of, q, k, v, **call)
    backend = choose("attention", widest(q, v), _form(q, k, v, attn_mask=attn_mask), needs)
    if packed:
        max_seqlen_q = checked_longest("cu_seqlens_q", cu_seqlens_q, q, max_seqlen_q)
        max_seqlen_k = checked_longest("cu_seqlens_k", cu_seqlens_k, k, max_seqlen_k)
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = draw_seed(q)
    cu_q, cu_k = (None if t is None else t.contiguous() for t in (cu_seqlens_q, cu_seqlens_k))
    arguments = (
        q, k, v, cu_q, cu_k, None, mask, slopes, seed, max_seqlen_q or 0, max_seqlen_k or 0,
        *position, dropout_p,
    )  # fmt: skip
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        o, lse = reference.attention_forward(*arguments)
    else:
        o, lse = _attention(*arguments, backend)
    return (o, lse.to(reference.accumulation_dtype(q))) if return_lse else o


def needs_of(
    q, k=None, v=None, *, softmax_scale=None, softcap=0.0, dropout_p=0.0, cu_seqlens_q=None,
    attn_mask=None, alibi_slopes=None, **_,
) -> list[str]:  # fmt: skip
    """What a call needs that not every kernel takes: backend.py's table knows it by these names."""
    needs = {
        "softcap": bool(softcap) and softcap != float("inf"),
        "dropout": dropout_p > 0,
        "packed sequences": cu_seqlens_q is not None,
        "an attention mask": attn_mask is not None,
        "ALiBi": alibi_slopes is not None,
        "values of another head_dim": v is not None and v.shape[-1] != q.shape[-1],
        "a softmax_scale that is not positive": softmax_scale is not None and softmax_scale <= 0,
        "rows that do not begin at multiples of 16 bytes": not all(
            rows_begin_at_16_bytes(t) for t in (q, k, v) if t is not None
        ),
    }
    return [name for name, needed in needs.items() if needed]


def rows_begin_at_16_bytes(t: Tensor) -> bool:
    """Whether TMA can describe a tensor whose memory begins at such an address."""
    step = 16 // t.element_size()
    *places, _ = zip(t.stride(), t.shape, strict=True)
    apart = all(n == 1 or (stride > 0 and stride % step == 0) for stride, n in places)
    return apart and t.shape[-1] % step == 0 and t.storage_offset() % step == 0


def _form(*args, attn_mask=None, **kwargs):
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        return "an attention mask that needs a gradient"
    return None


FORMS = {attention: _form}
NEEDS = {attention: needs_of}
