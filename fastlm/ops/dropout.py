"""Dropout (Srivastava et al. 2014) whose mask is never stored: Philox gives it again in
backward.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import memory, reference
from ..backend import choose, where
from .define import check_probability, contiguous_like, define, draw_seed

# ---- implementation ----


def _dropout(kernels, x, seed, p):
    y = memory.empty_like(x)
    kernels.dropout(y, x, seed, p, where(x))
    return y


# ---- schema and fake ----

dropout_apply = define(
    "dropout",
    "(Tensor x, Tensor seed, float p, str backend) -> Tensor",
    op="dropout",
    reference=reference.dropout,
    native=_dropout,
    fake=lambda x, *_: contiguous_like(x),
)

# ---- autograd ----


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seed, p, backend):
        ctx.save_for_backward(seed)
        ctx.p, ctx.backend = p, backend
        return dropout_apply(x, seed, p, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return (
            dropout_apply(dy.contiguous(), *ctx.saved_tensors, ctx.p, ctx.backend),
            None,
            None,
            None,
        )


# ---- public ----


def dropout(
    input: Tensor, p: float = 0.5, training: bool = True, *, seed: Tensor | None = None
) -> Tensor:
    """torch.nn.functional.dropout with a mask that depends on `seed` and an element's place alone.

    Args:
        input: any shape. p: the probability of dropping; the rest is scaled by 1 / (1 - p).
        seed: int64 tensor of one element; None draws one from torch's generator.
    Returns: like input; input itself where nothing is dropped.
    Raises: ValueError for a p outside 0 to 1.
    """
    check_probability("dropout", "p", p)
    if p == 0 or not training:
        return input
    backend = choose("dropout", input)
    return _Dropout.apply(
        input.contiguous(), draw_seed(input.device) if seed is None else seed, p, backend
    )


FORMS = {dropout: lambda *args, **kwargs: None}
