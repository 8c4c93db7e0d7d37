"""cross_entropy against torch's own: values, gradients, and what backward may be asked for."""

import pytest
import torch
from accuracy import assert_as_accurate_as_torch, results
from cases import BF16, F32, F64, Case, randn
from families import Families, assert_same_bits
from torch.nn import functional as F

from fastlm import ops

IGNORE = -100


def composition(logits, target, softcap=None, lse_square_scale=0.0, **options):
    """F.cross_entropy, and what it lacks; target -100 is ignored."""
    z = softcap * torch.tanh(logits / softcap) if softcap else logits
    loss = F.cross_entropy(z, target, **options)
    if not lse_square_scale:
        return loss
    squares = z.logsumexp(-1).square().masked_fill(target == IGNORE, 0)
    reduction = options.get("reduction", "mean")
    total = {"none": squares, "sum": squares.sum(), "mean": squares.sum() / (target >= 0).sum()}
    return loss + lse_square_scale * total[reduction]


def weighted(function):
    """With class weights, which get no gradient, neither here nor in torch."""

    def call(logits, target, **options):
        classes = torch.arange(logits.shape[1], device=logits.device)
        weight = (classes % 7 / 4 + 0.5).to(logits.dtype)  # exact in every dtype
        return function(logits, target, weight=weight, **options)

    return call


def inputs(rows, classes, ignored=0, scale=1.0, shift=0.0, rise=0.0, hidden=slice(0)):
    """Logits, of which columns `hidden` are -inf, and targets elsewhere; the last are ignored."""

    def make():
        logits = randn(rows, classes, scale=scale, shift=shift)
        logits += torch.linspace(0, rise, classes)
        logits[:, hidden] = float("-inf")
        target = torch.randint(max(classes // 2, 0), max(classes, 1), (rows,))
        target[rows - ignored :] = IGNORE
        return logits, target

    return make


def case(name, shape, why, *, weights=False, cancels=1e-30, values=None, **options):
    ours, theirs = (ops.cross_entropy, composition)
    if weights:
        ours, theirs = weighted(ours), weighted(theirs)
    return Case(name, ours, theirs, inputs(*shape, **(values or {})), why, options, cancels)


def in_place(logits, target, **options):
    return ops.cross_entropy(logits.clone(), target, inplace_backward=True, **options)


FORMS = (
    case("mean", (40, 1001), "GPT-2's loss: forward writes the gradient", values={"ignored": 7}),
    case("sum", (40, 1001), "no denominator", reduction="sum"),
    case("none", (40, 1001), "forward and backward apart", values={"ignored": 3}, reduction="none"),
    case("smooth", (40, 1001), "every class has a part in the target", label_smoothing=0.1),
    case("weight", (40, 1001), "the mean divides by the targets' weights; weights of smoothing",
         values={"ignored": 5}, weights=True, label_smoothing=0.1),
    case("z-loss", (40, 1001), "the square of lse moves every logit", values={"ignored": 5},
         lse_square_scale=0.01),
    case("softcap", (40, 1001), "its derivative; apart and with everything else", weights=True,
         softcap=2.0, label_smoothing=0.1, lse_square_scale=0.01, reduction="none"),
)  # fmt: skip
IN_PLACE = Case("in-place", in_place, composition, inputs(40, 1001, ignored=7),
                "the gradient is written over the logits")  # fmt: skip
EDGES = (
    IN_PLACE,
    case("no-rows", (0, 50), "an empty batch; its mean is 0 / 0", reduction="sum"),
    case("no-rows-mean", (0, 50), "an empty batch; its mean is 0 / 0"),
    case("one-class", (3, 1), "the loss is exactly zero", cancels=1.0),
    case("one-row", (1, 257), "fewer rows than threads; one more than whole vectors"),
    case("gpt2", (3, 50257), "GPT-2's vocabulary: neither vectors nor chunks divide it"),
    case("gpt2-none", (3, 50257), "the same, forward and backward apart", reduction="none"),
    case("all-ignored", (4, 50), "0 / 0, which torch calls NaN", values={"ignored": 4}),
    case("all-ignored-sum", (4, 50), "zero, with a gradient of zero", values={"ignored": 4},
         reduction="sum"),
    case("far", (5, 1001), "a trained GPT-2's logits: a rounded lse must not show in the gradient",
         values={"scale": 5.0, "shift": -100.0}),
    case("huge", (5, 1001), "exponentials of 1e4 would overflow", values={"scale": 1e4}),
    case("rising", (5, 5001), "later chunks far above the first, past what float32 can hold",
         values={"rise": 300.0}),
    case("masked", (5, 5001), "logits of -inf, whole chunks of them at the start",
         values={"hidden": slice(0, 2100)}),
    case("masked-none", (5, 5001), "the same, forward and backward apart",
         values={"hidden": slice(0, 2100)}, reduction="none"),
)  # fmt: skip
LARGE = (
    case("streamed-sum", (96, 50257), "forward streams the gradient", reduction="sum"),
    case("streamed-none", (96, 50257), "backward streams the gradient", reduction="none"),
)


class TestFamilies(Families):
    forms, edges, large = FORMS, EDGES, LARGE


def test_in_place_backward_with_opcheck_and_compiled():
    """It cannot be a form, as no backward can come after the one that overwrites the logits."""
    Families().test_opcheck(IN_PLACE)
    Families().test_compiled_whole_and_dynamic(IN_PLACE)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_is_float32_for_bfloat16_logits(reduction, backend):
    logits, target = torch.randn(5, 9, dtype=BF16), torch.tensor([0, 8, 3, -100, 1])
    loss = ops.cross_entropy(logits, target, reduction=reduction)
    assert loss.dtype == F32
    truth = F.cross_entropy(logits.double(), target, reduction=reduction)
    wide = F.cross_entropy(logits.float(), target, reduction=reduction)
    assert_as_accurate_as_torch(loss, wide, truth, "loss in float32")


def test_other_ignore_index(backend):
    """-1, as nanoGPT and nanochat have it, and one that is a class."""
    logits = torch.randn(6, 9)
    for index in (-1, 4):
        target = torch.tensor([0, index, 3, index, 1, 8])
        expected = F.cross_entropy(logits, target, ignore_index=index)
        torch.testing.assert_close(ops.cross_entropy(logits, target, ignore_index=index), expected)


# ---- what backward may be asked for ----


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("upstream", [1.0, 3.0, -0.5])
def test_two_backwards_of_a_retained_graph(reduction, upstream, cpp):
    """The first hands over what forward wrote; the second must not find it changed or gone."""
    logits, target = torch.randn(40, 1001, requires_grad=True), torch.randint(1001, (40,))
    factor = torch.tensor(upstream)
    truth = logits.detach().double().requires_grad_()
    F.cross_entropy(truth, target, reduction=reduction).backward(factor.double())
    theirs = torch.autograd.grad(
        F.cross_entropy(logits, target, reduction=reduction), logits, factor
    )[0]
    loss = ops.cross_entropy(logits, target, reduction=reduction)
    for which in ("first", "second", "third"):
        found = torch.autograd.grad(loss, logits, factor, retain_graph=True)[0]
        assert_as_accurate_as_torch(found, theirs, truth.grad, f"{which} backward")
        found.fill_(torch.nan)  # what a caller does with its gradient is its own business


def test_a_freed_graph_is_refused_as_in_torch():
    logits, target = torch.randn(4, 9, requires_grad=True), torch.tensor([1, 2, 3, 4])
    loss = ops.cross_entropy(logits, target)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_in_place_backward_writes_over_the_logits(backend):
    leaf, target = torch.randn(40, 1001, requires_grad=True), torch.randint(1001, (40,))
    logits = leaf * 1
    version = logits._version
    ops.cross_entropy(logits, target, inplace_backward=True).backward()
    assert torch.equal(logits, leaf.grad)
    assert logits._version > version


def test_in_place_backward_is_refused_where_the_logits_are_needed():
    """The version tells autograd that what another function saved is gone."""
    logits = torch.randn(4, 9, requires_grad=True) * 1
    other = logits.exp().sum() + logits.square().sum()
    loss = ops.cross_entropy(logits, torch.tensor([1, 2, 3, 4]), inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("form", FORMS[:3], ids=str)
def test_no_gradient_is_computed_where_none_is_wanted(form, monkeypatch):
    calls = []
    losses = ops._cross_entropy._losses
    monkeypatch.setattr(
        ops._cross_entropy, "_losses",
        lambda *arguments: calls.append(arguments[-2]) or losses(*arguments),
    )  # fmt: skip
    logits, target = form.make(F32)
    form.run(logits, target)
    with torch.no_grad():
        form.run(logits.requires_grad_(), target)
    assert calls == [None, None]


def test_gradients_of_float64_are_float64():
    found = results(FORMS[0].run, FORMS[0].make(F64), F64)
    assert {t.dtype for t in found.values()} == {F64}


def test_rows_do_not_see_each_other(cpp):
    """A row's gradient does not depend on where in a batch it stands."""
    logits, target = torch.randn(40, 1001), torch.randint(1001, (40,))

    def run(rows):
        return results(lambda x: ops.cross_entropy(x, target[rows], reduction="sum"),
                       (logits[rows],), F32)["gradient 0"]  # fmt: skip

    assert_same_bits({"g": run(slice(0, 40))[11:13]}, {"g": run(slice(11, 13))})
