"""Cross-entropy of logits, with the gradient written while the logits are in the cache."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import memory, reference
from ..backend import choose, where
from .autograd import differentiable, only_once, transforms_active
from .define import check_floating, checked_softcap, define, statistics_like

# ---- implementation ----


def _forward(
    kernels, logits, target, weight, ignore_index, label_smoothing, lse_square_scale, softcap,
    inplace_backward, dloss,
):  # fmt: skip
    loss, lse = statistics_like(logits, target.shape), target.new_empty(target.shape).double()
    dlogits = None if dloss is None else memory.empty_like(logits)
    kernels.cross_entropy_forward(
        loss, lse, dlogits, logits, target, weight,
        ignore_index, label_smoothing, lse_square_scale, softcap,
        0.0 if dloss is None else dloss, where(logits),
    )  # fmt: skip
    return loss, lse, logits.new_empty(0) if dlogits is None else dlogits


def _backward(kernels, dloss, logits, target, weight, lse, *options):
    dlogits = memory.empty_like(logits)
    kernels.cross_entropy_backward(
        dlogits, dloss, logits, target, weight, lse, *options, where(logits)
    )
    return dlogits


def _backward_in_place(kernels, dloss, logits, target, weight, lse, *options):
    kernels.cross_entropy_backward(
        logits, dloss, logits, target, weight, lse, *options, where(logits)
    )
    torch.autograd.graph.increment_version(logits)  # the schema alone does not


def _reference_forward(
    logits, target, weight, ignore_index, label_smoothing, lse_square_scale, softcap,
    inplace_backward, dloss,
):  # fmt: skip
    options = (ignore_index, label_smoothing, lse_square_scale, softcap)
    return reference.cross_entropy_forward(logits, target, weight, *options, dloss)


def _reference_in_place(dloss, logits, *arguments):
    logits.copy_(reference.cross_entropy_backward(dloss, logits, *arguments))


# ---- schema and fake ----

_OPTIONS = "int ignore_index, float label_smoothing, float lse_square_scale, float softcap"
_ROWS = "Tensor target, Tensor? weight, Tensor lse"

cross_entropy_forward = define(
    "cross_entropy_forward",
    f"(Tensor logits, Tensor target, Tensor? weight, {_OPTIONS}, bool inplace_backward,"
    " float? dloss, str backend) -> (Tensor, Tensor, Tensor)",
    op="cross_entropy",
    reference=_reference_forward,
    native=_forward,
)
cross_entropy_backward = define(
    "cross_entropy_backward",
    f"(Tensor dloss, Tensor logits, {_ROWS}, {_OPTIONS}, str backend) -> Tensor",
    op="cross_entropy",
    reference=reference.cross_entropy_backward,
    native=_backward,
)
cross_entropy_backward_ = define(
    "cross_entropy_backward_",
    f"(Tensor dloss, Tensor(a!) logits, {_ROWS}, {_OPTIONS}, str backend) -> ()",
    op="cross_entropy",
    reference=_reference_in_place,
    native=_backward_in_place,
)

# ---- autograd ----


def _keep(ctx, inputs, output):
    logits, target, weight, *ctx.options, ctx.inplace_backward, _, ctx.backend = inputs
    ctx.save_for_backward(logits, target, weight, output[1])


def _gradients(ctx, saved, dloss, *_):
    logits, target, weight, lse = saved
    arguments = (dloss.contiguous(), logits, target, weight, lse, *ctx.options, ctx.backend)
    nothing = (None,) * 9
    if not ctx.inplace_backward:
        return cross_entropy_backward(*arguments), *nothing
    # It bumps the version of the logits: a function that saved them too is told.
    cross_entropy_backward_(*arguments)
    return logits.detach(), *nothing


_losses = differentiable(cross_entropy_forward, _keep, _gradients, reference=_reference_forward)


class _ReducedCrossEntropy(torch.autograd.Function):
    """factor * sum of the rows' losses, and its gradient in the same sweep.

    The gradient is handed over by the first backward, scaled where the loss was; a second one
    (retain_graph) computes it again.
    """

    @staticmethod
    def forward(ctx, logits, target, weight, options, factor, backend):
        loss, lse, ctx.dlogits = _losses(logits, target, weight, *options, False, factor, backend)
        ctx.save_for_backward(logits, target, weight, lse)
        ctx.options, ctx.factor, ctx.backend = options, factor, backend
        return loss.sum() * factor

    @staticmethod
    def backward(ctx, dloss):
        # Raises, as torch does, when the graph is freed.
        logits, target, weight, lse = ctx.saved_tensors
        dlogits, ctx.dlogits = ctx.dlogits, None
        with torch.no_grad():
            if dlogits is None:
                rows = torch.full_like(lse, ctx.factor, dtype=dloss.dtype) * dloss
                dlogits = cross_entropy_backward(
                    rows, logits, target, weight, lse, *ctx.options, ctx.backend
                )
            elif dloss.item() != 1:
                dlogits.mul_(dloss)
        gradients = (dlogits, None, None, None, None, None)
        return only_once("cross_entropy", gradients, (dloss, logits))


# ---- public ----


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """torch.nn.functional.cross_entropy on fastlm's kernels.

    Args:
        input: logits, (classes), (rows, classes) or (rows, classes, d1, ...); float32, bfloat16 or
            float64.
        target: int64 class indices of input's shape without classes; or probabilities of input's
            shape (reference).
        weight: (classes) or None. ignore_index, label_smoothing, reduction: as for torch.
        lse_square_scale: adds this times logsumexp^2 to every row's loss (the z-loss of PaLM,
            Chowdhery et al. 2022).
        softcap: logits are softcap * tanh(logits / softcap) first (Gemma 2, 2024); None, 0 and inf
            for none.
        inplace_backward: backward writes the gradient over the logits, which must not be read after
            it.
    Returns: the loss, float32 whatever the logits' dtype (float64 for float64); rows are 0 where
        ignored.
    Raises: IndexError for a target outside the classes, ValueError for shapes that do not fit or an
        unknown reduction. The second derivative is refused.
    """
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    reduction = as_reduction("cross_entropy", reduction, label_smoothing)
    softcap = checked_softcap("cross_entropy", softcap)
    check_floating("cross_entropy", "input", input)
    form = _form(input, target)
    if form is not None:
        return _probability_targets(
            input, target, weight, ignore_index, reduction, label_smoothing,
            bool(lse_square_scale or softcap), form,
        )  # fmt: skip
    logits, rows = _as_rows(input, target)
    backend = choose("cross_entropy", logits)
    wide = reference.accumulation_dtype(logits)
    if weight is not None:
        weight = checked_weight("cross_entropy", weight, logits.shape[1]).to(wide).contiguous()
    options = (ignore_index, label_smoothing, lse_square_scale, softcap)
    call = (logits, rows, weight, *options, inplace_backward, None, backend)
    if reduction == "none":
        return _losses(*call)[0].view(target.shape)
    denominator = denominator_of(rows, weight, ignore_index, reduction)
    if _gradient_now(logits, inplace_backward) and (denominator is None or denominator.item() != 0):
        factor = 1.0 if denominator is None else 1.0 / denominator.item()
        return _ReducedCrossEntropy.apply(logits, rows, weight, options, factor, backend)
    losses = _losses(*call)[0]
    return losses.sum() if denominator is None else losses.sum() / denominator


def _gradient_now(logits: Tensor, inplace_backward: bool) -> bool:
    """Whether forward may write the gradient. It needs the denominator's value, which would break a
    graph, wait for a device, or not be there in a transform.
    """
    free_to_look = (
        logits.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not transforms_active()
    )
    return (
        free_to_look and logits.requires_grad and torch.is_grad_enabled() and not inplace_backward
    )


def _as_rows(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, classes) and (rows)."""
    if input.dim() == 0:
        raise RuntimeError("cross_entropy: input: expected at least one dimension, got a scalar")
    batch = input.shape[:1] + input.shape[2:] if input.dim() > 1 else input.shape[:0]
    if target.shape != batch:
        # torch has two types for this: by whether the number of rows, or what follows it, differs
        other_rows = target.dim() > 0 and input.dim() > 1 and target.shape[0] != input.shape[0]
        raise (ValueError if other_rows else RuntimeError)(
            f"cross_entropy: target: expected shape {tuple(batch)} for input {tuple(input.shape)}, "
            f"got {tuple(target.shape)}"
        )
    if target.dtype not in (torch.int64, torch.int32, torch.uint8):
        raise RuntimeError(
            f"cross_entropy: target: expected int64 class indices, got {target.dtype}"
        )
    classes = input.shape[1] if input.dim() > 1 else input.shape[0]
    logits = input.movedim(1, -1) if input.dim() > 2 else input
    rows = target.reshape(-1).long().contiguous()
    return logits.reshape(rows.shape[0], classes).contiguous(), rows


def as_reduction(op: str, reduction: str, label_smoothing: float) -> str:
    """`reduction`. Raises for one, or for a label_smoothing, that there is not."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"{op}: label_smoothing: expected 0 to 1, got {label_smoothing}")
    return reduction


def checked_weight(op: str, weight: Tensor, classes: int) -> Tensor:
    """`weight`. Raises RuntimeError where it is not (classes)."""
    if weight.shape != (classes,):
        raise RuntimeError(f"{op}: weight: expected shape {(classes,)}, got {tuple(weight.shape)}")
    return weight


def denominator_of(
    rows: Tensor, weight: Tensor | None, ignore_index: int, reduction: str
) -> Tensor | None:
    """What the mean divides by: the rows that are not ignored, or the sum of their weights."""
    if reduction == "sum":
        return None
    kept = rows != ignore_index
    if weight is None:
        return kept.sum()
    return (weight[rows.where(kept, 0).clamp(0, weight.shape[0] - 1)] * kept).sum()


def _probability_targets(
    input, target, weight, ignore_index, reduction, label_smoothing, has_more_options, form
):
    if has_more_options:
        raise ValueError(
            f"cross_entropy: lse_square_scale, softcap: expected neither with {form}, got one"
        )
    choose("cross_entropy", input, form)
    dtype = reference.accumulation_dtype(input)
    return F.cross_entropy(
        input.to(dtype), target.to(dtype), None if weight is None else weight.to(dtype),
        ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
    )  # fmt: skip


def _form(input, target=None, *args, **kwargs):
    if target is not None and target.is_floating_point():
        return "class-probability targets"
    return None


FORMS = {cross_entropy: _form}
