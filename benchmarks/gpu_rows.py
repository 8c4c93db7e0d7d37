"""The rows of a GPU, the most valuable first: where time runs out the rest is left out.

GPT-2 124M's shapes with the tokens that fill a GPU, then few tokens, where launching takes the
time, then wide heads and long rows.
"""

from dataclasses import replace

import torch
from torch.nn import functional as F

from fastlm import ops

from .harness import Bench
from .rows import ROWS

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
_DECLARED = {bench.op: bench for bench in ROWS}


def _randn(*shapes):
    return lambda dtype: tuple(torch.randn(shape).to(dtype) for shape in shapes)


def _row(op, phase, shape, inputs, work, **changes) -> Bench:
    """A declaration of rows.py at another shape."""
    changes = {"phase": phase, "shape": shape, "inputs": inputs, "work": work, **changes}
    return replace(_DECLARED[op], goals={}, **changes)


def attention(phase, batch, heads, length, head_dim) -> Bench:
    """4 B H T^2 D FLOPs, halved by the causal mask; 2.5 times that in backward."""
    flops = 2 * batch * heads * length**2 * head_dim * (2.5 if phase == BACKWARD else 1)
    return _row(
        "attention", phase, f"B{batch} H{heads} T{length} D{head_dim} causal",
        _randn(*3 * [(batch, length, heads, head_dim)]), lambda width: flops,
        checked=_randn(*3 * [(1, min(length, 1024), heads, head_dim)]),
    )  # fmt: skip


def norm(op, phase, rows, cols) -> Bench:
    """Forward reads x (and residual) and writes y (and z); backward reads dy and z, writes dz."""
    wide = 2 if op == "add_layer_norm" else 1
    shapes = wide * [(rows, cols)] + (1 if op == "rms_norm" else 2) * [(cols,)]
    passes = 3 if phase == BACKWARD else 2 * wide
    return _row(
        op, phase, f"{rows} x {cols}", _randn(*shapes), lambda width: passes * rows * cols * width
    )


def elementwise(op, phase, rows, cols) -> Bench:
    passes = 3 if (op, phase) == ("gelu", BACKWARD) else 2
    shape, inputs = f"{rows} x {cols}", _randn((rows, cols))
    return _row(op, phase, shape, inputs, lambda width: passes * rows * cols * width)


def _logits(rows, classes):
    def inputs(dtype):
        return torch.randn(rows, classes).to(dtype), torch.randint(classes, (rows,))

    return inputs


def cross_entropy(rows, classes) -> Bench:
    """One read of the logits and one write of their gradient, over them."""
    return _row(
        "cross_entropy", BOTH, f"{rows} x {classes} in place", _logits(rows, classes),
        lambda width: 2 * rows * classes * width, fresh=True,
        ours=lambda logits, target: ops.cross_entropy(logits, target, inplace_backward=True),
    )  # fmt: skip


def _hidden(rows, cols, classes):
    def inputs(dtype):
        weight = 0.02 * torch.randn(classes, cols)
        return torch.randn(rows, cols).to(dtype), weight.to(dtype), torch.randint(classes, (rows,))

    return inputs


def linear_cross_entropy(rows, cols, classes) -> Bench:
    """Checked on some rows: torch's logits of all in float64 are 13 GB, several times over."""
    return _row(
        "linear_cross_entropy", BOTH, f"{rows} x {cols} x {classes}", _hidden(rows, cols, classes),
        lambda width: 6 * rows * cols * classes,
        checked=_hidden(min(rows, 2048), cols, classes),
    )  # fmt: skip


# ---- what the CPU's rows have not ----


def _attend(q, k_cache, v_cache, lengths):
    q, k, v = (t.transpose(1, 2) for t in (q, k_cache, v_cache))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def decoding(batch, keys, heads, head_dim) -> Bench:
    """One query a sequence: the cache is read once."""

    def inputs(dtype):
        shapes = [(batch, 1, heads, head_dim), *2 * [(batch, keys, heads, head_dim)]]
        return *_randn(*shapes)(dtype), torch.full((batch,), keys, dtype=torch.int32)

    return Bench(
        "attention_with_kvcache", FORWARD, f"B{batch} S{keys} H{heads} D{head_dim}, one query",
        inputs, lambda *given: ops.attention_with_kvcache(*given[:3], cache_seqlens=given[3]),
        {"torch": _attend}, "read", lambda width: 2 * batch * keys * heads * head_dim * width,
    )  # fmt: skip


# The masks differ, so that the check of numbers sees their size alone.
_DECLARED["dropout"] = Bench(
    "dropout", FORWARD, "", _randn((1, 1)), lambda x: ops.dropout(x, 0.1),
    {"torch": lambda x: F.dropout(x, 0.1)}, "copy", lambda width: 0,
)  # fmt: skip

GPU_ROWS = [
    attention(FORWARD, 32, 12, 1024, 64),
    attention(BACKWARD, 32, 12, 1024, 64),
    norm("add_layer_norm", FORWARD, 65536, 768),
    norm("layer_norm", BACKWARD, 65536, 768),
    cross_entropy(16384, 50304),
    cross_entropy(16384, 50257),
    decoding(64, 1024, 12, 64),
    norm("layer_norm", FORWARD, 1024, 768),
    norm("layer_norm", BACKWARD, 1024, 768),
    attention(FORWARD, 1, 12, 1024, 64),
    elementwise("gelu", FORWARD, 65536, 3072),
    elementwise("gelu", BACKWARD, 65536, 3072),
    norm("rms_norm", FORWARD, 65536, 768),
    norm("rms_norm", BACKWARD, 65536, 768),
    elementwise("dropout", FORWARD, 65536, 768),
    linear_cross_entropy(32768, 768, 50304),
    norm("layer_norm", FORWARD, 65536, 768),
    norm("add_layer_norm", BACKWARD, 65536, 768),
    attention(FORWARD, 4, 16, 8192, 128),
    attention(BACKWARD, 4, 16, 8192, 128),
    elementwise("gelu", FORWARD, 1024, 3072),
    elementwise("dropout", BACKWARD, 65536, 768),
    attention(BACKWARD, 1, 12, 1024, 64),
    attention(FORWARD, 8, 8, 1024, 256),
    attention(BACKWARD, 8, 8, 1024, 256),
    norm("rms_norm", FORWARD, 4096, 32768),
    norm("rms_norm", BACKWARD, 4096, 32768),
]
