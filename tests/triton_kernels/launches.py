"""Every launch that fastlm's Triton kernels make for typical calls: recorded, not run.

The arguments, block sizes and constants are those of the launching functions themselves, so that
what is compiled and checked ahead of time is what a GPU would get.
"""

from dataclasses import dataclass

import torch
from fastlm.kernels import (
    attention,
    attention_hopper,
    column_sums,
    cross_entropy,
    dropout,
    gelu,
    launch,
    layer_norm,
    rms_norm,
)

ROWS, COLS, CLASSES = 64, 768, 50257


@dataclass(frozen=True)
class Launch:
    kernel: object
    grid: tuple
    arguments: tuple
    constexprs: dict


class Recorder:
    """Stands where the emulator would."""

    def __init__(self):
        self.launches = []

    def __call__(self, kernel):
        return _Recording(self.launches, kernel)


class _Recording:
    def __init__(self, launches, kernel):
        self.launches, self.kernel = launches, kernel

    def __getitem__(self, grid):
        return lambda *arguments, **constexprs: self.launches.append(
            Launch(self.kernel, grid, arguments, constexprs)
        )


def recorded(call, dtype: torch.dtype) -> list[Launch]:
    """The launches of call(dtype)."""
    recorder, before = Recorder(), launch.emulate
    launch.emulate = recorder
    try:
        call(dtype)
    finally:
        launch.emulate = before
    return recorder.launches


def _rows(dtype, *shape):
    return torch.zeros(*(shape or (ROWS, COLS)), dtype=dtype)


def _layer_norm(dtype):
    x, w, s = _rows(dtype), _rows(dtype, COLS), _rows(torch.float32, ROWS)
    layer_norm.layer_norm_forward(x, s, s, x, w, w, 1e-5, 0)
    layer_norm.layer_norm_backward(x, w, None, x, x, w, s, s, 0)


def _add_layer_norm(dtype):
    x, w, s, seed = _rows(dtype), _rows(dtype, COLS), _rows(torch.float32, ROWS), torch.tensor([1])
    layer_norm.add_layer_norm_forward(x, x, s, s, x, x, w, w, seed, 1e-5, 0.1, 0)
    layer_norm.add_layer_norm_backward(x, x, None, None, x, x, x, w, s, s, seed, 0.1, 0)


def _long_rows(dtype):
    x, w, s = _rows(dtype, 2, 8192), _rows(dtype, 8192), _rows(torch.float32, 2)
    layer_norm.layer_norm_forward(x, s, s, x, w, w, 1e-5, 0)
    layer_norm.layer_norm_backward(x, None, None, x, x, w, s, s, 0)


def _rms_norm(dtype):
    x, w, s = _rows(dtype), _rows(dtype, COLS), _rows(torch.float32, ROWS)
    rms_norm.rms_norm_forward(x, s, x, w, 1e-5, 0)
    rms_norm.rms_norm_backward(x, None, x, x, w, s, 0)


def _gelu(dtype):
    x, bias = _rows(dtype), _rows(dtype, COLS)
    gelu.gelu_forward(x, x, bias, True, 0)
    gelu.gelu_backward(x, None, x, x, bias, True, 0)
    dropout.dropout(x, x, torch.tensor([1]), 0.1, 0)
    column_sums.column_sums(bias, _rows(torch.float32))


def _cross_entropy(dtype, smoothing=0.0):
    logits, loss = _rows(dtype, 2, CLASSES), _rows(torch.float32, 2)
    target, options = torch.zeros(2, dtype=torch.int64), (-100, smoothing, 0.0, 0.0)
    lse = loss.double()
    if not smoothing:
        cross_entropy.cross_entropy_forward(loss, lse, None, logits, target, None, *options, 0.0, 0)
    cross_entropy.cross_entropy_forward(loss, lse, logits, logits, target, None, *options, 1.0, 0)
    cross_entropy.cross_entropy_backward(logits, loss, logits, target, None, lse, *options, 0)


def _attention(dtype, head_dim, softcap=0.0, queries=256, bias=False):
    q = torch.zeros(1, queries, 2, head_dim, dtype=dtype)
    k = torch.zeros(1, 256, 2, head_dim, dtype=dtype)
    lse = torch.zeros(1, 2, queries, dtype=torch.float64)
    seed = torch.tensor([1]) if softcap else None
    options = attention.AttentionOptions(
        None, None, None, torch.zeros(1, 2, 256, 256, dtype=dtype) if bias else None,
        torch.zeros(2) if bias else None, seed, 0, 0, 0.125, softcap, -1, 0,
        0.1 if softcap else 0.0,
    )  # fmt: skip
    attention.attention_forward(q, lse, q, k, k, options, 0)
    if queries == 256:
        attention.attention_backward(q, k, k, q, None, q, k, k, q, lse, options, 0)


def _attention_hopper(dtype, head_dim):
    q = torch.zeros(1, 256, 2, head_dim, dtype=dtype)
    lse = torch.zeros(1, 2, 256, dtype=torch.float64)
    options = attention.AttentionOptions(*[None] * 6, 0, 0, 0.125, 0.0, -1, 0, 0.0)
    attention_hopper.attention_forward(q, lse, q, q, q, options, 0)


def _decoding(dtype):
    _attention(dtype, 64, queries=1)
    new, cache = torch.zeros(1, 1, 2, 64, dtype=dtype), torch.zeros(1, 256, 2, 64, dtype=dtype)
    attention.cache_append(cache, cache, new, new, torch.zeros(1, dtype=torch.int32), 0)


CALLS = {
    "layer_norm": _layer_norm,
    "add_layer_norm, dropout": _add_layer_norm,
    "layer_norm, 8192 columns": _long_rows,
    "rms_norm": _rms_norm,
    "gelu, dropout": _gelu,
    "cross_entropy": _cross_entropy,
    "cross_entropy, smoothing": lambda dtype: _cross_entropy(dtype, 0.1),
    "attention, head_dim 64": lambda dtype: _attention(dtype, 64),
    "attention, head_dim 128": lambda dtype: _attention(dtype, 128),
    "attention, head_dim 256": lambda dtype: _attention(dtype, 256),
    "attention, head_dim 64, softcap, dropout": lambda dtype: _attention(dtype, 64, 30.0),
    "attention, head_dim 128, softcap, dropout": lambda dtype: _attention(dtype, 128, 30.0),
    "attention, head_dim 256, softcap, dropout": lambda dtype: _attention(dtype, 256, 30.0),
    "attention, head_dim 64, bias": lambda dtype: _attention(dtype, 64, bias=True),
    "attention, head_dim 128, bias": lambda dtype: _attention(dtype, 128, bias=True),
    "attention, decoding": _decoding,
    "attention for Hopper, head_dim 64": lambda dtype: _attention_hopper(dtype, 64),
    "attention for Hopper, head_dim 128": lambda dtype: _attention_hopper(dtype, 128),
}
ARCHES = (80, 90)


def arches_of(call: str) -> tuple[int, ...]:
    """What a call's kernels are compiled for."""
    return (90,) if "for Hopper" in call else ARCHES
