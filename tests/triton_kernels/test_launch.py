"""How kernels are launched where there is no GPU, and what a machine without triton says."""

import os
import subprocess
import sys

import numpy
import pytest
import torch
import triton
from fastlm.kernels import dropout, launch

INTERPRETED = """
import torch
from fastlm import reference
from fastlm.kernels import attention, cross_entropy, dropout, gelu, layer_norm, rms_norm

def close(ours, theirs):
    eps = max(torch.finfo(ours.dtype).eps, torch.finfo(torch.float32).eps)  # as it is computed
    torch.testing.assert_close(ours, theirs, rtol=8 * eps, atol=8 * eps)

torch.manual_seed(0)
for dtype in (torch.float32, torch.float16):
    x, w, b = (torch.randn(*shape).to(dtype) for shape in ((3, 33), (33,), (33,)))
    y, mean, rstd, seed = x.clone(), torch.empty(3), torch.empty(3), torch.tensor([9])
    layer_norm.layer_norm_forward(y, mean, rstd, x, w, b, 1e-5, 0)
    close(y, reference.layer_norm_forward(x, w, b, 1e-5)[0])
    rms_norm.rms_norm_forward(y, rstd, x, w, 1e-5, 0)
    close(y, reference.rms_norm_forward(x, w, 1e-5)[0])
    dropout.dropout(y, x, seed, 0.5, 0)
    assert torch.equal(y, reference.dropout(x, seed, 0.5))
    for form in ("tanh", "none"):
        gelu.gelu_forward(y, x, b, form == "tanh", 0)
        close(y, reference.gelu_forward(x, b, form))
    loss, lse, target = torch.empty(3), torch.empty(3).double(), torch.tensor([1, -100, 4])
    options = (-100, 0.1, 0.0, 0.0)
    cross_entropy.cross_entropy_forward(loss, lse, y, x, target, None, *options, 0.5, 0)
    theirs = reference.cross_entropy_forward(x, target, None, *options, 0.5)
    close(loss, theirs[0]), close(y, theirs[2])
    q, k = torch.randn(1, 20, 2, 16).to(dtype), torch.randn(1, 30, 1, 16).to(dtype)
    o, lse = q.clone(), torch.empty(1, 2, 20).double()
    shape = (*[None] * 6, 0, 0, 0.25, 0.0, -1, 0, 0.0)
    attention.attention_forward(o, lse, q, k, k, attention.AttentionOptions(*shape), 0)
    theirs = reference.attention_forward(q, k, k, *shape)
    close(o, theirs[0]), close(lse, theirs[1])
"""

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # what an import of a package that is not there comes to
import torch, fastlm
x = torch.randn(4, 8)
fastlm.ops.layer_norm(x, 8)
fastlm.explain("layer_norm", x.to("meta"))
with fastlm.use("emulated:triton"):
    try:
        fastlm.ops.layer_norm(x, 8)
    except fastlm.BackendUnavailable as error:
        print(error)
"""


def run(code: str, **environment: str) -> str:
    """What a Python process prints."""
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    return child.stdout


@pytest.mark.skipif(
    triton.__version__ < "3.7" and numpy.__version__ >= "2.4",
    reason="triton 3.6's interpreter takes no numpy from 2.4 on",
)
def test_interpreted():
    """In a process of its own: a kernel is interpreted if the variable was set at its definition.
    bfloat16 is left out, in which Triton's interpreter is wrong.
    """
    run(INTERPRETED, TRITON_INTERPRET="1")


def test_without_triton_fastlm_works_and_says_why():
    found = run(WITHOUT_TRITON)
    assert "triton  no: fastlm.kernels.layer_norm cannot be imported" in found
    assert "triton: triton cannot be imported" in found


def test_cpu_tensors_are_refused_where_nothing_emulates(monkeypatch):
    monkeypatch.setattr(launch, "emulate", None)
    x = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match="dropout_kernel: tensors: expected CUDA tensors, got"):
        dropout.dropout(x, x, torch.tensor([1]), 0.5, 0)
