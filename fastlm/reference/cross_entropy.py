"""cross_entropy and linear_cross_entropy."""

import torch
from torch import Tensor

from .linear import linear
from .precision import wide


def _capped(logits: Tensor, softcap: float) -> Tensor:
    z = wide(logits)
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


def _logits(x, linear_weight, linear_bias):
    return linear(wide(x), wide(linear_weight), None if linear_bias is None else wide(linear_bias))


def linear_cross_entropy_forward(
    x, linear_weight, linear_bias, target, weight,
    ignore_index, label_smoothing, lse_square_scale, softcap,
):  # fmt: skip
    """(loss, lse) as of cross_entropy_forward, for logits x @ linear_weight.t() + linear_bias."""
    options = (ignore_index, label_smoothing, lse_square_scale, softcap, None)
    return cross_entropy_forward(_logits(x, linear_weight, linear_bias), target, weight, *options)[
        :2
    ]


def linear_cross_entropy_backward(
    dloss, x, linear_weight, linear_bias, target, weight, lse,
    input_grad, linear_weight_grad, linear_bias_grad, *options,
):  # fmt: skip
    """(dx, dlinear_weight, dlinear_bias); empty where they are not wanted."""
    logits = _logits(x, linear_weight, linear_bias)
    dlogits = cross_entropy_backward(dloss, logits, target, weight, lse, *options)
    nothing = x.new_empty(0)
    return (
        (dlogits @ wide(linear_weight)).to(x.dtype) if input_grad else nothing,
        (dlogits.t() @ wide(x)).to(x.dtype) if linear_weight_grad else nothing,
        dlogits.sum(0).to(x.dtype) if linear_bias_grad else nothing,
    )


def linear_cross_entropy_gradients(
    dloss, x, linear_weight, linear_bias, target, weight,
    input_grad, linear_weight_grad, linear_bias_grad, *options,
):  # fmt: skip
    """(loss, lse, dx, dlinear_weight, dlinear_bias) of sum(dloss * loss); gradients are empty where
    they are not wanted.
    """
    inputs = x, linear_weight, linear_bias, target, weight
    loss, lse = linear_cross_entropy_forward(*inputs, *options)
    wanted = input_grad, linear_weight_grad, linear_bias_grad
    return loss, lse, *linear_cross_entropy_backward(dloss, *inputs, lse, *wanted, *options)
