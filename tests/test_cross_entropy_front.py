"""ops.cross_entropy takes what torch.nn.functional's takes, and refuses what it refuses."""

import inspect

import pytest
import torch
from accuracy import assert_as_accurate_as_torch, results
from cases import F32
from torch.nn import functional as F

import fastlm
from fastlm import ops


def test_signature_begins_as_torchs():
    ours, theirs = (
        [(p.name, p.default, p.kind) for p in inspect.signature(f).parameters.values()]
        for f in (ops.cross_entropy, F.cross_entropy)
    )
    assert ours[: len(theirs)] == theirs
    assert {kind for *_, kind in ours[len(theirs) :]} == {inspect.Parameter.KEYWORD_ONLY}


def targets(*shape):
    return torch.randint(5, shape)


def probabilities(*shape):
    return torch.randn(shape).softmax(1 if len(shape) > 1 else 0)


FORMS = {
    "one dimension": lambda f, x: f(x[0, :, 0, 0], torch.tensor(3)),
    "two dimensions": lambda f, x: f(x[:, :, 0, 0], targets(4)),
    "three dimensions": lambda f, x: f(x[:, :, :, 0], targets(4, 2)),
    "four dimensions": lambda f, x: f(x, targets(4, 2, 3)),
    "four dimensions, none": lambda f, x: f(x, targets(4, 2, 3), reduction="none"),
    "four dimensions, smooth": lambda f, x: f(x, targets(4, 2, 3), label_smoothing=0.2),
    "weight": lambda f, x: f(x, targets(4, 2, 3), torch.arange(1.0, 6.0)),
    "weight, smooth, ignored": lambda f, x: f(
        x, targets(4, 2, 3), torch.arange(1.0, 6.0), ignore_index=2, label_smoothing=0.2
    ),
    "probabilities": lambda f, x: f(x, probabilities(4, 5, 2, 3)),
    "probabilities of one dimension": lambda f, x: f(x[0, :, 0, 0], probabilities(5)),
    "probabilities, weight, smooth": lambda f, x: f(
        x, probabilities(4, 5, 2, 3), torch.arange(1.0, 6.0), label_smoothing=0.2, reduction="sum"
    ),
    "uint8 targets": lambda f, x: f(x[:, :, 0, 0], targets(4).byte()),
    "legacy size_average": lambda f, x: f(x, targets(4, 2, 3), None, False),
    "legacy reduce": lambda f, x: f(x, targets(4, 2, 3), reduce=False),
    "everything by position": lambda f, x: f(
        x, targets(4, 2, 3), None, None, 1, None, "mean", 0.1
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms_are_torchs(form, backend):
    if backend != "torch" and "probabilities" in form.__code__.co_names:
        with pytest.raises(fastlm.BackendUnavailable, match="class-probability targets"):
            form(ops.cross_entropy, torch.randn(4, 5, 2, 3))
        return
    x = torch.randn(4, 5, 2, 3)

    def run(function, x):
        torch.manual_seed(1)  # the same targets for all
        return results(lambda x: form(function, x), (x,), F32)

    try:
        truth = run(F.cross_entropy, x.double())
    except RuntimeError:  # the weights are float32, which torch wants to be the logits' dtype
        truth = {name: t.double() for name, t in run(F.cross_entropy, x).items()}
    ours, theirs = run(ops.cross_entropy, x), run(F.cross_entropy, x)
    for name in truth:
        assert_as_accurate_as_torch(ours[name], theirs[name], truth[name], name)


def test_explain_says_what_runs_on_the_reference(capsys):
    fastlm.explain("cross_entropy", torch.randn(4, 5), probabilities(4, 5))
    assert "cpp     no: does not take class-probability targets" in capsys.readouterr().out


X = torch.zeros(4, 5)
BAD = {
    "a scalar": lambda f: f(torch.zeros(()), torch.tensor(0)),
    "too few targets": lambda f: f(X, torch.zeros(3).long()),
    "targets of another shape": lambda f: f(torch.zeros(4, 5, 2), torch.zeros(4, 3).long()),
    "a target past the classes": lambda f: f(X, torch.tensor([0, 1, 5, 2])),
    "a negative target": lambda f: f(X, torch.tensor([0, 1, -1, 2])),
    "a target that is not a number of a class": lambda f: f(X, torch.zeros(4, dtype=torch.bool)),
    "a weight of another shape": lambda f: f(X, torch.zeros(4).long(), torch.ones(4)),
    "an unknown reduction": lambda f: f(X, torch.zeros(4).long(), reduction="average"),
    "smoothing above one": lambda f: f(X, torch.zeros(4).long(), label_smoothing=1.5),
    "a target of another device": lambda f: f(X, torch.zeros(4, device="meta").long()),
    "probabilities of another shape": lambda f: f(X, torch.zeros(4, 4)),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_input_raises_what_torch_raises(bad):
    with pytest.raises(Exception) as theirs:
        bad(F.cross_entropy)
    with pytest.raises(theirs.type):
        bad(ops.cross_entropy)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("value", [-1, 5, 2**40])
def test_target_out_of_range_names_row_value_and_what_is_accepted(value, reduction, cpp):
    target = torch.tensor([0, 1, value, 2])
    message = rf"target: row 2 holds {value}; accepted are 0 to 4 and ignore_index -100"
    with pytest.raises(IndexError, match=message):
        ops.cross_entropy(X, target, reduction=reduction)
    with pytest.raises(IndexError, match=message):
        ops.cross_entropy(X.clone().requires_grad_(), target, reduction=reduction)


@pytest.mark.parametrize("extra", [{"softcap": 5.0}, {"lse_square_scale": 0.1}], ids=str)
def test_extras_do_not_go_with_probabilities(extra):
    with pytest.raises(ValueError, match="expected neither with class-probability targets"):
        ops.cross_entropy(X, probabilities(4, 5), **extra)
