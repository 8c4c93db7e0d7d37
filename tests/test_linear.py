"""linear against torch's, in both layouts of the weight."""

import pytest
import torch
from accuracy import assert_as_accurate_as_torch
from cases import BF16, F32, LAYOUTS
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from fastlm import ops

SHAPES = {
    (1, 768, 2304): "GPT-2's, in pairs",
    (3, 768, 2304): "rows in twos and ones",
    (7, 64, 96): "rows in fours, twos and ones",
    (8, 16, 32): "the least that goes in pairs; as many rows as are taken",
    (2, 17, 33): "no vector divides it",
    (2, 800, 40): "inputs in pairs, outputs not",
    (1, 4099, 1): "one output, and a tail of inputs",
    (1, 1, 5000): "one input",
    (0, 8, 8): "no rows",
}


def make(shape, dtype, in_major, bias=True):
    rows, inputs, outputs = shape
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    weight = weight.t().contiguous().t() if in_major else weight
    return (x, weight, torch.randn(outputs).to(dtype)) if bias else (x, weight, None)


@pytest.mark.parametrize("in_major", [False, True], ids=["out-major", "in-major"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_torch(shape, dtype, in_major, cpp, poisoned):
    for bias in (True, False):
        inputs = make(shape, dtype, in_major, bias)
        truth = F.linear(*(None if t is None else t.double() for t in inputs))
        found = ops.linear(*inputs)
        assert found.dtype == dtype
        assert_as_accurate_as_torch(found, F.linear(*inputs), truth, str(shape))


@pytest.mark.parametrize("in_major", [False, True], ids=["out-major", "in-major"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(8, 768, 2304), (8, 50, 300)], ids=str)
def test_same_bits_in_any_batch_and_with_any_number_of_threads(
    shape, dtype, in_major, cpp, threads
):
    x, weight, bias = make(shape, dtype, in_major)
    wanted = ops.linear(x, weight, bias)
    for count in (1, 2, 3, 5):
        threads(count)
        assert torch.equal(ops.linear(x, weight, bias), wanted)
        for first, rows in ((0, 1), (3, 2), (1, 3), (2, 5)):
            part = slice(first, first + rows)
            assert torch.equal(ops.linear(x[part], weight, bias), wanted[part])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, cpp):
    """A weight with gaps is torch's, which is asked for as the other backend."""
    x, weight, bias = make((3, 64, 96), F32, False)
    assert torch.equal(ops.linear(layout(x), weight, bias), ops.linear(x, weight, bias))
    assert "gaps" in str(ops.describe_call("linear", x, LAYOUTS[1](weight))[1])


TORCHS = {
    "gradients": lambda x, w: (x.requires_grad_(), w),
    "many rows": lambda x, w: (x.repeat(9, 1), w),
    "float16": lambda x, w: (x.half(), w.half()),
    "gaps": lambda x, w: (x, w[:, ::2].repeat_interleave(2, 1)[:, ::2].repeat(1, 2)),
}


@pytest.mark.parametrize("change", TORCHS.values(), ids=TORCHS)
def test_what_torch_runs(change):
    x, weight = change(*make((1, 64, 96), F32, False)[:2])
    torch.testing.assert_close(ops.linear(x, weight), F.linear(x, weight))


def test_gradients_flow():
    x, weight, bias = (t.requires_grad_() for t in make((2, 8, 16), F32, False))
    ops.linear(x, weight, bias).sum().backward()
    assert all(t.grad is not None for t in (x, weight, bias))


def test_autocast_decides_the_dtype():
    x, weight, bias = make((2, 8, 16), F32, False)
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        assert ops.linear(x, weight, bias).dtype == BF16


@pytest.mark.parametrize("shape", [(3, 5), (7,)], ids=str)
def test_bad_shapes_raise_what_torch_raises(shape):
    with pytest.raises(RuntimeError):
        ops.linear(torch.randn(2, 4), torch.randn(shape))
    with pytest.raises(RuntimeError):
        ops.linear(torch.randn(2, 4), torch.randn(7, 4), torch.randn(6))


def test_compiles_whole_without_recompiling_for_another_step():
    with torch.no_grad():
        x, weight, bias = make((1, 64, 96), F32, True)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(ops.linear, fullgraph=True, backend=counter)
        for _ in range(3):
            x = torch.randn_like(x)
            assert torch.equal(compiled(x, weight, bias), ops.linear(x, weight, bias))
        assert counter.frame_count == 1


def test_opcheck():
    for in_major in (False, True):
        inputs = make((2, 16, 32), F32, in_major)
        torch.library.opcheck(torch.ops.fastlm.linear_forward.default, (*inputs, "cpp"))
