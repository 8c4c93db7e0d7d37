"""Floating-point arithmetic: rounding, .ftz, .sat, .relu; 16-bit types alone or in pairs."""

from ..errors import TranslationError
from ..types import HALVES, PACKED
from .registry import instruction

_ROUNDED = {"add": "add_rounded", "mul": "multiply_rounded", "fma": "fma_rounded",
            "div": "divide_rounded", "sqrt": "sqrt_rounded"}  # fmt: skip
_FORMULA = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "min": "minimum({0}, {1})",
    "max": "maximum({0}, {1})",
    "min.NaN": "minimum_nan({0}, {1})",
    "max.NaN": "maximum_nan({0}, {1})",
}


def _float_math(name, kind):
    return f"__builtin_{name}{'' if kind == 'f64' else 'f'}"


def _formula(operation, kind):
    if operation in _FORMULA:
        return _FORMULA[operation]
    if operation == "fma":
        return f"{_float_math('fma', kind)}({{0}}, {{1}}, {{2}})"
    if operation == "rsqrt":
        return f"1 / {_float_math('sqrt', kind)}({{0}})"
    if operation == "rcp":
        return "1 / {0}"
    host = {"ex2": "exp2", "lg2": "log2"}.get(operation, operation)
    return f"{_float_math(host, kind)}({{0}})"


class _Style:
    """The modifiers that all floating-point instructions share."""

    def __init__(self, modifiers):
        self.rounding = modifiers.choice("rn", "rz", "rm", "rp", default="rn")[1]
        self.flush = modifiers.flag("ftz")
        self.saturate = modifiers.flag("sat")
        self.relu = modifiers.flag("relu")

    def before(self, expression, kind):
        if not self.flush:
            return expression
        return f"{'flush_half' if kind == 'f16' else 'flush'}({expression})"

    def after(self, expression, kind):
        if self.saturate:
            expression = f"saturate({expression})"
        if self.relu:
            expression = f"relu({expression})"
        return self.before(expression, kind)


def scalar(operation, arguments, kind, style):
    """C++ expression for one element; arguments have the C++ type of `kind`."""
    if kind in HALVES:
        return _half(operation, arguments, kind, style)
    arguments = [style.before(a, kind) for a in arguments]
    if style.rounding != "n":
        if operation == "sub":
            operation, arguments = "add", [arguments[0], f"-({arguments[1]})"]
        if operation == "rcp":
            operation, arguments = "div", ["1.0f" if kind == "f32" else "1.0", *arguments]
        if operation not in _ROUNDED:
            raise TranslationError(f"rounding .r{style.rounding} is not known for '{operation}'")
        result = f"{_ROUNDED[operation]}({', '.join(arguments)}, '{style.rounding}')"
    else:
        result = _formula(operation, kind).format(*arguments)
    return style.after(result, kind)


def _half(operation, arguments, kind, style):
    cpp = "half" if kind == "f16" else "bfloat"
    if style.rounding != "n":
        raise TranslationError(f"rounding .r{style.rounding} is not known for .{kind}")
    wide = [style.before(f"widen({a})", kind) for a in arguments]
    if operation == "fma":
        # Float would round twice: the product and sum are kept to the last bit in double.
        exact = f"narrow<{cpp}>(fma_to_odd({', '.join(wide)}))"
        return f"narrow_{cpp}({style.after(f'widen({exact})', kind)})"
    return f"narrow_{cpp}({style.after(_formula(operation, 'f32').format(*wide), kind)})"


def floating(fn, modifiers, operation, operands, kind):
    """C++ statement for an operation on floats, or on each half of a packed pair."""
    if operation in ("min", "max") and modifiers.flag("NaN"):
        operation += ".NaN"
    modifiers.flag("approx", "full")  # the emulator is as accurate as the host's library
    style = _Style(modifiers)
    target, *sources = operands
    if kind not in PACKED:
        return fn.assign(
            target, scalar(operation, [fn.value(s, kind) for s in sources], kind, style), kind
        )
    part = PACKED[kind]
    cpp = "half" if part == "f16" else "bfloat"
    words = [fn.value(s, "b32") for s in sources]
    low, high = (
        scalar(operation, [f"{cpp}{{uint16_t({w} >> {shift})}}" for w in words], part, style)
        for shift in (0, 16)
    )
    return fn.assign(target, f"uint32_t(({low}).bits) | uint32_t(({high}).bits) << 16", "b32")


def sign_change(fn, modifiers, operation, operands, kind):
    """abs and neg touch the sign bit only."""
    flush = modifiers.flag("ftz")
    modifiers.flag("sat") and _no_saturation(operation)
    bits = {"f16": "b16", "bf16": "b16", "f32": "b32", "f64": "b64"}.get(kind, "b32")
    sign = {"b16": "0x8000u", "b64": "(1ull << 63)"}.get(bits, "0x80000000u")
    if kind in PACKED:
        sign = "0x80008000u"
    value = fn.value(operands[1], bits)
    if flush and kind == "f32":
        value = f"__builtin_bit_cast(uint32_t, flush({fn.value(operands[1], kind)}))"
    code = f"{value} & ~{sign}" if operation == "abs" else f"{value} ^ {sign}"
    return fn.assign(operands[0], code, bits)


def _no_saturation(operation):
    raise TranslationError(f".sat is not known for '{operation}'")


@instruction("fma", counted="kFloat")
def fma(fn, modifiers, operands):
    return floating(fn, modifiers, "fma", operands, modifiers.type())


@instruction("sqrt", "rsqrt", "rcp", "ex2", "lg2", "sin", "cos", "tanh", counted="kSpecial")
def special(fn, modifiers, operands):
    return floating(fn, modifiers, modifiers.opcode, operands, modifiers.type())


@instruction("copysign", counted="kFloat")
def copysign(fn, modifiers, operands):
    kind = modifiers.type()
    sign, magnitude = fn.value(operands[1], kind), fn.value(operands[2], kind)
    code = f"{_float_math('copysign', kind)}({magnitude}, {sign})"
    return fn.assign(operands[0], code, kind)


@instruction("testp", counted="kFloat")
def testp(fn, modifiers, operands):
    test = modifiers.need("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    kind = modifiers.type()
    value = fn.value(operands[1], kind)
    code = {
        "finite": "__builtin_isfinite({0})",
        "infinite": "(__builtin_isinf({0}) != 0)",
        "number": "({0} == {0})",
        "notanumber": "({0} != {0})",
        "normal": "(__builtin_isnormal({0}) != 0)",
        "subnormal": "({0} != 0 && __builtin_isfinite({0}) && !__builtin_isnormal({0}))",
    }[test]
    return fn.assign(operands[0], code.format(value), "pred")
