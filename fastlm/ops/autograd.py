"""Derivatives of the registered ops: for eager calls, compilers and the transforms of torch.func.

An eager call goes through a torch.autograd.Function; a compiler gets the registered op, which has
the same gradient; a transform gets a Function with rules for vmap and jvp. All of them share one
`setup_context` and one `backward`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad

from ..backend import BackendUnavailable, forced
from .define import tell_dtensor


def differentiable(
    op: OpOverload,
    setup_context: Callable,
    backward: Callable,
    *,
    reference: Callable,
    outputs: int = 1,
) -> Callable:
    """A function that calls the registered op `op` and can be differentiated once.

    Args:
        op: what `define` returned.
        setup_context: (ctx, inputs, output), as of torch.autograd.Function; saves what backward
            needs.
        backward: (ctx, saved tensors, *gradients of the outputs); gives a gradient, or None, for
            each input. It is not differentiated itself.
        reference: op in torch's own operations, without the argument `backend`; jvp differentiates
            it.
        outputs: how many of the first outputs have a gradient.
    """

    name = op.name().removeprefix("fastlm::").removesuffix("_forward")

    def gradients(ctx, *grads):
        saved = ctx.saved_tensors
        with torch.no_grad():
            found = backward(ctx, saved, *grads)
        return only_once(name, found, (*grads, *saved))

    def keep(ctx, inputs, output):
        setup_context(ctx, inputs, output)
        if isinstance(output, tuple):
            ctx.mark_non_differentiable(*output[outputs:])

    class Eager(torch.autograd.Function):
        backward = staticmethod(gradients)
        setup_context = staticmethod(keep)

        @staticmethod
        def forward(*args):
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)

    class Transformed(torch.autograd.Function):
        generate_vmap_rule = True
        forward = staticmethod(op)
        backward = staticmethod(gradients)

        @staticmethod
        def setup_context(ctx, inputs, output):
            keep(ctx, inputs, output)
            ctx.save_for_forward(*(a for a in inputs if isinstance(a, Tensor)))
            ctx.others = [None if isinstance(a, Tensor) else (a,) for a in inputs]

        @staticmethod
        def jvp(ctx, *tangents):
            tensors = iter(ctx.saved_tensors)
            inputs = [next(tensors) if other is None else other[0] for other in ctx.others]
            found = _directional_derivative(reference, inputs[:-1], tangents[:-1])
            if isinstance(found, Tensor):
                return found
            return *found[:outputs], *(None for _ in found[outputs:])

    # torch.autograd.Function.apply would inspect the signature of `forward` at every call.
    apply = super(torch.autograd.Function, Eager).apply
    torch.library.register_autograd(op.name(), gradients, setup_context=keep)

    def traced_transform(*args):
        """A transform that is compiled goes through torch's own operations: dynamo can give a
        registered op no rules for it.
        """
        if forced() not in (None, "torch"):
            raise BackendUnavailable(
                f"{name}: expected no backend by name inside a compiled transform of torch.func, "
                f"which runs on torch's own operations, got {forced()!r}"
            )
        return reference(*args[:-1])

    def call(*args):
        tell_dtensor()
        if torch.compiler.is_compiling():
            return traced_transform(*args) if transforms_active() else op(*args)
        if transforms_active():
            return Transformed.apply(*args)
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


def transforms_active() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, is under way: then values
    must not be read, nor results be kept from one call to another.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _directional_derivative(function: Callable, inputs: list, tangents: tuple) -> Any:
    """The derivative of function(*inputs) along `tangents`, which are None where they are zero.

    Twice in reverse: the pullback is linear, and its own pullback is the derivative. Forward mode,
    which would be simpler, cannot be nested in itself.
    """
    places = [i for i, a in enumerate(inputs) if isinstance(a, Tensor) and a.is_floating_point()]

    def of_floating(*values):
        arguments = list(inputs)
        for i, value in zip(places, values, strict=True):
            arguments[i] = value
        return function(*arguments)

    primals = [inputs[i] for i in places]
    along = tuple(
        torch.zeros_like(x) if tangents[i] is None else tangents[i]
        for i, x in zip(places, primals, strict=True)
    )
    with torch.enable_grad():
        outputs, pullback = torch.func.vjp(of_floating, *primals)[:2]
        zeros = torch.utils._pytree.tree_map(torch.zeros_like, outputs)
        pullback_of_pullback = torch.func.vjp(pullback, zeros)[1]
        return pullback_of_pullback(along)[0]


class _FirstDerivative(torch.autograd.Function):
    """Gradients as they are, which depend on what they were computed from: differentiating them is
    an error, not zero.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(name, count, *tensors):
        return tuple(t.clone() for t in tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(_second_derivative(ctx.name))

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(_second_derivative(ctx.name))


def _second_derivative(name: str) -> str:
    return (
        f"{name}: expected to be differentiated once, got a second derivative, which fastlm's "
        "kernels do not have; torch.nn.functional's function has it"
    )


def only_once(name: str, gradients: tuple, sources: tuple) -> tuple:
    """`gradients` that an op of that name computed from `sources`; they refuse to be
    differentiated themselves. None stands for what is absent, in both.
    """
    if not torch.is_grad_enabled():
        return gradients
    needed = [t for t in sources if t is not None and t.requires_grad]
    found = [g for g in gradients if g is not None]
    if not needed or not found:
        return gradients
    once = iter(_FirstDerivative.apply(name, len(found), *found, *needed))
    return tuple(None if g is None else next(once) for g in gradients)
