"""Some calls of the fuzzer with the day's seed, and that it finds what is wrong."""

import fuzz
import pytest
import torch
from conftest import CPP, GPU, backend_in_force, fuzz_seed
from fuzz_calls import Call, Input
from fuzz_torch import TORCH

from fastlm import ops

# Emulated kernels take thousands of times as long.
CASES = {**dict.fromkeys(CPP, 300), **dict.fromkeys(GPU, 20), "torch": 100}
MOST = {**dict.fromkeys(CPP, 20_000), **dict.fromkeys(GPU, 1000), "torch": 5000}


@pytest.mark.parametrize("name", CASES)
def test_random_calls(name):
    """Which seed it was is in pytest's header."""
    with backend_in_force(name):
        result = fuzz.run(fuzz.dtypes_of(name), CASES[name], fuzz_seed(), MOST[name])
    assert not result.found, result.found[0]
    assert result.taken > result.refused


def test_what_is_wrong_is_found_and_made_small(monkeypatch):
    right = ops.gelu

    def wrong(input, approximate="none", *, bias=None):
        y = right(input, approximate, bias=bias)
        return y + 1e-4 if input.shape[-1] > 8 else y

    monkeypatch.setattr(ops, "gelu", wrong)
    with backend_in_force("torch"):
        result = fuzz.run({"gelu": ("float32",)}, 200, 0, 5000)
    (found,) = result.found
    assert "Violation: output 0: error 1.00e-04, allowed" in found
    assert "Call(op='gelu', dtype='float32', inputs={'input': Input(shape=(1, 9))}" in found


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.5])
def test_what_is_not_finite_is_compared(value, monkeypatch):
    """A NaN where there should be none, and none where there should be one."""
    call = Call("gelu", "float32", {"input": Input((3, 4), "nan", grad=False)})
    with backend_in_force("torch"):
        assert fuzz.check(call)
        monkeypatch.setattr(ops, "gelu", lambda **_: torch.full((3, 4), value))
        with pytest.raises(fuzz.Violation):
            fuzz.check(call)


def test_a_call_is_printed_as_it_is_replayed():
    inputs = {"input": Input((2, 3), "nan", "every_other"), "seed": Input(values=7)}
    call = Call("dropout", "bfloat16", inputs, {"p": 0.5}, "ones", 3)
    names = {"Call": Call, "Input": Input}
    assert eval(repr(call), names) == call
    assert set(TORCH) == set(fuzz.dtypes_of("torch"))
