"""Dropout (Srivastava et al. 2014) whose mask is never stored: Philox gives it again in
backward.
"""

from torch import Tensor

from .. import memory, reference
from ..backend import choose, where
from .autograd import differentiable
from .define import check_floating, check_probability, contiguous_like, define, draw_seed

# ---- implementation ----


def _forward(kernels, x, seed, p):
    y = memory.empty_like(x)
    kernels.dropout(y, x, seed, p, where(x))
    return y


# ---- schema and fake ----

dropout_apply = define(
    "dropout",
    "(Tensor x, Tensor seed, float p, str backend) -> Tensor",
    op="dropout",
    reference=reference.dropout,
    native=_forward,
    fake=lambda x, *_: contiguous_like(x),
)

# ---- autograd ----


def _keep(ctx, inputs, output):
    _, seed, ctx.p, ctx.backend = inputs
    ctx.save_for_backward(seed)


def _gradients(ctx, saved, dy):
    return dropout_apply(dy.contiguous(), *saved, ctx.p, ctx.backend), None, None, None


_dropout = differentiable(dropout_apply, _keep, _gradients, reference=reference.dropout)

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
    check_floating("dropout", "input", input)
    backend = choose("dropout", input)
    return _dropout(input.contiguous(), draw_seed(input) if seed is None else seed, p, backend)


FORMS = {dropout: lambda *args, **kwargs: None}
