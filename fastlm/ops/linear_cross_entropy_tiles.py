"""linear_cross_entropy on the CPU: one kernel, over tiles of classes."""

import torch

from .. import memory
from ..backend import where
from .define import statistics_like


def forward(kernels, x, linear_weight, linear_bias, target, weight, options):
    """(loss, lse), nothing kept."""
    loss, lse = _results(x, target)
    inputs = x, linear_weight, linear_bias, target, weight
    kernels.linear_cross_entropy(loss, lse, *[None] * 4, *inputs, *options, where(x))
    return loss, lse


def backward(kernels, dloss, x, linear_weight, linear_bias, target, weight, lse, options, wanted):
    """(dx, dlinear_weight, dlinear_bias), None where not wanted; makes all logits again."""
    grads = _gradients(wanted, x, linear_weight, linear_bias)
    inputs = x, linear_weight, linear_bias, target, weight
    kernels.linear_cross_entropy(None, lse, *grads, dloss, *inputs, *options, where(x))
    return grads


def gradients(kernels, dloss, x, linear_weight, linear_bias, target, weight, options, wanted):
    """(loss, lse, dx, dlinear_weight, dlinear_bias) of sum(dloss * loss), None where not wanted."""
    loss, lse = _results(x, target)
    grads = _gradients(wanted, x, linear_weight, linear_bias)
    inputs = x, linear_weight, linear_bias, target, weight
    kernels.linear_cross_entropy(loss, lse, *grads, dloss, *inputs, *options, where(x))
    return loss, lse, *grads


def _results(x, target):
    return statistics_like(x, target.shape), target.new_empty(target.shape, dtype=torch.float64)


def _gradients(wanted, *inputs):
    return [memory.empty_like(t) if w else None for w, t in zip(wanted, inputs, strict=True)]
