"""dropout and gelu."""

import torch
from torch import Tensor

from ..philox import dropout_factors
from .precision import accumulation_dtype, sum_of_rows, wide


def factors_like(x: Tensor, seed: Tensor, p: float) -> Tensor:
    columns = x.shape[-1] if x.dim() else 1
    rows = x.numel() // columns if columns else 0
    row = torch.arange(rows, device=x.device)
    return dropout_factors(seed, row, columns, p, accumulation_dtype(x)).view(x.shape)


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return (wide(x) * factors_like(x, seed, p)).to(x.dtype)


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    return wide(x) if bias is None else wide(x) + bias


def gelu_forward(x, bias, approximate):
    u = _biased(x, bias)
    return torch.nn.functional.gelu(u, approximate=approximate).to(x.dtype)


def gelu_backward(dy, x, bias, approximate):
    """(dx, dbias); dbias is empty where there is no bias."""
    u = _biased(x, bias)
    # Far out the slope is 0 or 1, but torch's formula overflows. Infinity gives NaN, as in torch.
    u = u.clamp(-1e4, 1e4) + (u - u)
    grad = torch.ops.aten.gelu_backward(wide(dy), u, approximate=approximate)
    if bias is None:
        return grad.to(x.dtype), grad.new_empty(0)
    return grad.to(x.dtype), sum_of_rows(grad).to(bias.dtype)
