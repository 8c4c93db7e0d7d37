"""Scaled dot-product attention (Vaswani et al. 2017) in blocks with online softmax (Dao et al. 2022)."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import memory, reference
from ..backend import choose, where
from .define import check_probability, define, draw_seed, statistics_like

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


def _append(kernels, k_cache, v_cache, k, v, cache_seqlens):
    kernels.cache_append(k_cache, v_cache, k, v, cache_seqlens, where(k))


# ---- schema and fake ----

_OPTIONS = "int max_q, int max_k, float softmax_scale, float softcap, int window_left, int window_right, float dropout_p"

attention_forward = define(
    "attention_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqlens_k, Tensor? seed,"
    f" {_OPTIONS}, str backend) -> (Tensor, Tensor)",
    op="attention",
    reference=reference.attention_forward,
    native=_forward,
)
attention_backward = define(
    "attention_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
    f" Tensor? seed, {_OPTIONS}, str backend) -> (Tensor, Tensor, Tensor)",
    op="attention",
    reference=reference.attention_backward,
    native=_backward,
)
cache_append = define(
    "cache_append",
    "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor cache_seqlens, str backend) -> ()",
    op="attention_with_kvcache",
    reference=reference.cache_append,
    native=_append,
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
            _last_dim_contiguous(dout), *ctx.saved_tensors, *ctx.options, ctx.backend
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
        q: (batch, queries, heads, head_dim); k, v: (batch, keys, kv_heads, head_dim), kv_heads a divisor of heads.
            Or packed: (tokens, heads, head_dim) with cu_seqlens_q, cu_seqlens_k, int32 (batch + 1) offsets.
            float32, bfloat16 or float64; any strides with a contiguous last dimension.
        causal: aligned at the bottom right: query i sees key j <= i + keys - queries.
        softmax_scale: None is 1 / sqrt(head_dim).
        window_size: (left, right) keys seen beside that position; -1 is no bound.
        softcap: scores are softcap * tanh(scores / softcap); 0 is none.
        dropout_p, seed: dropout of the probabilities; see ops.dropout.
        max_seqlen_q, max_seqlen_k: longest packed sequences; computed when None.
        return_lse: also return the log-sum-exp of the scores, float32, (batch, heads, queries) or (heads, tokens).
    Returns: like q, or (like q, lse). A query that sees no key gives 0 and lse = -inf.
    Raises: ValueError naming the argument that does not fit. The second derivative is refused.
    """
    _check_shapes("attention", q, k, v, packed=cu_seqlens_q is not None)
    check_probability("attention", "dropout_p", dropout_p)
    backend = choose("attention", q)
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
        *_options(q, causal, softmax_scale, window_size, softcap),
        dropout_p,
    )
    q, k, v = (_last_dim_contiguous(t) for t in (q, k, v))
    o, lse = _Attention.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, seed, options, backend)
    return (o, lse) if return_lse else o


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
    """Attention of new queries over a cache of keys and values, after appending theirs to it in place.

    Args:
        q: (batch, queries, heads, head_dim). k_cache, v_cache: (batch, capacity, kv_heads, head_dim).
        k, v: (batch, new, kv_heads, head_dim), written at cache_seqlens; None where the cache holds all.
        cache_seqlens: keys in use of each sequence before the append, int32 (batch), or one int for all.
        The rest is as for `attention`.
    Returns: like q. There is no backward.
    Raises: IndexError where a cache has no room, ValueError where shapes do not fit.
    """
    _check_shapes("attention_with_kvcache", q, k_cache, v_cache, packed=False)
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
            _check_shapes("attention_with_kvcache", q, k, v, packed=False)
            backend = choose("attention_with_kvcache", k_cache)
            cache_append(
                k_cache,
                v_cache,
                _last_dim_contiguous(k),
                _last_dim_contiguous(v),
                cache_seqlens,
                backend,
            )
            cache_seqlens = cache_seqlens + k.shape[1]
        options = (0, 0, *_options(q, causal, softmax_scale, window_size, softcap), 0.0)
        q = _last_dim_contiguous(q)
        seqlens = cache_seqlens.to(torch.int32)
        return attention_forward(
            q, k_cache, v_cache, None, None, seqlens, None, *options, choose("attention", q)
        )[0]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention on fastlm's kernels.

    Args: as for torch; query (batch, heads, queries, head_dim), key and value alike; is_causal is aligned at the top left.
    Returns: like query. Calls with a mask or in other forms run on torch's own function; `explain` says so.
    Raises: what torch's function raises.
    """
    form = _sdpa_form(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if form is not None:
        choose("attention", query, form)
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return attention(q, k, v, causal=is_causal, softmax_scale=scale, dropout_p=dropout_p).transpose(
        1, 2
    )


def _options(q, causal, softmax_scale, window_size, softcap):
    left, right = window_size
    if causal:
        right = 0
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return scale, softcap, left, right


def _last_dim_contiguous(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _check_shapes(op: str, q: Tensor, k: Tensor, v: Tensor, *, packed: bool) -> None:
    dims, layout = (
        (3, "(tokens, heads, head_dim)") if packed else (4, "(batch, sequence, heads, head_dim)")
    )
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != dims or t.dtype != q.dtype or t.device != q.device:
            raise ValueError(
                f"{op}: {name}: expected {layout} of {q.dtype} on {q.device}, got {tuple(t.shape)} {t.dtype} on {t.device}"
            )
    if k.shape[:-1] != v.shape[:-1] or not k.shape[-1] == v.shape[-1] == q.shape[-1]:
        raise ValueError(
            f"{op}: k, v: expected equal shapes with q's head_dim {q.shape[-1]}, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"{op}: k: expected a number of heads that divides q's {q.shape[-2]}, got {k.shape[-2]}"
        )
    if not packed and k.shape[0] != q.shape[0]:
        raise ValueError(f"{op}: k: expected q's batch {q.shape[0]}, got {k.shape[0]}")


def _longest(name: str, cu_seqlens: Tensor | None, tokens: Tensor, longest: int | None) -> int:
    """The longest packed sequence; on the CPU the offsets are checked too, elsewhere that would wait for the device."""
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


def _sdpa_form(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    if attn_mask is not None:
        return "an attention mask"
    if not query.dim() == key.dim() == value.dim() == 4:
        return "anything but four dimensions"
    if (
        query.shape[0] != key.shape[0]
        or key.shape[:-1] != value.shape[:-1]
        or query.shape[-1] != value.shape[-1]
    ):
        return "batches, lengths or head dims that differ"
    if is_causal and query.shape[2] != key.shape[2]:
        return "a top-left causal mask of unequal lengths"
    if query.shape[1] != key.shape[1] and not enable_gqa:
        return "unequal heads without enable_gqa"
    if not 0 <= dropout_p <= 1 or query.dtype != key.dtype or query.dtype != value.dtype:
        return "what torch refuses"
    return None


def _no_form(*args, **kwargs):
    return None


FORMS = {
    attention: _no_form,
    attention_with_kvcache: _no_form,
    scaled_dot_product_attention: _sdpa_form,
}
