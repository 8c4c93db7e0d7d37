"""The declarations: every op with its shapes, baselines, traffic and goals. Sizes are those of
GPT-2 124M.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlm import ops

from .harness import Bench


@functools.cache
def compiled(op):
    """torch.compile of a baseline (inductor, static shapes), made at its first call."""
    return torch.compile(op, dynamic=False)


def _randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype)


# ---- cross_entropy: one read of the logits and one write of their gradient ----


def _loss(logits, target):
    return F.cross_entropy(logits, target)


def _loss_inputs(dtype):
    return _randn(1024, 50257, dtype=dtype), torch.randint(0, 50257, (1024,))


CROSS_ENTROPY = [
    Bench(
        "cross_entropy", phase, "1024 x 50257", _loss_inputs, ops.cross_entropy,
        {"torch": _loss, "torch.compile": lambda x, t: compiled(_loss)(x, t)},
        traffic, lambda width, passes=passes: passes * 1024 * 50257 * width, goals,
    )
    for phase, traffic, passes, goals in (
        ("forward", "read", 1, {}),
        ("forward+backward", "in_place", 2, {"torch": 15, "torch, pooled": 4, "torch.compile": 8}),
    )
]  # fmt: skip

# ---- linear_cross_entropy: three products of 2 N C V FLOPs ----


def _linear_loss(x, weight, target):
    return F.cross_entropy(F.linear(x, weight), target)


def _linear_loss_in_float32(x, weight, target):
    return F.cross_entropy(F.linear(x, weight).float(), target)


def _chunked_linear_loss(x, weight, target):
    """torch's own in chunks of 256 rows: with its default options it took five times as long."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256, acc_policy="compact")
    return F.linear_cross_entropy(x, weight, target, options=options)


def _linear_loss_inputs(dtype):
    weight = 0.02 * torch.randn(50257, 768)
    return _randn(1024, 768, dtype=dtype), weight.to(dtype), torch.randint(0, 50257, (1024,))


_LINEAR_LOSSES = {"torch": _linear_loss, "torch, float32 loss": _linear_loss_in_float32}
if hasattr(F, "linear_cross_entropy"):
    _LINEAR_LOSSES["torch, 256 rows"] = _chunked_linear_loss

LINEAR_CROSS_ENTROPY = [
    Bench(
        "linear_cross_entropy", "forward+backward", "1024 x 768 x 50257", _linear_loss_inputs,
        ops.linear_cross_entropy, _LINEAR_LOSSES,
        "gemm", lambda width: 6 * 1024 * 768 * 50257, {"torch": 1.3},
    )
]  # fmt: skip

# ---- layer_norm ----


def _norm(x, weight, bias):
    return F.layer_norm(x, (x.shape[-1],), weight, bias)


def _our_norm(x, weight, bias):
    return ops.layer_norm(x, x.shape[-1], weight, bias)


def _norm_inputs(dtype):
    return tuple(_randn(*shape, dtype=dtype) for shape in ((16384, 768), (768,), (768,)))


def _add_norm(x, residual, weight, bias):
    return F.layer_norm(x + residual, (x.shape[-1],), weight, bias)


def _add_norm_inputs(dtype):
    return tuple(
        _randn(*shape, dtype=dtype) for shape in ((16384, 768), (16384, 768), (768,), (768,))
    )


LAYER_NORM = [
    Bench(
        "layer_norm", phase, "16384 x 768", _norm_inputs, _our_norm, {"torch": _norm},
        "copy", lambda width, passes=passes: passes * 16384 * 768 * width, goals,
    )
    for phase, passes, goals in (
        ("forward", 2, {"torch": 7, "torch, pooled": 1.7}),
        ("backward", 3, {"torch": 4.5, "torch, pooled": 1.4}),
    )
] + [
    Bench(
        "add_layer_norm", "forward", "16384 x 768", _add_norm_inputs,
        lambda x, residual, weight, bias: ops.add_layer_norm(x, residual, weight, bias)[0],
        {"torch": _add_norm},
        "copy", lambda width: 4 * 16384 * 768 * width,
    )
]  # fmt: skip

# ---- rms_norm ----


def _rms_norm(x, weight):
    return F.rms_norm(x, (x.shape[-1],), weight)


def _our_rms_norm(x, weight):
    return ops.rms_norm(x, x.shape[-1], weight)


def _rms_norm_inputs(dtype):
    return _randn(16384, 768, dtype=dtype), _randn(768, dtype=dtype)


RMS_NORM = [
    Bench(
        "rms_norm", phase, "16384 x 768", _rms_norm_inputs, _our_rms_norm, {"torch": _rms_norm},
        "copy", lambda width, passes=passes: passes * 16384 * 768 * width,
    )
    for phase, passes in (("forward", 2), ("backward", 3))
]  # fmt: skip

# ---- gelu ----


def _gelu(x):
    return F.gelu(x, approximate="tanh")


GELU = [
    Bench(
        "gelu", phase, "4096 x 3072", lambda dtype: (_randn(4096, 3072, dtype=dtype),),
        lambda x: ops.gelu(x, approximate="tanh"), {"torch": _gelu},
        "copy", lambda width, passes=passes: passes * 4096 * 3072 * width, goals,
    )
    for phase, passes, goals in (
        ("forward", 2, {"torch": 9, "torch, pooled": 4.5}),
        ("backward", 3, {}),
    )
]  # fmt: skip

# ---- attention: 4 B H T^2 D FLOPs, halved by the causal mask; 2.5 times that in backward ----


def _sdpa(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


ATTENTION = [
    Bench(
        "attention", phase, "B4 H12 T1024 D64 causal",
        lambda dtype: tuple(_randn(4, 1024, 12, 64, dtype=dtype) for _ in range(3)),
        lambda q, k, v: ops.attention(q, k, v, causal=True), {"torch": _sdpa},
        "gemm", lambda width, factor=factor: factor * 2 * 4 * 12 * 1024**2 * 64, {"torch": goal},
    )
    for phase, factor, goal in (("forward", 1, 1.4), ("backward", 2.5, 1.5))
]  # fmt: skip

ROWS = CROSS_ENTROPY + LINEAR_CROSS_ENTROPY + LAYER_NORM + RMS_NORM + GELU + ATTENTION
