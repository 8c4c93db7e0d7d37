"""Layer normalisation (Ba, Kiros, Hinton 2016), alone and fused with the residual addition before
it.
"""

import torch
from torch import Tensor

from .. import memory, reference
from ..backend import choose, where
from .autograd import differentiable
from .define import (
    check_floating,
    check_probability,
    contiguous_like,
    define,
    draw_seed,
    parameter_form,
    statistics_like,
)

# ---- implementation: outputs allocated, the kernel called ----


def _run_forward(kernels, x, weight, bias, eps):
    y, mean, rstd = (
        memory.empty_like(x),
        statistics_like(x, x.shape[:-1]),
        statistics_like(x, x.shape[:-1]),
    )
    kernels.layer_norm_forward(y, mean, rstd, x, weight, bias, eps, where(x))
    return y, mean, rstd


def _run_backward(kernels, dy, x, weight, bias, mean, rstd):
    dx, dweight, dbias = memory.empty_like(x), _grad_of(weight), _grad_of(bias)
    kernels.layer_norm_backward(dx, dweight, dbias, dy, x, weight, mean, rstd, where(x))
    return dx, _or_empty(dweight, x), _or_empty(dbias, x)


def _run_add_forward(kernels, x, residual, weight, bias, seed, eps, dropout_p):
    y, z = memory.empty_like(x), memory.empty_like(x)
    mean, rstd = statistics_like(x, x.shape[:-1]), statistics_like(x, x.shape[:-1])
    p = dropout_p if seed is not None else 0.0
    kernels.add_layer_norm_forward(
        y, z, mean, rstd, x, residual, weight, bias, seed, eps, p, where(x)
    )
    return y, z, mean, rstd


def _run_add_backward(
    kernels, dy, dresidual_out, residual_out, weight, bias, mean, rstd, seed, dropout_p
):
    z = residual_out
    dx = None if seed is None else memory.empty_like(z)
    dz, dweight, dbias = memory.empty_like(z), _grad_of(weight), _grad_of(bias)
    p = dropout_p if seed is not None else 0.0
    kernels.add_layer_norm_backward(
        dx, dz, dweight, dbias, dy, dresidual_out, z, weight, mean, rstd, seed, p, where(z)
    )
    return _or_empty(dx, z), dz, _or_empty(dweight, z), _or_empty(dbias, z)


def _grad_of(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else torch.empty_like(parameter)


def _or_empty(grad: Tensor | None, like: Tensor) -> Tensor:
    """An op's result cannot be None: what does not exist is empty."""
    return like.new_empty(0) if grad is None else grad


# ---- schema and fake: what dropout does changes no shape ----


def _add_layer_norm_forward_fake(x, residual, weight, bias, seed, *options):
    return reference.add_layer_norm_forward(x, residual, weight, bias, None, *options)


def _add_layer_norm_backward_fake(dy, dz, z, weight, bias, mean, rstd, seed, dropout_p):
    arguments = (dy, dz, z, weight, bias, mean, rstd, None, dropout_p)
    dx, *others = reference.add_layer_norm_backward(*arguments)
    return dx if seed is None else contiguous_like(z), *others


layer_norm_forward = define(
    "layer_norm_forward",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, str backend) -> (Tensor, Tensor, Tensor)",
    op="layer_norm",
    reference=reference.layer_norm_forward,
    native=_run_forward,
)
layer_norm_backward = define(
    "layer_norm_backward",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    op="layer_norm",
    reference=reference.layer_norm_backward,
    native=_run_backward,
)
add_layer_norm_forward = define(
    "add_layer_norm_forward",
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor? seed, float eps,"
    " float dropout_p,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    op="add_layer_norm",
    reference=reference.add_layer_norm_forward,
    native=_run_add_forward,
    fake=_add_layer_norm_forward_fake,
)
add_layer_norm_backward = define(
    "add_layer_norm_backward",
    "(Tensor dy, Tensor? dresidual_out, Tensor residual_out, Tensor? weight, Tensor? bias,"
    " Tensor mean,"
    " Tensor rstd, Tensor? seed, float dropout_p, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    op="add_layer_norm",
    reference=reference.add_layer_norm_backward,
    native=_run_add_backward,
    fake=_add_layer_norm_backward_fake,
)

# ---- autograd ----


def _keep(ctx, inputs, output):
    x, weight, bias, _, backend = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    # Backward may run when use() is no longer in force.
    ctx.backend = backend


def _gradients(ctx, saved, dy, *_):
    dx, dweight, dbias = layer_norm_backward(dy.contiguous(), *saved, ctx.backend)
    _, wants_weight, wants_bias, *_ = ctx.needs_input_grad
    return dx, dweight if wants_weight else None, dbias if wants_bias else None, None, None


def _add_keep(ctx, inputs, output):
    _, _, weight, bias, seed, _, dropout_p, backend = inputs
    _, residual_out, mean, rstd = output
    ctx.save_for_backward(residual_out, weight, bias, mean, rstd, seed)
    # The last use of the residual stream has no gradient of its own.
    ctx.set_materialize_grads(False)
    ctx.dropout_p, ctx.backend = dropout_p, backend


def _add_gradients(ctx, saved, dy, dresidual_out, *_):
    residual_out, weight, bias, mean, rstd, seed = saved
    dy = torch.zeros_like(residual_out) if dy is None else dy.contiguous()
    dresidual_out = None if dresidual_out is None else dresidual_out.contiguous()
    dx, dresidual, dweight, dbias = add_layer_norm_backward(
        dy, dresidual_out, residual_out, weight, bias, mean, rstd, seed, ctx.dropout_p, ctx.backend
    )
    wants_weight, wants_bias = ctx.needs_input_grad[2:4]
    dweight, dbias = dweight if wants_weight else None, dbias if wants_bias else None
    return dresidual if seed is None else dx, dresidual, dweight, dbias, None, None, None, None


_layer_norm = differentiable(
    layer_norm_forward, _keep, _gradients, reference=reference.layer_norm_forward
)
_add_layer_norm = differentiable(
    add_layer_norm_forward,
    _add_keep,
    _add_gradients,
    reference=reference.add_layer_norm_forward,
    outputs=2,
)


# ---- public ----


def layer_norm(
    input: Tensor,
    normalized_shape,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """torch.nn.functional.layer_norm on fastlm's kernels.

    Args:
        input: (*, *normalized_shape), float32, bfloat16 or float64 (others run on the reference).
        normalized_shape: an int or the sizes of the dimensions to normalise over, as for torch.
        weight, bias: of normalized_shape and input's dtype, or float32 under a narrower input; or
            None.
    Returns: like input. Statistics are float32 (float64 for float64).
    Raises: RuntimeError where shapes do not fit, as torch does.
    """
    sizes = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)
    if not sizes or list(input.shape[-len(sizes) :]) != sizes:
        raise RuntimeError(
            "layer_norm: normalized_shape: expected the last dimensions of input "
            f"{tuple(input.shape)}, got {sizes}"
        )
    _check_parameters("layer_norm", sizes, weight, bias)
    check_floating("layer_norm", "input", input)
    backend = choose("layer_norm", input, _form(input, normalized_shape, weight, bias))
    x = input.flatten(-len(sizes)).contiguous()
    weight, bias = (None if p is None else p.flatten().contiguous() for p in (weight, bias))
    return _layer_norm(x, weight, bias, eps, backend)[0].view(input.shape)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """residual_out = dropout(x) + residual; y = layer_norm(residual_out) over the last dimension,
    in one pass.

    Args:
        x, residual: (*, cols), of one dtype. weight, bias: (cols), or None.
        dropout_p: probability of dropping an element of x; 0 when not training.
        seed: int64 tensor of one element for Philox; None draws one from torch's generator. The
            mask depends on it and on an element's place alone: it is the same in backward, on every
            device and with any number of threads.
    Returns: (y, residual_out).
    Raises: RuntimeError where shapes or dtypes do not fit, ValueError for a dropout_p outside 0 to
        1.
    """
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise RuntimeError(
            f"add_layer_norm: residual: expected x's {tuple(x.shape)} {x.dtype}, "
            f"got {tuple(residual.shape)} {residual.dtype}"
        )
    _check_parameters("add_layer_norm", [x.shape[-1]], weight, bias)
    check_probability("add_layer_norm", "dropout_p", dropout_p)
    check_floating("add_layer_norm", "x", x)
    backend = choose("add_layer_norm", x, _add_form(x, residual, weight, bias))
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = draw_seed(x)
    weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
    return _add_layer_norm(
        x.contiguous(), residual.contiguous(), weight, bias, seed, eps, dropout_p, backend
    )[:2]


def _check_parameters(op: str, sizes: list[int], *parameters: Tensor | None) -> None:
    for name, parameter in zip(("weight", "bias"), parameters, strict=True):
        if parameter is not None and list(parameter.shape) != sizes:
            raise RuntimeError(f"{op}: {name}: expected shape {sizes}, got {list(parameter.shape)}")


def _form(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    return parameter_form(input, weight, bias)


def _add_form(x, residual, weight=None, bias=None, eps=1e-5, *, dropout_p=0.0, seed=None):
    return parameter_form(x, weight, bias)


FORMS = {layer_norm: _form, add_layer_norm: _add_form}
