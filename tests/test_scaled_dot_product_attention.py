"""ops.scaled_dot_product_attention takes what torch.nn.functional's takes, and refuses likewise."""

import inspect

import pytest
import torch
from accuracy import assert_as_accurate_as_torch, results
from cases import F32
from torch.nn import functional as F

import fastlm
from fastlm import ops

Q, K, V = (2, 4, 9, 16), (2, 4, 13, 16), (2, 4, 13, 16)
NATIVE = {
    "plain": lambda f, q, k, v: f(q, k, v),
    "scale": lambda f, q, k, v: f(q, k, v, scale=0.3),
    "causal": lambda f, q, k, v: f(q, k[:, :, :9], v[:, :, :9], is_causal=True),
    "grouped": lambda f, q, k, v: f(q, k[:, :2], v[:, :2], enable_gqa=True),
    "by position": lambda f, q, k, v: f(q, k[:, :, :9], v[:, :, :9], None, 0.0, True),
    "by name": lambda f, q, k, v: f(query=q, key=k, value=v, attn_mask=None, dropout_p=0.0),
    "bool mask": lambda f, q, k, v: f(q, k, v, torch.ones(9, 13, device=q.device).tril().bool()),
    "added mask": lambda f, q, k, v: f(
        q, k, v, torch.linspace(-3, 3, 117, device=q.device).view(9, 13).to(q.dtype)
    ),
    "values of another width": lambda f, q, k, v: f(q, k, v[..., :5]),
}
REFERENCE = {
    "mask that needs a gradient": lambda f, q, k, v: f(
        q, k, v, torch.zeros(9, 13, dtype=q.dtype, requires_grad=True)
    ),
    "three dimensions": lambda f, q, k, v: f(q[0], k[0], v[0]),
    "batches that spread": lambda f, q, k, v: f(q, k[:1], v[:1]),
    "causal of unequal lengths": lambda f, q, k, v: f(q, k, v, is_causal=True),
}


def test_signature_is_torchs():
    """torch's own is a builtin without one; its documentation has it in words."""
    parameters = inspect.signature(ops.scaled_dot_product_attention).parameters.values()
    documented = F.scaled_dot_product_attention.__doc__.split("->")[0].replace("\n", "")
    spelled = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters]
    assert ", ".join(spelled) in " ".join(documented.split())


def held_to_rule(form):
    inputs = tuple(torch.randn(shape) for shape in (Q, K, V))

    def run(function, *inputs):
        return results(lambda *inputs: form(function, *inputs), inputs, F32)

    ours = run(ops.scaled_dot_product_attention, *inputs)
    theirs = run(F.scaled_dot_product_attention, *inputs)
    truth = run(F.scaled_dot_product_attention, *(t.double() for t in inputs))
    for name in truth:
        assert_as_accurate_as_torch(ours[name], theirs[name], truth[name], name)


@pytest.mark.parametrize("form", NATIVE.values(), ids=NATIVE)
def test_forms_of_the_kernels(form, backend):
    held_to_rule(form)


@pytest.mark.parametrize("form", REFERENCE.values(), ids=REFERENCE)
def test_forms_of_the_reference(form):
    held_to_rule(form)
    inputs = tuple(torch.randn(shape) for shape in (Q, K, V))
    with fastlm.use("cpp"), pytest.raises(fastlm.BackendUnavailable, match="cpp: does not take"):
        form(ops.scaled_dot_product_attention, *inputs)


def test_dropout_keeps_the_expectation():
    """Values of one: what is kept of the probabilities, scaled up, sums to one on average."""
    q, k, v = torch.randn(4, 8, 64, 16), torch.randn(4, 8, 64, 16), torch.ones(4, 8, 64, 16)
    o = ops.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    row_sums = o[..., 0]
    # Each sum has variance sum(p^2) <= 1, and there are 2048 of them: six standard deviations.
    assert abs(row_sums.mean().item() - 1) <= 6 / 2048**0.5
    assert row_sums.std() > 0


X = torch.zeros(2, 4, 9, 16)
BAD = {
    "another head_dim": lambda f: f(X, X[..., :8], X),
    "another dtype": lambda f: f(X, X.double(), X.double()),
    "unequal heads": lambda f: f(X, X[:, :2], X[:, :2]),
    "groups that do not divide": lambda f: f(X, X[:, :3], X[:, :3], enable_gqa=True),
    "a probability above one": lambda f: f(X, X, X, dropout_p=1.5),
    "one dimension": lambda f: f(X[0, 0, 0], X[0, 0, 0], X[0, 0, 0]),
    "a mask of another shape": lambda f: f(X, X, X, torch.zeros(9, 5)),
    "another device": lambda f: f(X, X.to("meta"), X.to("meta")),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_input_raises_what_torch_raises(bad):
    with pytest.raises(Exception) as theirs:
        bad(F.scaled_dot_product_attention)
    with pytest.raises(theirs.type):
        bad(ops.scaled_dot_product_attention)


def test_explain_says_what_runs_on_the_reference(capsys):
    fastlm.explain("scaled_dot_product_attention", X, X, X)
    assert "cpp     taken" in capsys.readouterr().out
    fastlm.explain("scaled_dot_product_attention", X, X, X, torch.zeros(9, 9))
    assert "cpp     taken" in capsys.readouterr().out
    fastlm.explain("scaled_dot_product_attention", X, X, X, torch.zeros(9, 9, requires_grad=True))
    wanted = "cpp     no: does not take an attention mask that needs a gradient"
    assert wanted in capsys.readouterr().out


def test_gradient_of_an_added_mask():
    q, k, v = (torch.randn(shape) for shape in (Q, K, V))
    ours, theirs = (torch.zeros(9, 13, requires_grad=True) for _ in range(2))
    ops.scaled_dot_product_attention(q, k, v, ours).square().sum().backward()
    F.scaled_dot_product_attention(q, k, v, theirs).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    flash = torch.zeros(9, 13, requires_grad=True)
    o = ops.attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=flash)
    o.square().sum().backward()
    torch.testing.assert_close(flash.grad, theirs.grad)


def test_autocast_gives_torchs_dtype():
    q, k, v = (torch.randn(shape) for shape in (Q, K, V))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = F.scaled_dot_product_attention(q, k, v)
        ours = ops.scaled_dot_product_attention(q, k, v)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    narrow = (t.bfloat16() for t in (q, k, v))
    assert torch.equal(ours, ops.scaled_dot_product_attention(*narrow))
