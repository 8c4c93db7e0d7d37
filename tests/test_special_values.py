"""Values at which kernels break: NaN with a payload, infinities, the largest and the smallest
floats, constant rows, empty tensors; and inputs that are refused. Longer than 300 lines: every
section asks all ops."""

import struct
import sys

import pytest
import torch
from accuracy import assert_as_accurate_as_torch
from cases import BF16, F32, F64
from torch.nn import functional as F

import fastlm
from fastlm import ops

INF, NAN = float("inf"), float("nan")
HUGE = torch.finfo(F32).max
# Some kernels add to an exponent's bits: what they make of a NaN depends on its payload.
PAYLOADS = (0x7FC00000, 0x7FC00001, 0x7FFFFFFF, 0xFFC00001, 0x7F800001)


def nan_of(bits: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(struct.pack("<I", bits)), dtype=F32)


# ---- NaN ----


@pytest.mark.parametrize("bits", PAYLOADS, ids=hex)
def test_every_nan_stays_one(bits, backend):
    nan = nan_of(bits)[0]
    x = torch.randn(3, 100)
    x[1, 30] = nan
    target = torch.tensor([1, 2, 3])
    row = torch.tensor([False, True, False])
    for approximate in ("none", "tanh"):
        leaf = x.clone().requires_grad_()
        y = ops.gelu(leaf, approximate)
        y.sum().backward()
        assert torch.equal(y.isnan(), x.isnan()) and torch.equal(leaf.grad.isnan(), x.isnan())
    for loss in (
        ops.cross_entropy(x, target, reduction="none"),
        ops.cross_entropy(x, target, reduction="none", softcap=5.0),
        ops.linear_cross_entropy(x, torch.randn(70, 100), target, reduction="none"),
    ):
        assert torch.equal(loss.isnan(), row)
    for y in (ops.layer_norm(x, 100), ops.rms_norm(x, 100), ops.add_layer_norm(x, x)[0]):
        assert y[1].isnan().all() and not y[[0, 2]].isnan().any()


@pytest.mark.parametrize("queries", [2, 70], ids=["decoding", "blocks"])
@pytest.mark.parametrize("bits", PAYLOADS[:2], ids=hex)
def test_a_nan_key_reaches_who_sees_it(bits, queries, backend):
    q, k, v = (torch.randn(1, n, 2, 16) for n in (queries, 70, 70))
    k[0, 69, 0] = nan_of(bits)[0]
    o = ops.attention(q, k, v, causal=True)
    assert o[0, -1, 0].isnan().all()
    assert not o[0, :-1].isnan().any() and not o[0, :, 1].isnan().any()


# ---- infinities and the largest floats ----


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_gelu_where_it_is_flat(approximate, dtype, backend):
    values = [-INF, INF, NAN, -3.3e38, 3.3e38, -1e20, 1e20, -40.0, 40.0, -12.0, -0.0, 1e-40]
    x = torch.tensor(values).to(dtype)
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    y, truth = ops.gelu(leaf, approximate), F.gelu(wide, approximate=approximate)
    y.sum().backward()
    truth.sum().backward()
    torch.testing.assert_close(y.double(), truth, equal_nan=True, rtol=1e-2, atol=1e-30)
    torch.testing.assert_close(leaf.grad.double(), wide.grad, equal_nan=True, rtol=1e-2, atol=1e-30)


def test_logits_of_minus_infinity_far_below_zero(backend):
    """A whole chunk of classes, of rows whose other logits are far from zero."""
    logits = torch.randn(2, 4096) - 100
    logits[:, :2048] = -INF
    target = torch.tensor([3000, 4000])
    for reduction in ("mean", "sum", "none"):
        leaf, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
        ops.cross_entropy(leaf, target, reduction=reduction).sum().backward()
        F.cross_entropy(wide, target, reduction=reduction).sum().backward()
        torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=0, atol=4e-7)
        assert (leaf.grad[:, :2048] == 0).all()


@pytest.mark.parametrize("queries", [3, 70], ids=["decoding", "blocks"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_values_near_the_largest_float(queries, dtype, backend):
    """Their average is finite, while their sum is not."""
    q, k = torch.randn(1, queries, 2, 16).to(dtype), torch.randn(1, 90, 2, 16).to(dtype)
    v = (torch.rand(1, 90, 2, 16) * 0.5 + 0.5).mul(0.99 * HUGE).to(dtype)
    o, lse = ops.attention(q, k, v, return_lse=True)
    wide = (t.double().transpose(1, 2) for t in (q, k, v))
    truth = F.scaled_dot_product_attention(*wide).transpose(1, 2)
    theirs = truth.to(dtype)
    assert_as_accurate_as_torch(o, theirs, truth, "values near the largest float")
    _, wanted = ops.attention(q, k, v / HUGE, return_lse=True)
    torch.testing.assert_close(lse, wanted)


def test_a_window_wider_than_any_sequence(backend):
    q = torch.randn(1, 70, 2, 16)
    widest = (sys.maxsize, sys.maxsize)
    assert torch.equal(ops.attention(q, q, q, window_size=widest), ops.attention(q, q, q))
    assert torch.equal(ops.attention(q, q, q, window_size=(None, None)), ops.attention(q, q, q))
    left = ops.attention(q, q, q, window_size=(sys.maxsize, 0))
    assert torch.equal(left, ops.attention(q, q, q, causal=True))


def test_no_softcap_in_every_spelling(backend):
    q, logits = torch.randn(1, 5, 2, 16), torch.randn(4, 9)
    weight, target = torch.randn(70, 9), torch.tensor([1, 2, 3, 4])
    for none in (None, 0, 0.0, INF):
        assert torch.equal(ops.attention(q, q, q, softcap=none), ops.attention(q, q, q))
        found = ops.cross_entropy(logits, target, softcap=none)
        assert torch.equal(found, ops.cross_entropy(logits, target))
        found = ops.linear_cross_entropy(logits, weight, target, softcap=none)
        assert torch.equal(found, ops.linear_cross_entropy(logits, weight, target))


@pytest.mark.parametrize("softcap", [-1.0, NAN, -INF])
def test_a_softcap_that_is_none_is_refused(softcap):
    q, logits, target = torch.randn(1, 5, 2, 16), torch.randn(4, 9), torch.tensor([1, 2, 3, 4])
    cache = torch.zeros(1, 9, 2, 16)
    calls = {
        "attention": lambda: ops.attention(q, q, q, softcap=softcap),
        "attention_with_kvcache": lambda: ops.attention_with_kvcache(
            q, cache, cache, softcap=softcap
        ),
        "cross_entropy": lambda: ops.cross_entropy(logits, target, softcap=softcap),
        "linear_cross_entropy": lambda: ops.linear_cross_entropy(
            logits, torch.randn(7, 9), target, softcap=softcap
        ),
    }
    for op, call in calls.items():
        with pytest.raises(ValueError, match=f"{op}: softcap: expected a number of at least 0"):
            call()


# ---- constant rows ----


@pytest.mark.parametrize("columns", [1, 100, 768, 1000, 9000])
@pytest.mark.parametrize("value", [1.1, 1234.567, -3e6])
def test_a_constant_row_normalises_to_zero(value, columns, backend):
    """What its mean is rounded by would be all that it differs from it."""
    x = torch.full((2, columns), value, requires_grad=True)
    bias = torch.randn(columns)
    y = ops.layer_norm(x, columns, torch.randn(columns), bias)
    assert torch.equal(y, bias.expand(2, columns))
    weight = torch.randn(columns, requires_grad=True)
    ops.layer_norm(x, columns, weight).sum().backward()
    assert (weight.grad == 0).all()
    wide, same = x.detach().double().requires_grad_(), x.detach().clone().requires_grad_()
    F.layer_norm(wide, (columns,), weight.detach().double()).sum().backward()
    F.layer_norm(same, (columns,), weight.detach()).sum().backward()
    if columns == 1:
        assert (x.grad == 0).all()
    else:
        assert_as_accurate_as_torch(x.grad, wide.grad.float(), wide.grad, "gradient")
    half = torch.full((2, columns), value / 2)
    assert torch.equal(ops.add_layer_norm(half, half, None, bias)[0], bias.expand(2, columns))


@pytest.mark.parametrize("columns", [9, 33, 9000])
def test_a_row_whose_squares_overflow(columns, backend):
    """Its variance is inf, so that it becomes 0, as in torch, and no NaN."""
    x = torch.randn(3, columns) * 1e30
    for y in (ops.layer_norm(x, columns), ops.rms_norm(x, columns), ops.add_layer_norm(x, x)[0]):
        assert (y == 0).all()


# ---- empty tensors ----


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=["no batch", "no sequence"])
def test_empty_tensors_have_empty_gradients(shape, backend):
    """sum() gives a gradient whose strides are 0."""
    x = torch.randn(*shape, 3, 8, requires_grad=True)
    for y in (
        ops.attention(x, x, x),
        ops.attention(x, x, x, dropout_p=0.1),
        ops.scaled_dot_product_attention(*[x.transpose(1, 2)] * 3).transpose(1, 2),
        ops.layer_norm(x, 8),
        ops.rms_norm(x, 8),
        ops.gelu(x),
        ops.dropout(x),
        ops.add_layer_norm(x, x)[0],
    ):
        assert y.shape == x.shape
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.shape == x.shape
    strided = torch.randn(0, 5, 3, 16)[..., ::2]
    assert ops.attention(strided, strided, strided).shape == strided.shape


def test_no_features_and_no_head_dim():
    target = torch.tensor([0, 3, 6])
    x, weight = torch.randn(3, 0, requires_grad=True), torch.randn(7, 0, requires_grad=True)
    bias = torch.randn(7, requires_grad=True)
    loss = ops.linear_cross_entropy(x, weight, target, linear_bias=bias)
    wanted = F.cross_entropy(F.linear(x, weight, bias), target)
    torch.testing.assert_close(loss, wanted)
    found = torch.autograd.grad(loss, (x, weight, bias))
    for ours, theirs in zip(found, torch.autograd.grad(wanted, (x, weight, bias)), strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        assert torch.equal(ops.linear(x, weight, bias), F.linear(x, weight, bias))
    q = torch.randn(2, 3, 5, 0)
    assert ops.scaled_dot_product_attention(q, q, q).shape == q.shape
    for norm in (ops.layer_norm, ops.rms_norm):
        assert norm(torch.randn(3, 0), 0).shape == (3, 0)


def test_more_than_eight_dimensions(backend):
    x = torch.randn(2, 1, 2, 1, 2, 1, 2, 1, 3, 8, requires_grad=True)
    for ours, theirs in (
        (ops.layer_norm(x, 8), F.layer_norm(x, (8,))),
        (ops.layer_norm(x, (3, 8)), F.layer_norm(x, (3, 8))),
        (ops.rms_norm(x, 8), F.rms_norm(x, (8,))),
        (ops.gelu(x), F.gelu(x)),
    ):
        torch.testing.assert_close(ours, theirs)
        found, wanted = (torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, theirs))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert ops.dropout(x).shape == ops.add_layer_norm(x, x)[0].shape == x.shape


# ---- what is refused, and what is not ----

INTEGERS = [torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_dtypes_that_torch_refuses(dtype):
    x = torch.ones(3, 8).to(dtype)
    target, pair = torch.tensor([1, 2, 3]), x[None, :, None]
    calls = {
        "gelu": lambda: ops.gelu(x),
        "layer_norm": lambda: ops.layer_norm(x, 8),
        "rms_norm": lambda: ops.rms_norm(x, 8),
        "add_layer_norm": lambda: ops.add_layer_norm(x, x),
        "dropout": lambda: ops.dropout(x),
        "cross_entropy": lambda: ops.cross_entropy(x, target),
        "linear_cross_entropy": lambda: ops.linear_cross_entropy(x, x.repeat(2, 1), target),
        "attention": lambda: ops.attention(pair, pair, pair),
        "attention_with_kvcache": lambda: ops.attention_with_kvcache(pair, pair, pair),
    }
    for op, call in calls.items():
        with pytest.raises(NotImplementedError, match=f"{op}: .*: expected a floating-point dtype"):
            call()
    with pytest.raises((RuntimeError, NotImplementedError)):
        ops.scaled_dot_product_attention(pair, pair, pair)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64], ids=str)
def test_class_indices_of_other_widths(dtype, backend):
    x, weight, target = torch.randn(3, 8), torch.randn(9, 8), torch.tensor([1, 0, 8])
    logits = x @ weight.T
    wanted = F.cross_entropy(logits, target)
    torch.testing.assert_close(ops.cross_entropy(logits, target.to(dtype)), wanted)
    torch.testing.assert_close(ops.linear_cross_entropy(x, weight, target.to(dtype)), wanted)


def test_probabilities_have_no_ignored_index():
    logits = torch.randn(3, 9)
    with pytest.raises(RuntimeError) as theirs:
        F.cross_entropy(logits, logits.softmax(-1), ignore_index=2)
    with pytest.raises(theirs.type, match="ignore_index"):
        ops.cross_entropy(logits, logits.softmax(-1), ignore_index=2)


def test_probabilities_give_a_float32_loss():
    logits = torch.randn(3, 9).to(BF16)
    loss = ops.cross_entropy(logits, logits.float().softmax(-1).to(BF16))
    assert loss.dtype == F32


def test_dropout_in_float64_is_not_rounded(cpp):
    x = torch.randn(30, 41, dtype=F64)
    y = ops.dropout(x, 0.1)
    kept = y != 0
    assert torch.equal(y[kept], (x / (1 - 0.1))[kept]) or torch.allclose(
        y[kept], (x / (1 - 0.1))[kept], rtol=4 * torch.finfo(F64).eps, atol=0
    )


# ---- tensors that come twice ----


def twice(name):
    def attention(x):
        return ops.attention(x, x, x)

    def add_layer_norm(x):
        return ops.add_layer_norm(x, x)[0]

    def layer_norm(x):
        return ops.layer_norm(x, 8, x[0, 0, 0], x[0, 0, 0])

    def one_weight(x):
        weight = x[0, 0, 0]
        return ops.layer_norm(x, 8, weight, weight)

    return locals()[name]


@pytest.mark.parametrize("name", ["attention", "add_layer_norm", "layer_norm", "one_weight"])
def test_a_tensor_that_comes_twice_compiles_and_exports(name):
    function = twice(name)
    x = torch.randn(2, 5, 4, 8, requires_grad=True)
    wanted = function(x)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, wanted)
    found = torch.autograd.grad(compiled.square().sum(), x)[0]
    torch.testing.assert_close(found, torch.autograd.grad(wanted.square().sum(), x)[0])

    class Module(torch.nn.Module):
        def forward(self, x):
            return function(x)

    exported = torch.export.export(Module(), (x.detach(),), strict=True)
    torch.testing.assert_close(exported.module()(x.detach()), wanted.detach())


def test_second_derivatives_that_hide_are_refused():
    """grad() with allow_unused goes only where its inputs are: the refusal must lie on the way."""
    x, w = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    loss = (ops.gelu(x) * w).sum()
    first = torch.autograd.grad(loss, x, create_graph=True)[0]
    penalty = first.square().sum() + (x * w).sum()
    with pytest.raises(RuntimeError, match="gelu: expected to be differentiated once"):
        torch.autograd.grad(penalty, x, allow_unused=True, retain_graph=True)
    with pytest.raises(RuntimeError, match="gelu: expected to be differentiated once"):
        penalty.backward()


def test_explain_names_what_is_refused(capsys):
    x, target = torch.randn(3, 8), torch.tensor([1, 2, 3])
    fastlm.explain("linear_cross_entropy", x, torch.randn(4, 2, 8), target)
    assert "a linear_weight of more than two dimensions" in capsys.readouterr().out
    fastlm.explain("linear_cross_entropy", x, torch.randn(8, 8), torch.rand(3, 8))
    assert "class-probability targets" in capsys.readouterr().out
