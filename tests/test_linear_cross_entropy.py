"""linear_cross_entropy against torch's linear and cross_entropy."""

import inspect

import pytest
import torch
from cases import BF16, F32, Case, randn
from families import Families
from test_cross_entropy import IGNORE, composition
from torch.nn import functional as F

from fastlm import ops


def ours(x, linear_weight, target, *bias, weights=False, **options):
    """The bias, where there is one, comes last: it gets a gradient."""
    weight = class_weights(linear_weight) if weights else None
    linear_bias = bias[0] if bias else None
    return ops.linear_cross_entropy(
        x, linear_weight, target, linear_bias=linear_bias, weight=weight, **options
    )


def theirs(x, linear_weight, target, *bias, weights=False, **options):
    logits = F.linear(x, linear_weight, *bias)
    logits = logits.to(torch.promote_types(logits.dtype, F32))  # as transformers does
    if weights:
        options["weight"] = class_weights(linear_weight).to(logits.dtype)
    return composition(logits, target, **options)


def class_weights(linear_weight):
    classes = torch.arange(linear_weight.shape[0], device=linear_weight.device)
    return (classes % 7 / 4 + 0.5).to(linear_weight.dtype)  # exact in every dtype


def inputs(rows, classes, features, ignored=0, scale=1.0, bias=False, far=None):
    """`far`: the bias of every ninth class, which is no target."""

    def make():
        x, linear_weight = randn(rows, features, scale=scale), randn(classes, features, scale=0.2)
        target = torch.randint(max(classes, 1), (rows,))
        target[rows - ignored :] = IGNORE
        if not bias:
            return x, linear_weight, target
        linear_bias = randn(classes)
        if far is not None:
            linear_bias[::9] = far
            target[target % 9 == 0] += 1
        return x, linear_weight, target, linear_bias

    return make


def case(name, shape, why, values=None, cancels=1e-30, **options):
    return Case(name, ours, theirs, inputs(*shape, **(values or {})), why, options, cancels)


class TestFamilies(Families):
    forms = (
        case("mean", (33, 1337, 20), "the training loss; many tiles, and more rows than are kept"),
        case("sum", (33, 700, 20), "another reduction", reduction="sum"),
        case("none", (33, 700, 20), "a loss and an upstream gradient a row", reduction="none"),
        case("bias", (33, 700, 20), "a linear layer with a bias", {"bias": True}),
        case("ignore", (33, 700, 20), "rows that do not count", {"ignored": 10}),
        case("smoothing", (33, 700, 20), "sums over all classes", label_smoothing=0.1),
        case("weights", (33, 700, 20), "class weights, cut into tiles", weights=True),
        case(
            "everything", (33, 700, 20), "all options at once", {"ignored": 5, "bias": True},
            label_smoothing=0.1, weights=True, softcap=5.0, lse_square_scale=1e-2, reduction="sum",
        ),
    )  # fmt: skip
    edges = (
        case("no-rows", (0, 700, 20), "an empty batch", reduction="sum"),
        case("one-row", (1, 700, 20), "fewer rows than threads"),
        case("one-class", (5, 1, 20), "the loss is zero", cancels=1.0),
        case("one-feature", (5, 700, 1), "products of one term"),
        case("one-tile", (5, 64, 20), "exactly one tile"),
        case("one-more", (5, 65, 20), "a tile of one class"),
        case("all-kept", (13, 700, 40), "fewer rows than features: every logit is kept"),
        case("codes", (25, 700, 20), "rows that only three quarters of a logit make room for"),
        case("nothing-to-cap", (9, 700, 20), "logits of zero", {"scale": 0.0}, softcap=5.0),
        case("all-ignored", (5, 300, 20), "no row counts: NaN in torch", {"ignored": 5}),
        case("large-logits", (9, 700, 20), "logits near 1000", {"scale": 300.0}),
        case("many-rows", (600, 300, 20), "more rows than the chunks of a GPU"),
        case(
            "padded",
            (33, 700, 20),
            "classes with a bias of -1e9, as a padded vocabulary has",
            {"bias": True, "far": -1e9},
        ),
        case(
            "one-far",
            (33, 700, 20),
            "a bias of -100: what is kept must not depend on the largest",
            {"bias": True, "far": -100.0},
        ),
        case(
            "capped", (33, 700, 20), "what is kept has the softcap's derivative in it", softcap=1.5
        ),
        case(
            "wide-cap",
            (33, 700, 20),
            "a softcap far above the logits",
            {"far": -300.0, "bias": True},
            softcap=1e4,
        ),
        case("capped-smooth", (33, 700, 20), "nothing is kept", softcap=5.0, label_smoothing=0.1),
        case("no-features", (5, 70, 0), "logits of zero", cancels=1.0),
    )


def test_arguments_are_torchs():
    theirs = getattr(F, "linear_cross_entropy", None)
    if theirs is None:
        pytest.skip("this torch has no linear_cross_entropy")
    found = list(inspect.signature(ops.linear_cross_entropy).parameters)
    wanted = list(inspect.signature(theirs).parameters)
    assert found[: len(wanted)] == wanted


def test_torchs_own_samples():
    """PyTorch tests its function on these: other ranks, probabilities, every argument."""
    database = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    infos = [o for o in database.op_db if o.name == "nn.functional.linear_cross_entropy"]
    if not infos:
        pytest.skip("this torch has no linear_cross_entropy")
    samples = [s for o in infos for s in o.sample_inputs("cpu", F32, requires_grad=True)]
    assert len(samples) > 200
    for sample in samples:
        theirs = {name: value for name, value in sample.kwargs.items() if name != "options"}
        leaves = [sample.input, sample.args[0]]
        ours = ops.linear_cross_entropy(sample.input, *sample.args, **sample.kwargs)
        wanted = F.linear_cross_entropy(sample.input, *sample.args, **theirs)
        torch.testing.assert_close(ours, wanted)
        found = torch.autograd.grad(ours.sum(), leaves)
        for a, b in zip(found, torch.autograd.grad(wanted.sum(), leaves), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("upstream", [1.0, 0.3])
def test_backward_twice(upstream, backend):
    x, linear_weight, target = (t for t in inputs(9, 300, 8)())
    leaves = [t.float().requires_grad_() for t in (x, linear_weight)]
    loss = ops.linear_cross_entropy(*leaves, target) * upstream
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(a, b)


def test_gradients_are_the_callers(cpp):
    """What forward computed is handed over: a second backward does not write to it."""
    x, linear_weight, target = inputs(9, 300, 8)()
    leaf = linear_weight.float().requires_grad_()
    loss = ops.linear_cross_entropy(x.float(), leaf, target)
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    wanted = first.clone()
    first.fill_(7)
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], wanted)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_classes_of_probability_zero(dtype, cpp):
    """A bias of -inf, whose logit is kept from forward to backward as what it is."""
    x, linear_weight, target, bias = (t for t in inputs(9, 300, 20, bias=True)())
    bias[5:] = torch.where(torch.arange(295) % 3 == 0, -torch.inf, bias[5:])
    target[:] = torch.arange(9) % 5
    leaves = [t.to(dtype).requires_grad_() for t in (x, linear_weight, bias)]
    found = torch.autograd.grad(ours(*leaves[:2], target, leaves[2]), leaves)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    wanted = torch.autograd.grad(theirs(*wide[:2], target, wide[2]), wide)
    for ours_, truth in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours_.double(), truth, rtol=0, atol=4 * torch.finfo(dtype).eps)
    assert (found[1][5::3] == 0).all() and (found[2][5::3] == 0).all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_kept_exponentials_of_all_sizes(dtype, cpp):
    """A root of each exponential is kept, in 24 or 12 bits. Row r of x picks column r of the weight
    for its logits, and that of the weight's gradient shows what became of them.
    """
    classes = 301  # the last tile has an odd number
    falling = -torch.linspace(0, 40, classes)
    shuffled = torch.randperm(classes)  # so that later tiles raise the base of earlier ones
    padded = falling.where(torch.arange(classes) % 9 > 0, -1e9)
    logits = torch.stack([falling[shuffled], falling + 1000, padded, 0 * falling], dim=1).to(dtype)
    x, target = torch.eye(4, dtype=dtype), torch.tensor([0, 9, 2, 3])
    leaf = logits.clone().requires_grad_()
    ops.linear_cross_entropy(x, leaf, target, reduction="sum").backward()
    softmax = logits.double().softmax(0)
    wanted = softmax - F.one_hot(target, classes).t()
    # A root r that is wrong by half a step d makes (r + d)^2 - r^2, or (r + d)^4 - r^4, of an
    # exponential relative to a base that is up to 1 above the largest logit.
    largest, step = softmax.amax(0), {F32: 2.0**-25, BF16: 2.0**-13}[dtype] * 1.001
    largest = largest * torch.e
    e = softmax / largest
    root = e.sqrt() if dtype == F32 else e.sqrt().sqrt()
    power = 2 if dtype == F32 else 4
    code = largest * ((root + step) ** power - e)
    # A few float32 roundings of the exponential, one of its distance; the gradient's own.
    distance = logits.double().amax(0) - logits.double()
    arithmetic = softmax * (8 + distance.clamp_max(100)) * torch.finfo(F32).eps
    bound = code + arithmetic + wanted.abs() * torch.finfo(dtype).eps / 2
    assert ((leaf.grad.double() - wanted).abs() <= bound + torch.finfo(F32).tiny).all()


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_the_gradients_that_are_wanted(frozen, cpp):
    leaves = [t.float() for t in inputs(9, 300, 8)()[:2]]
    target = torch.randint(300, (9,))
    leaves[1 - frozen].requires_grad_()
    ops.linear_cross_entropy(*leaves, target).backward()
    assert leaves[frozen].grad is None
    wanted = leaves[1 - frozen].grad.clone()
    leaves[1 - frozen].grad = None
    F.cross_entropy(F.linear(*leaves), target).backward()
    torch.testing.assert_close(wanted, leaves[1 - frozen].grad)


def test_any_dimensions_of_rows(cpp):
    x, linear_weight = torch.randn(2, 3, 8), torch.randn(300, 8)
    target = torch.randint(300, (2, 3))
    found = ops.linear_cross_entropy(x, linear_weight, target, reduction="none")
    wanted = F.cross_entropy(F.linear(x, linear_weight).movedim(-1, 1), target, reduction="none")
    torch.testing.assert_close(found, wanted)
    one = ops.linear_cross_entropy(x[0, 0], linear_weight, target[0, 0])
    torch.testing.assert_close(one, wanted[0, 0])


def test_autocast_casts_the_products_as_linear_does():
    x, linear_weight, target = torch.randn(9, 8), torch.randn(300, 8), torch.randint(300, (9,))
    wanted = ops.linear_cross_entropy(x.to(BF16), linear_weight.to(BF16), target)
    leaf = linear_weight.requires_grad_()
    with torch.autocast("cpu", dtype=BF16):
        found = ops.linear_cross_entropy(x, leaf, target)
    found.backward()
    assert torch.equal(found, wanted) and leaf.grad.dtype == F32


BAD = {
    "other features": (RuntimeError, "linear_weight", lambda f: f(X, torch.randn(7, 5), T)),
    "no class": (RuntimeError, "linear_weight", lambda f: f(X, W[:0], T)),
    "another dtype": (RuntimeError, "linear_weight", lambda f: f(X, W.double(), T)),
    "a bias of another shape": (
        RuntimeError, "linear_bias", lambda f: f(X, W, T, linear_bias=torch.randn(6)),
    ),
    "a target of another shape": (ValueError, "target", lambda f: f(X, W, T[:2])),
    "a target that is a float": (RuntimeError, "target", lambda f: f(X, W, T.float())),
    "a target outside": (IndexError, "target: row 1 holds 7", lambda f: f(X, W, T + 6)),
    "a negative target": (IndexError, "target: row 0 holds -1", lambda f: f(X, W, T - 1)),
    "an unknown reduction": (ValueError, "reduction", lambda f: f(X, W, T, reduction="max")),
    "too much smoothing": (
        RuntimeError, "label_smoothing", lambda f: f(X, W, T, label_smoothing=2),
    ),
    "a weight of another shape": (RuntimeError, "weight", lambda f: f(X, W, T, weight=X[0])),
}  # fmt: skip
X, W, T = torch.randn(3, 4), torch.randn(7, 4), torch.tensor([0, 1, 0])


@pytest.mark.parametrize("kind, message, bad", BAD.values(), ids=BAD)
def test_bad_input(kind, message, bad, cpp):
    with pytest.raises(kind, match=f"linear_cross_entropy: {message}"):
        bad(ops.linear_cross_entropy)
