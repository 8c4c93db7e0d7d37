"""Cross-entropy of a linear layer's output that never holds all of the logits.

Where the loss is reduced and the weight gets a gradient, forward computes all gradients while it
has the logits, which saves one of four products; otherwise backward makes the logits again. How,
for a tile of classes on the CPU and for some rows on a GPU, is in
csrc/cpu/linear_cross_entropy.cpp and linear_cross_entropy_rows.py.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import reference
from ..backend import choose
from . import linear_cross_entropy_rows as by_rows
from . import linear_cross_entropy_tiles as tiles
from .autograd import differentiable, only_once, transforms_active
from .cross_entropy import as_reduction, checked_weight, cross_entropy, denominator_of
from .define import check_floating, checked_softcap, define, statistics_like
from .linear_cross_entropy_arguments import autocasts, check_shapes

# ---- implementation ----


def _of(kernels):
    """By tiles of classes where there is a kernel for them, by rows elsewhere."""
    return tiles if hasattr(kernels, "linear_cross_entropy") else by_rows


def _forward(kernels, x, linear_weight, linear_bias, target, weight, *options):
    return _of(kernels).forward(kernels, x, linear_weight, linear_bias, target, weight, options)


def _backward(
    kernels, dloss, x, linear_weight, linear_bias, target, weight, lse,
    input_grad, linear_weight_grad, linear_bias_grad, *options,
):  # fmt: skip
    wanted = input_grad, linear_weight_grad, linear_bias_grad
    grads = _of(kernels).backward(
        kernels, dloss, x, linear_weight, linear_bias, target, weight, lse, options, wanted
    )
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


def _gradients(
    kernels, dloss, x, linear_weight, linear_bias, target, weight,
    input_grad, linear_weight_grad, linear_bias_grad, *options,
):  # fmt: skip
    wanted = input_grad, linear_weight_grad, linear_bias_grad
    loss, lse, *grads = _of(kernels).gradients(
        kernels, dloss, x, linear_weight, linear_bias, target, weight, options, wanted
    )
    return loss, lse, *(x.new_empty(0) if grad is None else grad for grad in grads)


# ---- schema and fake ----

_LINEAR = "Tensor x, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight"
_WANTED = "bool input_grad, bool linear_weight_grad, bool linear_bias_grad"
_OPTIONS = "int ignore_index, float label_smoothing, float lse_square_scale, float softcap"

linear_cross_entropy_forward = define(
    "linear_cross_entropy_forward",
    f"({_LINEAR}, {_OPTIONS}, str backend) -> (Tensor, Tensor)",
    op="linear_cross_entropy",
    reference=reference.linear_cross_entropy_forward,
    native=_forward,
)
linear_cross_entropy_backward = define(
    "linear_cross_entropy_backward",
    f"(Tensor dloss, {_LINEAR}, Tensor lse, {_WANTED}, {_OPTIONS}, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    op="linear_cross_entropy",
    reference=reference.linear_cross_entropy_backward,
    native=_backward,
)
linear_cross_entropy_gradients = define(
    "linear_cross_entropy_gradients",
    f"(Tensor dloss, {_LINEAR}, {_WANTED}, {_OPTIONS}, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    op="linear_cross_entropy",
    reference=reference.linear_cross_entropy_gradients,
    native=_gradients,
)

# ---- autograd ----


def _keep(ctx, inputs, output):
    ctx.options, ctx.backend = inputs[5:-1], inputs[-1]
    ctx.save_for_backward(*inputs[:5], output[1])


def _wanted_gradients(ctx, saved, dloss, _):
    wanted = ctx.needs_input_grad[:3]
    grads = linear_cross_entropy_backward(
        dloss.contiguous(), *saved, *wanted, *ctx.options, ctx.backend
    )
    found = (g if wants else None for g, wants in zip(grads, wanted, strict=True))
    return *found, *(None,) * 7


_losses = differentiable(
    linear_cross_entropy_forward,
    _keep,
    _wanted_gradients,
    reference=reference.linear_cross_entropy_forward,
)


class _ReducedLinearCrossEntropy(torch.autograd.Function):
    """sum(losses) / denominator, and its gradients while the logits are there.

    The first backward hands them over, scaled where the loss was; a second one (retain_graph)
    computes them again.
    """

    @staticmethod
    def forward(ctx, x, linear_weight, linear_bias, target, weight, denominator, options, backend):
        inputs = x, linear_weight, linear_bias, target, weight
        dloss = statistics_like(x, target.shape).fill_(1)
        if denominator is not None:
            dloss /= denominator
        ctx.save_for_backward(*inputs, dloss)
        ctx.options, ctx.backend = options, backend
        loss, _, *ctx.grads = linear_cross_entropy_gradients(
            dloss, *inputs, *ctx.needs_input_grad[:3], *options, backend
        )
        return loss.sum() if denominator is None else loss.sum() / denominator

    @staticmethod
    def backward(ctx, upstream):
        # Raises, as torch does, when the graph is freed.
        *inputs, dloss = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        grads, ctx.grads = ctx.grads, None
        with torch.no_grad():
            if grads is None:
                _, _, *grads = linear_cross_entropy_gradients(
                    dloss, *inputs, *wanted, *ctx.options, ctx.backend
                )
            # Looking at the value would make a GPU wait.
            if upstream.device.type != "cpu" or upstream.item() != 1:
                for grad in grads:
                    grad.mul_(upstream)
        found = (g if wants else None for g, wants in zip(grads, wanted, strict=True))
        gradients = (*found, None, None, None, None, None)
        return only_once("linear_cross_entropy", gradients, (upstream, *inputs))


# ---- public ----


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options=None,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """cross_entropy(linear(input, linear_weight, linear_bias), target), without the logits.

    Args:
        input: (*, features), float32, bfloat16 or float64. linear_weight: (classes, features),
            linear_bias: (classes) or None, both of input's dtype. Under autocast all three are cast
            to its dtype, as torch.nn.functional.linear casts them.
        target: class indices (int64, int32 or uint8) of input's shape without features.
        ignore_index: None is -100.
        options: torch's choice of chunks, a LinearCrossEntropyOptions or None; the kernels never
            hold the logits, whatever it is.
        As for torch's function, linear_weight may be (classes, d1, ..., features) with target
            (rows, d1, ...), and target may be probabilities; such calls run on torch's own
            functions and hold the logits.
        The rest is as for `cross_entropy`.
    Returns: the loss, float32 whatever input's dtype (float64 for float64); rows are 0 where
        ignored.
    Raises: IndexError for a target outside the classes (on the CPU), ValueError or RuntimeError for
        shapes, dtypes and options that do not fit. The second derivative is refused.
    """
    reduction = as_reduction("linear_cross_entropy", reduction, label_smoothing)
    if autocasts(input):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, linear_weight = input.to(dtype), linear_weight.to(dtype)
        linear_bias = None if linear_bias is None else linear_bias.to(dtype)
    check_floating("linear_cross_entropy", "input", input)
    softcap = checked_softcap("linear_cross_entropy", softcap)
    form = _form(input, linear_weight, target)
    if form is not None:
        return _in_torch(
            input, linear_weight, target, linear_bias, weight, reduction, ignore_index,
            label_smoothing, bool(lse_square_scale or softcap), form,
        )  # fmt: skip
    check_shapes(input, linear_weight, linear_bias, target)
    backend = choose("linear_cross_entropy", input)
    ignore_index = -100 if ignore_index is None else ignore_index
    if weight is not None:
        classes = linear_weight.shape[0]
        weight = checked_weight("linear_cross_entropy", weight, classes)
        weight = weight.to(reference.accumulation_dtype(input)).contiguous()
    x = input.reshape(target.numel(), input.shape[-1]).contiguous()
    rows = target.reshape(-1).long().contiguous()
    call = (ignore_index, label_smoothing, lse_square_scale, softcap)
    bias = None if linear_bias is None else linear_bias.contiguous()
    inputs = x, linear_weight.contiguous(), bias, rows, weight
    if reduction == "none":
        return _losses(*inputs, *call, backend)[0].view(target.shape)
    denominator = denominator_of(rows, weight, ignore_index, reduction)
    if _gradients_now(linear_weight):
        return _ReducedLinearCrossEntropy.apply(*inputs, denominator, call, backend)
    losses = _losses(*inputs, *call, backend)[0]
    return losses.sum() if denominator is None else losses.sum() / denominator


def _gradients_now(linear_weight: Tensor) -> bool:
    """Whether forward computes the gradients. What backward needs of the logits waits in the memory
    of the weight's gradient, so without that nothing is saved. A compiler decides for itself what
    forward keeps, and a transform cannot take what is kept beside its outputs.
    """
    wanted = linear_weight.requires_grad and torch.is_grad_enabled()
    return wanted and not torch.compiler.is_compiling() and not transforms_active()


def _in_torch(
    input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing,
    has_more_options, form,
):  # fmt: skip
    """The loss of calls that no kernel takes, with the logits held."""
    op = "linear_cross_entropy"
    if has_more_options:
        raise ValueError(f"{op}: lse_square_scale, softcap: expected neither with {form}, got one")
    if target.is_floating_point() and ignore_index is not None:
        raise RuntimeError(
            f"{op}: ignore_index: expected None with probabilities as target, got {ignore_index}"
        )
    if linear_weight.dim() < 2 or linear_weight.shape[-1] != input.shape[-1]:
        raise RuntimeError(
            f"{op}: linear_weight: expected (classes, ..., features) with input's features, "
            f"got {tuple(linear_weight.shape)} for input {tuple(input.shape)}"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(
            f"{op}: linear_bias: expected shape {tuple(linear_weight.shape[:-1])}, "
            f"got {tuple(linear_bias.shape)}"
        )
    shape = (*input.shape[:-1], *linear_weight.shape[:-1])
    if target.is_floating_point() and target.shape != shape:
        raise RuntimeError(
            f"{op}: target: expected class indices, or probabilities of shape {shape}, "
            f"got {target.dtype} of shape {tuple(target.shape)}"
        )
    choose(op, input, form)
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = F.linear(input, linear_weight.flatten(0, -2), bias)
    logits = logits.to(reference.accumulation_dtype(input)).view(shape)
    return cross_entropy(
        logits, target, weight, ignore_index=-100 if ignore_index is None else ignore_index,
        reduction=reduction, label_smoothing=label_smoothing,
    )  # fmt: skip


def _form(input, linear_weight=None, target=None, **options):
    if target is not None and target.is_floating_point():
        return "class-probability targets"
    if linear_weight is not None and linear_weight.dim() > 2:
        return "a linear_weight of more than two dimensions"
    return None


FORMS = {linear_cross_entropy: _form}
