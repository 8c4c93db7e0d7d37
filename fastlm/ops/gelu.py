"""GELU (Hendrycks and Gimpel 2016), exact and in the tanh form of GPT-2, with the bias before it
fused.
"""

import torch
from torch import Tensor

from .. import memory, reference
from ..backend import choose, where
from .autograd import differentiable
from .define import check_floating, define

# ---- implementation ----


def _forward(kernels, x, bias, approximate):
    y = memory.empty_like(x)
    kernels.gelu_forward(y, x, bias, approximate == "tanh", where(x))
    return y


def _backward(kernels, dy, x, bias, approximate):
    dx, dbias = memory.empty_like(x), None if bias is None else torch.empty_like(bias)
    kernels.gelu_backward(dx, dbias, dy, x, bias, approximate == "tanh", where(x))
    return dx, x.new_empty(0) if dbias is None else dbias


# ---- schema and fake ----

gelu_forward = define(
    "gelu_forward",
    "(Tensor x, Tensor? bias, str approximate, str backend) -> Tensor",
    op="gelu",
    reference=reference.gelu_forward,
    native=_forward,
)
gelu_backward = define(
    "gelu_backward",
    "(Tensor dy, Tensor x, Tensor? bias, str approximate, str backend) -> (Tensor, Tensor)",
    op="gelu",
    reference=reference.gelu_backward,
    native=_backward,
)

# ---- autograd ----


def _keep(ctx, inputs, output):
    x, bias, ctx.approximate, ctx.backend = inputs
    ctx.save_for_backward(x, bias)


def _gradients(ctx, saved, dy):
    dx, dbias = gelu_backward(dy.contiguous(), *saved, ctx.approximate, ctx.backend)
    return dx, dbias if ctx.needs_input_grad[1] else None, None, None


_gelu = differentiable(gelu_forward, _keep, _gradients, reference=reference.gelu_forward)

# ---- public ----


def gelu(input: Tensor, approximate: str = "none", *, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.gelu on fastlm's kernels, of input + bias.

    Args:
        input: any shape; float32, bfloat16 or float64 (others run on the reference).
        approximate: "none" (erf) or "tanh" (GPT-2's gelu_new).
        bias: (input.shape[-1]) of input's dtype, added first; or None.
    Returns: like input, contiguous.
    Raises: RuntimeError for another `approximate`, as torch does, or a bias that does not fit.
    """
    if approximate not in ("none", "tanh"):
        raise RuntimeError(f"gelu: approximate: expected 'none' or 'tanh', got {approximate!r}")
    if bias is not None and (bias.shape != input.shape[-1:]):
        raise RuntimeError(
            f"gelu: bias: expected shape {tuple(input.shape[-1:])}, got {tuple(bias.shape)}"
        )
    check_floating("gelu", "input", input)
    backend = choose("gelu", input, _form(input, approximate, bias=bias))
    return _gelu(
        input.contiguous(), None if bias is None else bias.contiguous(), approximate, backend
    )


def _form(input, approximate="none", *, bias=None):
    if bias is not None and bias.dtype != input.dtype:
        return f"a bias of {bias.dtype} with {input.dtype} input"
    return None


FORMS = {gelu: _form}
