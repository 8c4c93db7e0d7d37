"""One row for each instruction: PTX, and what the ISA says it gives, written with NumPy.

All rows become one kernel of 32 threads, which runs on the emulator and, where there is one, on a
GPU. Rows with a tolerance are approximations on the GPU: their results may differ by so many ulps.
"""

import dataclasses
import inspect
from fractions import Fraction

import numpy as np

LANES = 32
F64 = np.float64
DTYPES = {"b16": np.uint16, "u16": np.uint16, "s16": np.int16, "b32": np.uint32, "u32": np.uint32,
          "s32": np.int32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f16": np.float16,
          "f32": np.float32, "f64": np.float64, "bf16": np.uint16, "f16x2": np.uint32,
          "bf16x2": np.uint32, "pred": np.uint32, "u8": np.uint8, "s8": np.int8}  # fmt: skip


@dataclasses.dataclass
class Row:
    """`text` with {d}, {a}, {b}, {c}; `expected` of the inputs, which have type `kind`."""

    text: str
    kind: str
    expected: object
    result: str
    ulps: int = 0

    @property
    def name(self):
        return self.text.split()[0]

    @property
    def arity(self):
        return len(inspect.signature(self.expected).parameters)


def row(opcode, kind, expected, result=None, operands=None, ulps=0):
    names = ["{d}", "{a}", "{b}", "{c}"][: 1 + len(inspect.signature(expected).parameters)]
    return Row(f"{opcode} {operands or ', '.join(names)}", kind, expected, result or kind, ulps)


# ---- helpers: exact values in float64 or Python integers, rounded once


def bf16(bits):
    """Values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def single(values):
    return values.astype(np.float32)


def to_f16_bits(values):
    return values.astype(np.float16).view(np.uint16)


def least(a, b):
    """min: -0 is less than +0, and a NaN loses."""
    return np.where(a == b, np.where(np.signbit(a), a, b), np.fmin(a, b))


def greatest(a, b, otherwise=np.fmax):
    return np.where(a == b, np.where(np.signbit(a), b, a), otherwise(a, b))


def same_lanes(a):
    """For each lane the mask of the lanes that have its value."""
    return np.array([sum(1 << i for i in range(LANES) if a[i] == x) for x in a])


def to_bf16(values):
    """Bits of the nearest bfloat16 (ties to even) of floating-point values."""
    values = values.astype(F64)
    single = values.astype(np.float32)
    # Keep what the first rounding lost in the last bit, so that the second one is right.
    bits = single.view(np.uint32).copy()
    finite = np.isfinite(single) & np.isfinite(values)
    away = np.abs(single.astype(np.float64)) > np.abs(values)
    bits = np.where(finite & away, bits - 1, bits)
    lost = finite & (bits.view(np.float32).astype(np.float64) != values)
    bits = np.where(lost, bits | 1, bits).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def halves(bits):
    """float64 values of f16 bits in the low and the high half of words."""
    parts = bits.view(np.uint16).reshape(-1, 2)
    return [parts[:, i].copy().view(np.float16).astype(np.float64) for i in (0, 1)]


def join(low, high):
    return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)


def f16_pairs(function):
    def apply(*words):
        parts = list(zip(*(halves(w) for w in words), strict=True))
        return join(*(function(*p).astype(np.float16).view(np.uint16) for p in parts))

    return _with_arity(apply, function)


def bf16_pairs(function):
    def apply(*words):
        split = [
            [bf16(w & 0xFFFF).astype(np.float64), bf16(w >> 16).astype(np.float64)] for w in words
        ]
        return join(*(to_bf16(function(*p)) for p in zip(*split, strict=True)))

    return _with_arity(apply, function)


def _with_arity(apply, function):
    apply.__signature__ = inspect.signature(function)
    return apply


def integers(function):
    """Applies a function on Python integers to each lane."""

    def apply(*columns):
        rows = zip(*columns, strict=True)
        return np.array([function(*map(int, values)) % 2**64 for values in rows], np.uint64)

    return _with_arity(apply, function)


def rounded(function, toward, is_sum=False):
    """The exact result as float32, rounded toward 0 ('z'), -inf ('m') or inf ('p')."""
    limit = {"z": np.float32(0), "m": np.float32(-np.inf), "p": np.float32(np.inf)}[toward]

    def lane(*values):
        near = np.float32(function(*values))
        if not all(np.isfinite(values)):
            return near
        exact = function(*(Fraction(float(v)) for v in values))
        if exact == 0:  # x - x is -0 only when rounding down
            return (
                np.float32(-0.0) if toward == "m" and is_sum and any(np.signbit(values)) else near
            )
        back = float(near) if np.isinf(near) else Fraction(float(near))
        wrong = {"z": abs(back) > abs(exact), "m": back > exact, "p": back < exact}[toward]
        return np.nextafter(near, limit) if wrong else near

    def apply(*columns):
        return np.array([lane(*values) for values in zip(*columns, strict=True)])

    return _with_arity(apply, function)


def flush(x):
    tiny = np.abs(x) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), x), x).astype(np.float32)


def to_int(low, high, rounding):
    def apply(a):
        whole = rounding(a.astype(np.float64))
        whole = np.where(np.isnan(whole), 0, np.clip(whole, low, high))
        return np.array([int(v) for v in whole.astype(object)], np.int64).astype(np.uint64)

    return apply


def shift_right(v, n):
    return v >> min(n, 64)


def permute(a, b, selector):
    data = (b << 32 | a).to_bytes(8, "little")
    result = 0
    for i in range(4):
        pick = selector >> 4 * i & 15
        byte = data[pick & 7]
        result |= (byte if pick < 8 else 255 * (byte >> 7)) << 8 * i
    return result


def bit_field_insert(a, b):
    mask = 0x1F << 7
    return b & ~mask | (a << 7) & mask
