"""layer_norm, add_layer_norm and rms_norm."""

from torch import Tensor

from .elementwise import dropout, factors_like
from .precision import sum_of_rows, wide


def layer_norm_forward(x, weight, bias, eps):
    """(y, mean, rstd); mean and rstd have x's shape without the last dimension."""
    full = wide(x)
    mean = full.mean(-1)
    # What the mean was rounded by is all that a constant row differs from it.
    rest = (full - mean[..., None]).mean(-1)
    centered = (full - mean[..., None]) - rest[..., None]
    rstd = (centered.square().mean(-1) + eps).rsqrt()
    y = centered * rstd[..., None]
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype), mean + rest, rstd


def _layer_norm_grads(dy, x, weight, mean, rstd):
    """dx, dweight, dbias, all wide."""
    dy, h = wide(dy), (wide(x) - mean[..., None]) * rstd[..., None]
    g = dy if weight is None else dy * weight
    dx = rstd[..., None] * (g - g.mean(-1, keepdim=True) - h * (g * h).mean(-1, keepdim=True))
    return dx, sum_of_rows(dy * h), sum_of_rows(dy)


def layer_norm_backward(dy, x, weight, bias, mean, rstd):
    """(dx, dweight, dbias); the last two are empty where there is no weight or bias."""
    dx, dweight, dbias = _layer_norm_grads(dy, x, weight, mean, rstd)
    return dx.to(x.dtype), _parameter_grad(dweight, weight), _parameter_grad(dbias, bias)


def _parameter_grad(grad: Tensor, parameter: Tensor | None) -> Tensor:
    return grad.new_empty(0) if parameter is None else grad.to(parameter.dtype)


def add_layer_norm_forward(x, residual, weight, bias, seed, eps, dropout_p):
    """(y, residual_out, mean, rstd)."""
    kept = wide(x) if seed is None else wide(x) * factors_like(x, seed, dropout_p)
    residual_out = (kept + wide(residual)).to(x.dtype)
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
        dz = dz + wide(dresidual_out)
    dz = dz.to(residual_out.dtype)
    dx = dz.new_empty(0) if seed is None else dropout(dz, seed, dropout_p)
    return dx, dz, _parameter_grad(dweight, weight), _parameter_grad(dbias, bias)


def rms_norm_forward(x, weight, eps):
    """(y, rstd); rstd has x's shape without the last dimension."""
    rstd = (wide(x).square().mean(-1) + eps).rsqrt()
    y = wide(x) * rstd[..., None]
    return (y if weight is None else y * weight).to(x.dtype), rstd


def rms_norm_backward(dy, x, weight, rstd):
    """(dx, dweight); dweight is empty where there is no weight."""
    dy, h = wide(dy), wide(x) * rstd[..., None]
    g = dy if weight is None else dy * weight
    dx = rstd[..., None] * (g - h * (g * h).mean(-1, keepdim=True))
    return dx.to(x.dtype), _parameter_grad(sum_of_rows(dy * h), weight)
