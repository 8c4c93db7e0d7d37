"""Every kernel under every detector and a random schedule, at shapes that make each stage wrap:
attention goes through three tiles and more on each side, persistent grids take several rows."""

import pytest
import torch

import fastlm
from fastlm import emulator, ops

from . import resources

pytestmark = pytest.mark.skipif(resources.toolkit() is None, reason="nvcc is not on the PATH")
SEED = torch.tensor(2**40 + 7)


def randn(*shape):
    return torch.randn(shape).bfloat16().requires_grad_()


CALLS = {
    "add_layer_norm": lambda: ops.add_layer_norm(
        randn(130, 768), randn(130, 768), randn(768), randn(768), dropout_p=0.1, seed=SEED
    )[0],
    "rms_norm": lambda: ops.rms_norm(randn(70, 1001), 1001, randn(1001)),
    "long rows": lambda: ops.add_layer_norm(
        randn(5, 8201), randn(5, 8201), randn(8201), randn(8201), dropout_p=0.1, seed=SEED
    )[0],
    "gelu": lambda: ops.gelu(randn(70, 1001), bias=randn(1001)),
    "dropout": lambda: ops.dropout(randn(70, 1001), 0.1, seed=SEED),
    "cross_entropy": lambda: ops.cross_entropy(
        randn(3, 10007), torch.tensor([0, 10006, -100]), reduction="none", label_smoothing=0.1
    ),
    "attention": lambda: ops.attention(
        randn(1, 200, 2, 64), randn(1, 260, 1, 64), randn(1, 260, 1, 64), causal=True
    ),
    "wide heads": lambda: ops.attention(
        randn(1, 70, 2, 200), randn(1, 90, 1, 200), randn(1, 90, 1, 200), causal=True
    ),
    "decoding": lambda: ops.attention_with_kvcache(
        randn(2, 2, 4, 64), randn(2, 300, 2, 64), randn(2, 300, 2, 64),
        randn(2, 2, 2, 64), randn(2, 2, 2, 64), torch.tensor([290, 7], dtype=torch.int32),
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_detector_finds_anything(call):
    detectors = {"races": True, "uninitialized": True, "schedule": "random", "seed": 3}
    with fastlm.use("emulated:cuda"), emulator.defaults(**detectors):
        with torch.no_grad() if call is CALLS["decoding"] else torch.enable_grad():
            result = call()
        if result.requires_grad:
            result.float().sum().backward()
    assert result.isfinite().all()
