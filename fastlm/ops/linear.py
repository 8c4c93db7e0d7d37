"""A linear layer of few rows, as in decoding. There is no backward of ours: what needs gradients,
or has many rows, is torch's.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import reference
from ..backend import choose, where
from .define import define, tell_dtensor

# ---- implementation ----


def _forward(kernels, x, weight, bias):
    y = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)
    in_major = weight.stride(0) == 1 and weight.shape[0] != 1
    kernels.linear(y, x, weight.t() if in_major else weight, bias, in_major, where(x))
    return y


# ---- schema and fake ----

linear_forward = define(
    "linear_forward",
    "(Tensor x, Tensor weight, Tensor? bias, str backend) -> Tensor",
    op="linear",
    reference=reference.linear,
    native=_forward,
)

# ---- public ----


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear, with a kernel for up to 8 rows without gradients on the CPU.

    Args:
        input: (*, in_features). weight: (out_features, in_features), contiguous, or the transpose
            of a contiguous (in_features, out_features): each is read once, as it lies.
        bias: (out_features), or None.
    Returns: (*, out_features). A row has the same bits in any batch of up to 8 rows.
    Raises: what torch's raises.
    """
    backend = choose("linear", input, _form(input, weight, bias))
    if backend == "torch":
        return F.linear(input, weight, bias)
    tell_dtensor()
    return linear_forward(input.contiguous(), weight, bias, backend)


def _form(input, weight, bias=None):
    tensors = [t for t in (input, weight, bias) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "tensors that need gradients"
    if any(t.dtype != input.dtype for t in tensors) or torch.is_autocast_enabled(input.device.type):
        return "several dtypes or autocast"
    if weight.dim() != 2 or input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        return "shapes that do not fit"
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        return "a weight with gaps"
    if bias is not None and not (bias.is_contiguous() and bias.shape == weight.shape[:1]):
        return "a bias that is not contiguous, or not of one dimension"
    return None


FORMS = {linear: _form}
