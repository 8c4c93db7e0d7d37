"""The transforms of torch.func over every op: grad, vmap and jvp give what a loop and torch's own
functions give, and a second derivative is refused."""

import pytest
import torch
from accuracy import assert_as_accurate_as_torch
from cases import F32, F64
from test_add_layer_norm import FORMS as ADD_LAYER_NORM
from test_attention import FORMS as ATTENTION
from test_cross_entropy import FORMS as CROSS_ENTROPY
from test_dropout import FORMS as DROPOUT
from test_gelu import FORMS as GELU
from test_layer_norm import FORMS as LAYER_NORM
from test_linear_cross_entropy import TestFamilies as LinearCrossEntropy
from test_rms_norm import TestFamilies as RmsNorm
from torch.autograd import forward_ad

from fastlm import ops

FORMS = (
    *LAYER_NORM[:2], *ADD_LAYER_NORM[:2], *RmsNorm.forms[:1], *GELU[:3], *DROPOUT[:1],
    *CROSS_ENTROPY[:3], *LinearCrossEntropy.forms[:4], *ATTENTION[:1], *ATTENTION[4:6],
)  # fmt: skip


def scalar(function, outputs=None):
    """A number that every floating-point output of the function has a part in."""

    def call(*inputs):
        found = function(*inputs)
        found = found if isinstance(found, tuple) else (found,)
        return sum((output.float() * 0.7).sin().sum() for output in found[:outputs])

    return call


def floating(inputs):
    return tuple(i for i, t in enumerate(inputs) if t.is_floating_point())


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f.ours.__module__}-{f}")
def test_grad_is_that_of_backward(form):
    inputs = form.make(F32)
    wanted = floating(inputs)
    found = torch.func.grad(scalar(form.run), wanted)(*inputs)
    leaves = [t.requires_grad_(i in wanted) for i, t in enumerate(form.make(F32))]
    expected = torch.autograd.grad(scalar(form.run)(*leaves), [leaves[i] for i in wanted])
    for ours, theirs in zip(found, expected, strict=True):
        # A reduced loss has its gradient scaled by other roundings.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * theirs.abs().max().item())


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f.ours.__module__}-{f}")
def test_gradients_of_each_sample_are_those_of_a_loop(form):
    """Bit for bit: each sample has the bits that it has alone."""
    inputs = form.make(F32)
    samples = tuple(torch.stack([t, 2 * t if t.is_floating_point() else t, t]) for t in inputs)
    gradient = torch.func.grad(scalar(form.run), floating(inputs))
    together = torch.func.vmap(gradient)(*samples)
    for i in range(3):
        alone = gradient(*(t[i] for t in samples))
        for ours, theirs in zip(together, alone, strict=True):
            assert torch.equal(ours[i], theirs)


def test_vmap_over_some_arguments_and_other_dimensions():
    x, weight = torch.randn(5, 3, 8), torch.randn(8, 4)
    found = torch.func.vmap(lambda x, w: ops.layer_norm(x, 8, w), (1, 1), 1)(
        x[:, [0, 1, 2, 0]], weight
    )
    for i in range(4):
        assert torch.equal(found[:, i], ops.layer_norm(x[:, i % 3], 8, weight[:, i]))


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f.ours.__module__}-{f}")
def test_jvp_is_that_of_torchs_composition(form):
    """Against torch's own in float64, in one direction for all inputs at once."""
    inputs = form.make(F64)
    wanted = floating(inputs)
    torch.manual_seed(1)
    along = tuple(torch.randn_like(inputs[i]) for i in wanted)

    def derivative(function, dtype):
        def of_floating(*values):
            arguments = [t.to(dtype) if t.is_floating_point() else t for t in inputs]
            for i, value in zip(wanted, values, strict=True):
                arguments[i] = value
            found = function(*arguments)
            # torch's attention has its lse without a gradient.
            return found[0] if isinstance(found, tuple) else found

        primals = tuple(inputs[i].to(dtype) for i in wanted)
        return torch.func.jvp(of_floating, primals, tuple(t.to(dtype) for t in along))[1]

    truth = derivative(form.run_theirs, F64)
    torch.testing.assert_close(derivative(form.run, F64), truth)
    theirs = derivative(form.run_theirs, F32)
    # The derivative of a number is a sum of terms that cancel: one for each element of the inputs.
    terms = form.cancels
    if truth.dim() == 0:
        leaves = [t.requires_grad_(i in wanted) for i, t in enumerate(inputs)]
        gradients = torch.autograd.grad(form.run_theirs(*leaves), [leaves[i] for i in wanted])
        terms = sum((g * t).abs().sum().item() for g, t in zip(gradients, along, strict=True))
    assert_as_accurate_as_torch(derivative(form.run, F32), theirs, truth, "float32", terms)


def test_jvp_outside_of_torch_func():
    x, along = torch.randn(3, 8, dtype=F64), torch.randn(3, 8, dtype=F64)
    with forward_ad.dual_level():
        y = ops.gelu(forward_ad.make_dual(x, along))
        found = forward_ad.unpack_dual(y).tangent
    wanted = torch.func.jvp(torch.nn.functional.gelu, (x,), (along,))[1]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd], ids=["rev", "fwd"])
def test_jacobians(transform):
    x = torch.randn(8, dtype=F64)
    found = transform(lambda x: ops.layer_norm(x, 8))(x)
    wanted = transform(lambda x: torch.nn.functional.layer_norm(x, (8,)))(x)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "transform",
    [
        torch.func.hessian,
        lambda f: torch.func.jacrev(torch.func.jacrev(f)),
        lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).sum()),
    ],
    ids=["hessian", "reverse-reverse", "grad-grad"],
)
def test_second_derivative_is_refused(transform):
    with pytest.raises(RuntimeError, match="gelu: expected to be differentiated once"):
        transform(lambda x: ops.gelu(x).square().sum())(torch.randn(5))


def test_dropout_under_vmap_asks_how_to_draw():
    x = torch.ones(4, 100)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(ops.dropout)(x)
    masks = torch.func.vmap(ops.dropout, randomness="different")(x)
    assert not torch.equal(masks[0], masks[1])
    masks = torch.func.vmap(ops.dropout, randomness="same")(x)
    assert torch.equal(masks[0], masks[1])


def test_transforms_under_compile():
    def loss(w, x):
        return ops.gelu(ops.layer_norm(x, 8, w), "tanh").square().sum()

    w, x = torch.randn(8), torch.randn(5, 8)
    compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(w, x), torch.func.grad(loss)(w, x))
