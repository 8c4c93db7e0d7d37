"""cvt: between integers, between floats, and from one to the other."""

from ..errors import TranslationError
from ..types import CPP, FLOATS, HALVES, PACKED, is_signed
from .registry import instruction

_TO_INTEGER = {"rni": "nearbyint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}


@instruction("cvt", counted="kConversion")
def convert(fn, modifiers, operands):
    source = modifiers.type()
    target = modifiers.type()
    if target in PACKED:
        return _to_pair(fn, modifiers, operands, source, target)
    value = fn.value(operands[1], source)
    if source in FLOATS and target in FLOATS:
        code = _between_floats(modifiers, value, source, target)
    elif source in FLOATS:
        code = _to_integer(modifiers, value, source, target)
    elif target in FLOATS:
        code = _from_integer(modifiers, value, source, target)
    elif modifiers.flag("sat"):
        code = f"clamp_integer<{CPP[target]}>({value})"
    else:
        code = f"{CPP[target]}({value})"
    return fn.assign(operands[0], code, target)


def _widened(modifiers, value, source):
    value = f"widen({value})" if source in HALVES else value
    return f"flush({value})" if modifiers.flag("ftz") and source != "f64" else value


def _to_integer(modifiers, value, source, target):
    rounding = modifiers.need(*_TO_INTEGER)
    modifiers.flag("sat")  # from floats the ISA always clamps
    suffix = "" if source == "f64" else "f"
    whole = f"__builtin_{_TO_INTEGER[rounding]}{suffix}({_widened(modifiers, value, source)})"
    return f"to_integer<{CPP[target]}>({whole})"


def _from_integer(modifiers, value, source, target):
    rounding = modifiers.need("rn", "rz", "rm", "rp")
    if rounding != "rn":
        if target != "f32":
            raise TranslationError(f"rounding .{rounding} is not known from integers to .{target}")
        wide = "int64_t" if is_signed(source) else "uint64_t"
        return _saturated(modifiers, f"convert_rounded({wide}({value}), '{rounding[1]}')")
    if target in HALVES:
        # Through double, which holds 32-bit integers exactly; then one rounding.
        return f"narrow<{CPP[target]}>(double({value}))"
    return _saturated(modifiers, f"{CPP[target]}({value})")


def _saturated(modifiers, value):
    return f"saturate({value})" if modifiers.flag("sat") else value


def _between_floats(modifiers, value, source, target):
    value = _widened(modifiers, value, source)
    whole = modifiers.choice(*_TO_INTEGER)
    if whole:
        value = f"__builtin_{_TO_INTEGER[whole]}{'' if source == 'f64' else 'f'}({value})"
    rounding = modifiers.choice("rn", "rz", "rm", "rp", default="rn")
    if modifiers.flag("relu"):
        value = f"relu({value})"
    value = _saturated(modifiers, value)
    if target in HALVES:
        return _to_half(value, source, target, rounding)
    if rounding != "rn" and (source, target) == ("f64", "f32"):
        return f"convert_rounded({value}, '{rounding[1]}')"
    return f"{CPP[target]}({value})"


def _to_half(value, source, target, rounding):
    if rounding == "rz" and target == "bf16":
        return f"narrow_bfloat({value}, true)"
    if rounding != "rn":
        raise TranslationError(f"rounding .{rounding} is not known from .{source} to .{target}")
    if source == "f64":
        return f"narrow<{CPP[target]}>({value})"
    return f"narrow_{CPP[target]}({value})"


def _to_pair(fn, modifiers, operands, source, target):
    """d = {high: a, low: b}."""
    if source != "f32":
        raise TranslationError(f"conversion of .{source} to .{target} is not known")
    part = PACKED[target]
    rounding = modifiers.need("rn", "rz")
    relu = modifiers.flag("relu")
    halves = []
    for operand in operands[1:]:
        value = fn.value(operand, "f32")
        halves.append(_to_half(f"relu({value})" if relu else value, source, part, rounding))
    code = f"uint32_t(({halves[1]}).bits) | uint32_t(({halves[0]}).bits) << 16"
    return fn.assign(operands[0], code, "b32")
