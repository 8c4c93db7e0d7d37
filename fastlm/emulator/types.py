"""PTX's types and the C++ types that stand for them."""

import functools
import re

from .errors import TranslationError

# Each type's C++ name as an operand of arithmetic; .b types are taken as unsigned.
CPP = {
    "pred": "bool",
    "f16": "half",
    "bf16": "bfloat",
    "f32": "float",
    "f64": "double",
    **{f"{kind}{bits}": f"uint{bits}_t" for kind in "ub" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)},
}
PACKED = {"f16x2": "f16", "bf16x2": "bf16"}
FLOATS = ("f16", "bf16", "f32", "f64")
HALVES = ("f16", "bf16")


@functools.cache
def type_bytes(name):
    """Size of a PTX type such as "b32"; a predicate takes one byte."""
    if name in PACKED:
        return 4
    if name in ("pred", "b8", "u8", "s8"):
        return 1
    if name not in CPP:
        raise TranslationError(f"type .{name} is not known; add it to fastlm/emulator/types.py")
    return int(re.sub(r"\D", "", name)) // 8


def is_signed(name):
    return name[0] == "s"


def register_type(name):
    """C++ type of a register declared with this PTX type; 8-bit ones are kept in 16 bits."""
    if name == "pred":
        return "bool"
    return f"uint{8 * max(2, type_bytes(name))}_t"


def bits_type(name):
    """The unsigned C++ type as wide as this PTX type."""
    return f"uint{8 * type_bytes(name)}_t"
