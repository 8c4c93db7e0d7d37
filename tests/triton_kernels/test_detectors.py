"""Every kernel under the emulator's detectors of races, reads of what nobody wrote and accesses out
of bounds, on both architectures, with warps in random order.

The detectors work by what was executed: shapes are ragged, and loops go round more than once.
"""

import pytest
import torch
from fastlm.kernels import launch

import fastlm
from fastlm import emulator, ops

SEED = torch.tensor(7)


def layer_norm():
    x, weight, bias = leaves((3, 33), (33,), (33,))
    return ops.layer_norm(x, 33, weight, bias), (x, weight, bias)


def add_layer_norm():
    x, residual = leaves((3, 33), (3, 33))
    return ops.add_layer_norm(x, residual, dropout_p=0.5, seed=SEED)[0], (x, residual)


def rms_norm():
    x, weight = leaves((3, 33), (33,))
    return ops.rms_norm(x, 33, weight), (x, weight)


def gelu():
    x, bias = leaves((9, 130), (130,))
    return ops.gelu(x, "tanh", bias=bias), (x, bias)


def dropout():
    (x,) = leaves((3, 33))
    return ops.dropout(x, 0.5, seed=SEED), (x,)


def cross_entropy():
    (logits,) = leaves((3, 4100))  # more than one block of the kernel
    return ops.cross_entropy(logits, torch.tensor([0, -100, 4099]), label_smoothing=0.1), (logits,)


def attention(**options):
    q, k, v = leaves((1, 70, 2, 20), (1, 90, 1, 20), (1, 90, 1, 20))
    return ops.attention(q, k, v, causal=True, **options), (q, k, v)


def attention_with_options():
    return attention(softcap=5.0, dropout_p=0.2, seed=SEED)


def decoding():
    q, k_cache, v_cache = torch.randn(3, 1, 150, 2, 16).bfloat16()
    q, k, v = q[:, :1], k_cache[:, :1].clone(), v_cache[:, :1].clone()
    lengths = torch.tensor([140], dtype=torch.int32)
    return ops.attention_with_kvcache(q, k_cache, v_cache, k, v, lengths), ()


def leaves(*shapes):
    return [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]


CALLS = (layer_norm, add_layer_norm, rms_norm, gelu, dropout, cross_entropy, attention,
         attention_with_options, decoding)  # fmt: skip


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_detectors_find_nothing(call, arch, monkeypatch):
    def detecting(kernel):
        options = {"races": True, "uninitialized": True, "schedule": "random", "seed": 3}
        # Triton 3.6 leaves out a fence on sm_90 that hardware can do without.
        return emulator.triton_launcher(kernel, arch=arch, proxy_fences=False, **options)

    with fastlm.use("emulated:triton"):
        call()  # loads the modules, so that what is set below stays
        monkeypatch.setattr(launch, "emulate", detecting)
        output, inputs = call()
        found = torch.autograd.grad(output.float().sum(), inputs) if inputs else ()
    assert all(t.isfinite().all() for t in (output, *found))
