"""torch's front to `attention`: its layout, its arguments, and torch itself for its other forms."""

import torch
from torch import Tensor

from ..backend import choose
from .attention import attention, needs_of

# ---- public ----


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

    Args: as for torch; query (batch, heads, queries, head_dim), key and value alike; attn_mask is
        bool, True where a query may see a key, or added to the scores; is_causal is aligned at the
        top left.
    Returns: like query, with value's last dimension. Under autocast in its dtype, as torch's. Calls
        in other forms run on torch's own function; `explain` says so.
    Raises: what torch's function raises.
    """
    query, key, value = (_autocast(t) for t in (query, key, value))
    attn_mask = None if attn_mask is None else _autocast(attn_mask)
    form = _form(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if form is not None:
        choose("attention", query, form)
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    o = attention(
        q, k, v, causal=is_causal, softmax_scale=scale, attn_mask=attn_mask, dropout_p=dropout_p
    )
    return o.transpose(1, 2)


def _autocast(t: Tensor) -> Tensor:
    """`t` in the dtype that autocast gives torch's function."""
    device = t.device.type
    narrowed = t.is_floating_point() and t.dtype != torch.float64 and device in ("cpu", "cuda")
    if not narrowed or not torch.is_autocast_enabled(device):
        return t
    return t.to(torch.get_autocast_dtype(device))


def _form(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    if attn_mask is not None and _mask_form(query, key, attn_mask, is_causal) is not None:
        return _mask_form(query, key, attn_mask, is_causal)
    if not query.dim() == key.dim() == value.dim() == 4:
        return "anything but four dimensions"
    if (
        query.shape[0] != key.shape[0]
        or key.shape[:-1] != value.shape[:-1]
        or query.shape[-1] != key.shape[-1]
    ):
        return "batches, lengths or head dims that differ"
    if is_causal and query.shape[2] != key.shape[2]:
        return "a top-left causal mask of unequal lengths"
    if query.shape[1] != key.shape[1] and not enable_gqa:
        return "unequal heads without enable_gqa"
    of_one_kind = (
        (query.dtype, query.device) == (key.dtype, key.device) == (value.dtype, value.device)
    )
    heads_fit = key.shape[1] > 0 and query.shape[1] % key.shape[1] == 0
    floating = query.is_floating_point() and query.dtype.itemsize > 1
    if not 0 <= dropout_p <= 1 or not of_one_kind or not heads_fit or not floating:
        return "what torch refuses"
    return None


def _mask_form(query, key, attn_mask, is_causal) -> str | None:
    """Why a call with this mask is not for attention's kernels, or None."""
    if attn_mask.requires_grad and torch.is_grad_enabled():
        return "an attention mask that needs a gradient"
    known = attn_mask.dtype in (torch.bool, query.dtype, torch.float32)
    shape = (*query.shape[:-1], key.shape[-2])
    fits = all(n in (1, m) for n, m in zip(attn_mask.shape[::-1], shape[::-1], strict=False))
    if not known or not fits or attn_mask.dim() > 4 or is_causal:
        return "what torch refuses"
    return None


def _needs_of(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return needs_of(q, k, v, softmax_scale=scale, dropout_p=dropout_p, attn_mask=attn_mask)


FORMS = {scaled_dot_product_attention: _form}
NEEDS = {scaled_dot_product_attention: _needs_of}
