"""Root mean square layer normalisation (Zhang and Sennrich 2019)."""

import torch
from torch import Tensor

from .. import memory, reference
from ..backend import choose, where
from .autograd import differentiable
from .define import check_floating, define, parameter_form, statistics_like

# ---- implementation ----


def _forward(kernels, x, weight, eps):
    y, rstd = memory.empty_like(x), statistics_like(x, x.shape[:-1])
    kernels.rms_norm_forward(y, rstd, x, weight, eps, where(x))
    return y, rstd


def _backward(kernels, dy, x, weight, rstd):
    dx, dweight = memory.empty_like(x), None if weight is None else torch.empty_like(weight)
    kernels.rms_norm_backward(dx, dweight, dy, x, weight, rstd, where(x))
    return dx, x.new_empty(0) if dweight is None else dweight


# ---- schema and fake ----

rms_norm_forward = define(
    "rms_norm_forward",
    "(Tensor x, Tensor? weight, float eps, str backend) -> (Tensor, Tensor)",
    op="rms_norm",
    reference=reference.rms_norm_forward,
    native=_forward,
)
rms_norm_backward = define(
    "rms_norm_backward",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, str backend) -> (Tensor, Tensor)",
    op="rms_norm",
    reference=reference.rms_norm_backward,
    native=_backward,
)

# ---- autograd ----


def _keep(ctx, inputs, output):
    x, weight, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight, output[1])


def _gradients(ctx, saved, dy, _):
    dx, dweight = rms_norm_backward(dy.contiguous(), *saved, ctx.backend)
    return dx, dweight if ctx.needs_input_grad[1] else None, None, None


_rms_norm = differentiable(
    rms_norm_forward, _keep, _gradients, reference=reference.rms_norm_forward
)

# ---- public ----


def rms_norm(
    input: Tensor,
    normalized_shape: int | list[int] | tuple[int, ...] | torch.Size,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """torch.nn.functional.rms_norm on fastlm's kernels.

    Args:
        input: (*, *normalized_shape), float32, bfloat16 or float64 (others run on the reference).
        weight: normalized_shape, of input's dtype or float32, or None.
        eps: added to the mean of squares; None is the machine epsilon of float32, or of
            float64 for float64 input.
    Returns: like input.
    Raises: RuntimeError, or ValueError for too few dimensions, where shapes do not fit. The second
        derivative is refused.
    """
    sizes = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)
    if not sizes or list(input.shape[-len(sizes) :]) != sizes:
        # torch has two types for this
        raise (ValueError if input.dim() < len(sizes) else RuntimeError)(
            "rms_norm: normalized_shape: expected the last dimensions of input "
            f"{tuple(input.shape)}, got {sizes}"
        )
    if weight is not None and list(weight.shape) != sizes:
        raise RuntimeError(f"rms_norm: weight: expected shape {sizes}, got {list(weight.shape)}")
    check_floating("rms_norm", "input", input)
    backend = choose("rms_norm", input, _form(input, normalized_shape, weight))
    x = input.flatten(-len(sizes)).contiguous()
    weight = None if weight is None else weight.flatten().contiguous()
    eps = torch.finfo(reference.accumulation_dtype(input)).eps if eps is None else eps
    return _rms_norm(x, weight, eps, backend)[0].view(input.shape)


def _form(input, normalized_shape, weight=None, eps=None):
    return parameter_form(input, weight)


FORMS = {rms_norm: _form}
