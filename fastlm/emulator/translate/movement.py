"""mov: registers, packing and unpacking, addresses of variables and functions."""

from ..errors import TranslationError
from ..types import FLOATS, type_bytes
from .registry import instruction


@instruction("mov", counted="kMove")
def move(fn, modifiers, operands):
    kind = modifiers.type()
    target, source = operands
    if source.startswith("{"):
        return _pack(fn, target, fn.vector(source), kind)
    if target.startswith("{"):
        return _unpack(fn, fn.vector(target), source, kind)
    raw = f"b{8 * type_bytes(kind)}" if kind in FLOATS else kind
    return fn.assign(target, fn.value(source, raw), raw)


def _part_type(count, kind):
    bits = 8 * type_bytes(kind) // count
    if count not in (2, 4) or bits < 8:
        raise TranslationError(f"a .{kind} has no {count} parts")
    return f"b{bits}", bits


def _pack(fn, target, parts, kind):
    part, bits = _part_type(len(parts), kind)
    terms = [f"uint64_t({fn.value(p, part)}) << {bits * i}" for i, p in enumerate(parts)]
    return fn.assign(target, " | ".join(terms), kind)


def _unpack(fn, parts, source, kind):
    part, bits = _part_type(len(parts), kind)
    code = f"{{ const uint64_t whole = {fn.value(source, kind)}; "
    for i, target in enumerate(parts):
        code += fn.assign(target, f"uint{bits}_t(whole >> {bits * i})", part) + " "
    return code + "}"
