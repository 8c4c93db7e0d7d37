"""The arguments of attention: what they are for a kernel, and which are refused."""

import torch
from torch import Tensor

from .. import reference
from .define import check_floating, checked_softcap

# No sequence is longer than such a window; a larger one would overflow positions.
_UNBOUNDED = 2**30


def position_options(
    op: str, q: Tensor, causal: bool, softmax_scale, window_size, softcap
) -> tuple[float, float, int, int]:
    """(softmax_scale, softcap, window_left, window_right) as kernels take them: -1 is no bound."""
    left, right = (-1 if w is None or w < 0 or w >= _UNBOUNDED else int(w) for w in window_size)
    scale = max(q.shape[-1], 1) ** -0.5 if softmax_scale is None else softmax_scale
    return scale, checked_softcap(op, softcap), left, 0 if causal else right


def checked_mask(op: str, attn_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask of (batch, heads, queries, keys), without a copy: uint8 for bool, or floating-point.

    Raises ValueError for another dtype or a shape that cannot be broadcast.
    """
    if attn_mask is None:
        return None
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise ValueError(
            f"{op}: attn_mask: expected bool or a floating-point dtype, got {attn_mask.dtype}"
        )
    if attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.view(torch.uint8)
    elif attn_mask.dtype not in (q.dtype, torch.float32):
        attn_mask = attn_mask.to(reference.accumulation_dtype(q))
    try:
        return attn_mask.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{op}: attn_mask: expected a shape that broadcasts to (batch, heads, queries, keys) = "
            f"{shape}, got {tuple(attn_mask.shape)}"
        ) from None


def checked_slopes(op: str, slopes: Tensor | None, batch: int, heads: int) -> Tensor | None:
    """ALiBi's slopes, contiguous float32. Raises ValueError for a shape that does not fit."""
    if slopes is None:
        return None
    if slopes.shape not in ((heads,), (batch, heads)):
        raise ValueError(
            f"{op}: alibi_slopes: expected (heads) = {(heads,)} or (batch, heads) = "
            f"{(batch, heads)}, got {tuple(slopes.shape)}"
        )
    return slopes.to(torch.float32).contiguous()


def last_dim_contiguous(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def widest(q: Tensor, v: Tensor) -> Tensor:
    """The one that a kernel's largest head_dim is compared with."""
    return v if v.shape[-1] > q.shape[-1] else q


def check_shapes(op: str, q: Tensor, k: Tensor, v: Tensor, *, packed: bool) -> None:
    dims, layout = (
        (3, "(tokens, heads, head_dim)") if packed else (4, "(batch, sequence, heads, head_dim)")
    )
    check_floating(op, "q", q)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != dims or t.dtype != q.dtype or t.device != q.device:
            raise ValueError(
                f"{op}: {name}: expected {layout} of {q.dtype} on {q.device}, "
                f"got {tuple(t.shape)} {t.dtype} on {t.device}"
            )
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"{op}: k, v: expected equal shapes but for head_dim, "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{op}: k: expected q's head_dim {q.shape[-1]}, got {k.shape[-1]}")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"{op}: k: expected a number of heads that divides q's {q.shape[-2]}, got {k.shape[-2]}"
        )
    if not packed and k.shape[0] != q.shape[0]:
        raise ValueError(f"{op}: k: expected q's batch {q.shape[0]}, got {k.shape[0]}")


def checked_longest(
    name: str, cu_seqlens: Tensor | None, tokens: Tensor, longest: int | None
) -> int:
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
