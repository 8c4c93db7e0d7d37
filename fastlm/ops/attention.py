"""Attention (Vaswani et al. 2017), in blocks with online softmax (Dao et al. 2022)."""

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import memory, reference
from ..backend import choose, where
from .define import check_probability, contiguous_like, define, draw_seed, statistics_like

# ---- implementation ----


def _lse_like(q: Tensor) -> Tensor:
    return statistics_like(q, (*q.shape[:-3], q.shape[-2], q.shape[-3]))


def _forward(kernels, q, k, v, cu_q, cu_k, seqlens_k, seed, *options):
    o, lse = memory.empty_like(q), _lse_like(q)
    bundle = kernels.AttentionOptions(cu_q, cu_k, seqlens_k, seed, *options)
    kernels.attention_forward(o, lse, q, k, v, bundle, where(q))
    return o, lse


def _backward(kernels, dout, q, k, v, o, lse, cu_q, cu_k, seed, *options):
    dq, dk, dv = (memory.empty_like(t) for t in (q, k, v))
    bundle = kernels.AttentionOptions(cu_q, cu_k, None, seed, *options)
    kernels.attention_backward(dq, dk, dv, dout, q, k, v, o, lse, bundle, where(q))
    return dq, dk, dv


# ---- schema and fake ----

_OPTIONS = (
    "int max_q, int max_k, float softmax_scale, float softcap,"
    " int window_left, int window_right, float dropout_p"
)

attention_forward = define(
    "attention_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
    f" Tensor? seqlens_k, Tensor? seed, {_OPTIONS}, str backend) -> (Tensor, Tensor)",
    op="attention",
    reference=reference.attention_forward,
    native=_forward,
    fake=lambda q, *_: (contiguous_like(q), _lse_like(q)),
)
attention_backward = define(
    "attention_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse,"
    f" Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seed, {_OPTIONS}, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    op="attention",
    reference=reference.attention_backward,
    native=_backward,
    fake=lambda dout, *qkv_and_more: tuple(contiguous_like(t) for t in qkv_and_more[:3]),
)
# ---- autograd ----


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, seed, options, backend):
        o, lse = attention_forward(q, k, v, cu_q, cu_k, None, seed, *options, backend)
        ctx.save_for_backward(q, k, v, o, lse, cu_q, cu_k, seed)
        ctx.mark_non_differentiable(lse)
        ctx.options, ctx.backend = options, backend
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        grads = attention_backward(
            last_dim_contiguous(dout), *ctx.saved_tensors, *ctx.options, ctx.backend
        )
        return *grads, None, None, None, None, None


# ---- public ----


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
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
        q: (batch, queries, heads, head_dim); k, v: (batch, keys, kv_heads, head_dim), kv_heads a
            divisor of heads.
            Or packed: (tokens, heads, head_dim) with cu_seqlens_q, cu_seqlens_k, int32 (batch + 1)
                offsets.
            float32, bfloat16 or float64; any strides with a contiguous last dimension.
        causal: aligned at the bottom right: query i sees key j <= i + keys - queries.
        softmax_scale: None is 1 / sqrt(head_dim).
        window_size: (left, right) keys seen beside that position; -1 is no bound.
        softcap: scores are softcap * tanh(scores / softcap); 0 is none.
        dropout_p, seed: dropout of the probabilities; see ops.dropout.
        max_seqlen_q, max_seqlen_k: longest packed sequences; computed when None.
        return_lse: also return the log-sum-exp of the scores, float32, (batch, heads, queries) or
            (heads, tokens).
    Returns: like q, or (like q, lse). A query that sees no key gives 0 and lse = -inf.
    Raises: ValueError naming the argument that does not fit. The second derivative is refused.
    """
    check_shapes("attention", q, k, v, packed=cu_seqlens_q is not None)
    check_probability("attention", "dropout_p", dropout_p)
    q, k, v = (last_dim_contiguous(t) for t in (q, k, v))
    needs = functools.partial(
        needs_of, q, k, v, softmax_scale=softmax_scale, softcap=softcap, dropout_p=dropout_p,
        cu_seqlens_q=cu_seqlens_q,
    )  # fmt: skip
    backend = choose("attention", q, needs=needs)
    if cu_seqlens_q is not None:
        max_seqlen_q = _longest("cu_seqlens_q", cu_seqlens_q, q, max_seqlen_q)
        max_seqlen_k = _longest("cu_seqlens_k", cu_seqlens_k, k, max_seqlen_k)
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = draw_seed(q.device)
    options = (
        max_seqlen_q or 0,
        max_seqlen_k or 0,
        *position_options(q, causal, softmax_scale, window_size, softcap),
        dropout_p,
    )
    cu_q, cu_k = (None if t is None else t.contiguous() for t in (cu_seqlens_q, cu_seqlens_k))
    o, lse = _Attention.apply(q, k, v, cu_q, cu_k, seed, options, backend)
    return (o, lse) if return_lse else o


def position_options(q, causal, softmax_scale, window_size, softcap):
    left, right = window_size
    if causal:
        right = 0
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return scale, softcap, left, right


def needs_of(
    q, k=None, v=None, *, softmax_scale=None, softcap=0.0, dropout_p=0.0, cu_seqlens_q=None, **_
) -> list[str]:
    """What a call needs that not every kernel takes: backend.py's table knows it by these names."""
    needs = {
        "softcap": softcap > 0,
        "dropout": dropout_p > 0,
        "packed sequences": cu_seqlens_q is not None,
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


def last_dim_contiguous(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def check_shapes(op: str, q: Tensor, k: Tensor, v: Tensor, *, packed: bool) -> None:
    dims, layout = (
        (3, "(tokens, heads, head_dim)") if packed else (4, "(batch, sequence, heads, head_dim)")
    )
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != dims or t.dtype != q.dtype or t.device != q.device:
            raise ValueError(
                f"{op}: {name}: expected {layout} of {q.dtype} on {q.device}, "
                f"got {tuple(t.shape)} {t.dtype} on {t.device}"
            )
    if k.shape[:-1] != v.shape[:-1] or not k.shape[-1] == v.shape[-1] == q.shape[-1]:
        raise ValueError(
            f"{op}: k, v: expected equal shapes with q's head_dim {q.shape[-1]}, "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"{op}: k: expected a number of heads that divides q's {q.shape[-2]}, got {k.shape[-2]}"
        )
    if not packed and k.shape[0] != q.shape[0]:
        raise ValueError(f"{op}: k: expected q's batch {q.shape[0]}, got {k.shape[0]}")


def _longest(name: str, cu_seqlens: Tensor | None, tokens: Tensor, longest: int | None) -> int:
    """The longest packed sequence; on the CPU the offsets are checked too, elsewhere that would
    wait for the device.
    """
    if cu_seqlens is None or cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1:
        raise ValueError(f"attention: {name}: expected int32 (batch + 1) offsets, got {cu_seqlens}")
    if torch.compiler.is_compiling() and longest is not None:
        return longest
    if cu_seqlens.device.type != "cpu" and longest is not None:
        return longest
    lengths = cu_seqlens.diff()
    found = int(lengths.max()) if lengths.numel() else 0
    fits = (
        int(cu_seqlens[0]) == 0
        and int(cu_seqlens[-1]) == tokens.shape[0]
        and bool((lengths >= 0).all())
    )
    if not fits or (longest is not None and longest < found):
        raise ValueError(
            f"attention: {name}: expected offsets that rise from 0 to {tokens.shape[0]} by at most "
            f"{found if longest is None else longest}, got {cu_seqlens.tolist()}"
        )
    return found if longest is None else longest


def _form(*args, **kwargs):
    return None


FORMS = {attention: _form}
NEEDS = {attention: needs_of}
