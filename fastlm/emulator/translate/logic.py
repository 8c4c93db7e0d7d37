"""Bits and predicates: logic, shifts, bit fields, comparisons, selection."""

from ..errors import TranslationError
from ..types import CPP, FLOATS, HALVES, PACKED, type_bytes
from .registry import instruction

_RELATION = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
             "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}  # fmt: skip
_UNORDERED = {"equ": "==", "neu": "!=", "ltu": "<", "leu": "<=", "gtu": ">", "geu": ">="}


@instruction("and", "or", "xor", counted="kInteger")
def bitwise(fn, modifiers, operands):
    kind = modifiers.type()
    sign = {"and": "&", "or": "|", "xor": "^"}[modifiers.opcode]
    a, b = (fn.value(o, kind) for o in operands[1:])
    return fn.assign(operands[0], f"({a} {sign} {b})", kind)


@instruction("not", "cnot", counted="kInteger")
def negate(fn, modifiers, operands):
    kind = modifiers.type()
    value = fn.value(operands[1], kind)
    invert = kind == "pred" or modifiers.opcode == "cnot"
    return fn.assign(operands[0], f"!{value}" if invert else f"~{value}", kind)


@instruction("shl", "shr", counted="kInteger")
def shift(fn, modifiers, operands):
    kind = modifiers.type()
    name = "shift_left" if modifiers.opcode == "shl" else "shift_right"
    value, count = fn.value(operands[1], kind), fn.value(operands[2], "u32")
    return fn.assign(operands[0], f"{name}<{CPP[kind]}>({value}, {count})", kind)


@instruction("shf", counted="kInteger")
def funnel_shift(fn, modifiers, operands):
    side = modifiers.need("l", "r")
    wraps = modifiers.need("wrap", "clamp") == "wrap"
    modifiers.type()
    low, high, count = (fn.value(o, "u32") for o in operands[1:])
    count = f"{count} & 31" if wraps else f"({count} < 32 ? {count} : 32)"
    name = "funnel_left" if side == "l" else "funnel_right"
    return fn.assign(operands[0], f"{name}({low}, {high}, {count})", "b32")


@instruction("lop3", counted="kInteger")
def logic3(fn, modifiers, operands):
    modifiers.type()
    values = ", ".join(fn.value(o, "u32") for o in operands[1:])
    return fn.assign(operands[0], f"logic3({values})", "b32")


@instruction("prmt", counted="kInteger")
def permute(fn, modifiers, operands):
    modifiers.type()
    values = ", ".join(fn.value(o, "u32") for o in operands[1:])
    return fn.assign(operands[0], f"permute_bytes({values})", "b32")


@instruction("bfe", "bfi", counted="kInteger")
def bit_field(fn, modifiers, operands):
    kind = modifiers.type()
    *fields, position, length = operands[1:]
    values = ", ".join(fn.value(f, kind) for f in fields)
    place = f"{fn.value(position, 'u32')}, {fn.value(length, 'u32')}"
    name = "bit_field_extract" if modifiers.opcode == "bfe" else "bit_field_insert"
    return fn.assign(operands[0], f"{name}<{CPP[kind]}>({values}, {place})", kind)


@instruction("bfind", counted="kInteger")
def find_bit(fn, modifiers, operands):
    as_shift = "true" if modifiers.flag("shiftamt") else "false"
    kind = modifiers.type()
    code = f"find_highest<{CPP[kind]}>({fn.value(operands[1], kind)}, {as_shift})"
    return fn.assign(operands[0], code, "u32")


@instruction("popc", "clz", "brev", counted="kInteger")
def bit_scan(fn, modifiers, operands):
    kind = modifiers.type()
    value = fn.value(operands[1], kind)
    code = {
        "popc": f"uint32_t(__builtin_popcountll({value}))",
        "clz": f"count_leading_zeros({value})",
        "brev": f"reverse_bits<{CPP[kind]}>({value})",
    }[modifiers.opcode]
    return fn.assign(operands[0], code, kind if modifiers.opcode == "brev" else "u32")


def _comparison(modifiers, kind, a, b):
    if kind in HALVES:
        a, b = f"widen({a})", f"widen({b})"
    relation = modifiers.choice(*_RELATION, *_UNORDERED, "num", "nan")
    if relation is None:
        raise TranslationError(f"a comparison is expected in '{modifiers.opcode}'")
    if relation == "ne" and kind in FLOATS:
        return f"({a} < {b} || {a} > {b})"  # false for NaN, unlike C++'s !=
    if relation in _RELATION:
        return f"({a} {_RELATION[relation]} {b})"
    unordered = f"({a} != {a} || {b} != {b})"
    if relation in _UNORDERED:
        return f"({unordered} || {a} {_UNORDERED[relation]} {b})"
    return unordered if relation == "nan" else f"!{unordered}"


def _comparands(fn, modifiers, operands, kind):
    a, b = (fn.value(o, kind) for o in operands)
    if modifiers.flag("ftz") and kind == "f32":
        return f"flush({a})", f"flush({b})"
    return a, b


@instruction("setp", counted="kInteger")
def set_predicate(fn, modifiers, operands):
    kind = modifiers.type()
    if kind in PACKED:
        return _set_packed(fn, modifiers, operands, PACKED[kind])
    result = _comparison(modifiers, kind, *_comparands(fn, modifiers, operands[1:3], kind))
    targets = [part.strip() for part in operands[0].split("|")]
    join = modifiers.choice("and", "or", "xor")
    sign = {"and": "&&", "or": "||", "xor": "!="}.get(join)
    other = fn.value(operands[3], "pred") if join else None
    code = f"{{ const bool holds = {result}; "
    for target, value in zip(targets, ("holds", "!holds"), strict=False):
        code += fn.assign(target, f"({value} {sign} {other})" if join else value, "pred") + " "
    return code + "}"


def _set_packed(fn, modifiers, operands, part):
    """setp on f16x2: one predicate for each half."""
    cpp = CPP[part]
    words = [fn.value(o, "b32") for o in operands[1:3]]
    targets = [target.strip() for target in operands[0].split("|")]
    relation = modifiers.choice(*_RELATION, *_UNORDERED, "num", "nan")
    flush = modifiers.flag("ftz")
    code = ""
    for target, shift in zip(targets, (0, 16), strict=False):
        halves = [f"widen({cpp}{{uint16_t({w} >> {shift})}})" for w in words]
        halves = [f"flush_half({h})" if flush else h for h in halves]
        code += fn.assign(target, _Relation(relation).of(*halves), "pred")
    return code


class _Relation:
    """A comparison that is already taken from the modifiers, to be used more than once."""

    def __init__(self, name):
        self.name = name

    def choice(self, *_):
        return self.name

    def of(self, a, b):
        return _comparison(self, "f32", a, b)


@instruction("set", counted="kInteger")
def set_value(fn, modifiers, operands):
    """All ones (or 1.0) where the comparison holds."""
    source = modifiers.type()
    target = modifiers.type()
    ones = {"f16": "half{0x3c00}", "bf16": "bfloat{0x3f80}", "f32": "1.0f"}
    if source in PACKED:
        return _set_pair(fn, modifiers, operands, source, target)
    result = _comparison(modifiers, source, *_comparands(fn, modifiers, operands[1:3], source))
    true = ones.get(target, f"{CPP[target]}(-1)")
    return fn.assign(operands[0], f"({result} ? {true} : {CPP[target]}{{}})", target)


def _set_pair(fn, modifiers, operands, source, target):
    part = PACKED[source]
    true = {"f16x2": 0x3C00, "bf16x2": 0x3F80}.get(target, 0xFFFF)
    relation = _Relation(modifiers.choice(*_RELATION, *_UNORDERED, "num", "nan"))
    flush = modifiers.flag("ftz")
    words = [fn.value(o, "b32") for o in operands[1:3]]
    terms = []
    for shift in (0, 16):
        halves = [f"widen({CPP[part]}{{uint16_t({w} >> {shift})}})" for w in words]
        halves = [f"flush_half({h})" if flush else h for h in halves]
        terms.append(f"({relation.of(*halves)} ? {true}u << {shift} : 0u)")
    return fn.assign(operands[0], " | ".join(terms), "b32")


@instruction("selp", counted="kMove")
def select(fn, modifiers, operands):
    kind = modifiers.type()
    raw = f"b{8 * type_bytes(kind)}" if kind in FLOATS else kind
    a, b, condition = fn.value(operands[1], raw), fn.value(operands[2], raw), operands[3]
    return fn.assign(operands[0], f"({fn.value(condition, 'pred')} ? {a} : {b})", raw)


@instruction("slct", counted="kMove")
def select_by_sign(fn, modifiers, operands):
    compared = modifiers.type()
    modifiers.flag("ftz")
    kind = modifiers.type()
    a, b = (fn.value(o, kind) for o in operands[1:3])
    return fn.assign(operands[0], f"({fn.value(operands[3], compared)} >= 0 ? {a} : {b})", kind)
