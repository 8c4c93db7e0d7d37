"""Integer arithmetic, and the opcodes that integers share with floats."""

from ..errors import TranslationError
from ..types import CPP, FLOATS, PACKED, is_signed, type_bytes
from .floating import floating, sign_change
from .registry import instruction


def _is_float(kind):
    return kind in FLOATS or kind in PACKED


def _unsigned(expression, kind):
    """For wrapping arithmetic, which C++ defines for unsigned types only."""
    return f"uint{max(32, 8 * type_bytes(kind))}_t({expression})"


@instruction("add", "sub", counted="kInteger")
def add(fn, modifiers, operands):
    kind = modifiers.type()
    if _is_float(kind):
        return floating(fn, modifiers, modifiers.opcode, operands, kind)
    if modifiers.flag("cc"):
        return _with_carry(fn, modifiers.opcode, operands, kind, uses=False, sets=True)
    a, b = (fn.value(o, kind) for o in operands[1:])
    if modifiers.flag("sat"):
        name = "saturated_add" if modifiers.opcode == "add" else "saturated_subtract"
        return fn.assign(operands[0], f"{name}<{CPP[kind]}>({a}, {b})", kind)
    sign = "+" if modifiers.opcode == "add" else "-"
    return fn.assign(operands[0], f"{_unsigned(a, kind)} {sign} {_unsigned(b, kind)}", kind)


@instruction("addc", "subc", counted="kInteger")
def add_with_carry(fn, modifiers, operands):
    kind = modifiers.type()
    sets = modifiers.flag("cc")
    return _with_carry(fn, modifiers.opcode[:3], operands, kind, uses=True, sets=sets)


def _with_carry(fn, opcode, operands, kind, uses, sets):
    a, b = (fn.value(o, "u" + kind[1:]) for o in operands[1:])
    sign = "+" if opcode == "add" else "-"
    carry = " carry" if uses else " 0"
    bits = 8 * type_bytes(kind)
    code = f"unsigned __int128 wide = (unsigned __int128)({a}) {sign} {b} {sign}{carry}; "
    code += fn.assign(operands[0], f"uint{bits}_t(wide)", "u" + kind[1:])
    return "{ " + code + (f" carry = (wide >> {bits}) & 1;" if sets else "") + " }"


@instruction("mul", "mad", counted="kInteger")
def multiply(fn, modifiers, operands):
    kind = modifiers.type()
    if _is_float(kind):
        operation = "mul" if modifiers.opcode == "mul" else "fma"
        return floating(fn, modifiers, operation, operands, kind)
    part = modifiers.need("lo", "hi", "wide")
    a, b = (fn.value(o, kind) for o in operands[1:3])
    result = kind
    if part == "wide":
        result = f"{'s' if is_signed(kind) else 'u'}{16 * type_bytes(kind)}"
        product = f"{CPP[result]}({a}) * {CPP[result]}({b})"
    elif part == "hi":
        product = f"multiply_high<{CPP[kind]}>({a}, {b})"
    else:
        product = f"{_unsigned(a, kind)} * {_unsigned(b, kind)}"
    if modifiers.opcode == "mad":
        addend = fn.value(operands[3], result)
        product = f"{_unsigned(product, result)} + {_unsigned(addend, result)}"
    return fn.assign(operands[0], product, result)


@instruction("mul24", "mad24", counted="kInteger")
def multiply24(fn, modifiers, operands):
    if not modifiers.flag("lo"):
        raise TranslationError("only the .lo form of 24-bit multiplication is known")
    kind = modifiers.type()
    a, b = (f"({fn.value(o, kind)} << 8 >> 8)" for o in operands[1:3])
    addend = f" + {fn.value(operands[3], 'u32')}" if modifiers.opcode == "mad24" else ""
    return fn.assign(operands[0], f"uint32_t({a}) * uint32_t({b}){addend}", kind)


@instruction("div", "rem", counted="kInteger")
def divide(fn, modifiers, operands):
    kind = modifiers.type()
    if _is_float(kind):
        return floating(fn, modifiers, "div", operands, kind)
    a, b = (fn.value(o, kind) for o in operands[1:])
    name = "divide" if modifiers.opcode == "div" else "remainder"
    return fn.assign(operands[0], f"{name}<{CPP[kind]}>({a}, {b})", kind)


@instruction("min", "max", counted="kInteger")
def extremum(fn, modifiers, operands):
    kind = modifiers.type()
    if _is_float(kind):
        return floating(fn, modifiers, modifiers.opcode, operands, kind)
    relu = modifiers.flag("relu")
    a, b = (fn.value(o, kind) for o in operands[1:])
    order = "<" if modifiers.opcode == "min" else ">"
    code = f"({a} {order} {b} ? {a} : {b})"
    return fn.assign(operands[0], f"({code} > 0 ? {code} : 0)" if relu else code, kind)


@instruction("abs", "neg", counted="kInteger")
def sign(fn, modifiers, operands):
    kind = modifiers.type()
    if _is_float(kind):
        return sign_change(fn, modifiers, modifiers.opcode, operands, kind)
    value = fn.value(operands[1], kind)
    negated = f"{CPP[kind]}(0 - {_unsigned(value, kind)})"
    code = f"({value} < 0 ? {negated} : {value})" if modifiers.opcode == "abs" else negated
    return fn.assign(operands[0], code, kind)
