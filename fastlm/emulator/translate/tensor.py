"""Matrix instructions: mma, ldmatrix, stmatrix, wgmma."""

from ..errors import TranslationError
from .registry import instruction

_FORMATS = {"f16": "Format::kHalf", "bf16": "Format::kBfloat"}


def _array(fn, name, operand):
    """`const uint32_t name[] = {...}` of the registers of a vector operand, read as bits."""
    parts = [p if fn.register(p) else f"__builtin_bit_cast(uint32_t, {fn.value(p, 'f32')})"
             for p in fn.vector(operand)]  # fmt: skip
    values = ", ".join(fn.value(p, "b32") if fn.register(p) else p for p in parts)
    return f"const uint32_t {name}[] = {{{values}}}; "


def _assign_all(fn, operand, name):
    return " ".join(fn.assign(r, f"{name}[{i}]", "b32") for i, r in enumerate(fn.vector(operand)))


@instruction("mma", counted="kTensor")
def mma(fn, modifiers, operands):
    modifiers.need("sync")
    modifiers.need("aligned")
    shape = modifiers.choice("m16n8k16", "m16n8k8")
    if shape is None:
        raise TranslationError(
            "only mma of m16n8k16 and m16n8k8 with 16-bit inputs is known; "
            "add the shape's fragment layout to runtime/matrix.cpp"
        )
    modifiers.need("row")
    modifiers.need("col")
    *_, c_type = (modifiers.type() for _ in range(1))
    b_type, a_type, d_type = modifiers.type(), modifiers.type(), modifiers.type()
    if (
        a_type != b_type
        or a_type not in _FORMATS
        or c_type != d_type
        or d_type not in ("f32", "f16")
    ):
        raise TranslationError(f"mma of .{a_type} and .{b_type} into .{d_type} is not known")
    target, a, b, c = operands
    half_sums = "true" if d_type == "f16" else "false"
    depth = shape.rpartition("k")[2]
    code = f"{{ uint32_t d[4]; {_array(fn, 'a', a)}{_array(fn, 'b', b)}{_array(fn, 'c', c)}"
    code += f"mma(t, {fn.site}, {_FORMATS[a_type]}, {depth}, {half_sums}, d, a, b, c); "
    return code + _assign_all(fn, target, "d") + " }"


def _matrices(modifiers):
    modifiers.need("sync")
    modifiers.need("aligned")
    modifiers.need("m8n8")
    count = int(modifiers.need("x1", "x2", "x4")[1:])
    transposed = "true" if modifiers.flag("trans") else "false"
    modifiers.choice("shared", "shared::cta")
    modifiers.need("b16")
    return count, transposed


@instruction("ldmatrix", counted="kTensor")
def load_matrix(fn, modifiers, operands):
    count, transposed = _matrices(modifiers)
    code = f"{{ uint32_t d[{count}]; ldmatrix(t, {fn.site}, {count}, {transposed}, "
    return code + f"{fn.address(operands[1])}, d); {_assign_all(fn, operands[0], 'd')} }}"


@instruction("stmatrix", counted="kTensor")
def store_matrix(fn, modifiers, operands):
    count, transposed = _matrices(modifiers)
    code = f"{{ {_array(fn, 'values', operands[1])}stmatrix(t, {fn.site}, {count}, {transposed}, "
    return code + f"{fn.address(operands[0])}, values); }}"


@instruction("wgmma", counted="kTensor")
def wgmma(fn, modifiers, operands):
    action = modifiers.need("mma_async", "fence", "commit_group", "wait_group")
    modifiers.need("sync")
    modifiers.need("aligned")
    if action == "fence":
        return ";"  # orders registers, which the emulator never reorders
    if action == "commit_group":
        return "commit_wgmma(t);"
    if action == "wait_group":
        return f"wait_wgmma(t, {fn.site}, {operands[0]});"
    return _wgmma_product(fn, modifiers, operands)


def _wgmma_shape(modifiers):
    b_type, a_type, d_type = modifiers.type(), modifiers.type(), modifiers.type()
    shape = modifiers.choice(*(f"m64n{n}k16" for n in range(8, 257, 8)))
    if not shape or a_type != b_type or a_type not in _FORMATS or d_type != "f32":
        raise TranslationError(
            "only wgmma of m64nNk16 with f16 or bf16 inputs and f32 sums is known; "
            "add the others to runtime/wgmma.cpp"
        )
    return int(shape[4:].partition("k")[0]), _FORMATS[a_type]


def _wgmma_product(fn, modifiers, operands):
    """Operands: d, a (registers or descriptor), b, scale-d, scale-a, -b {, trans-a, trans-b}."""
    n, number_format = _wgmma_shape(modifiers)
    target, a, b, accumulate, scale_a, scale_b, *transposed = operands
    in_registers = a.startswith("{")
    if transposed and in_registers:
        transposed = ["0", *transposed]
    flags = [f"{scale} < 0" for scale in (scale_a, scale_b)] + [f"{x} != 0" for x in transposed]
    shape = f"const Wgmma shape{{{number_format}, {n}, {', '.join(flags)}}}; "
    registers = fn.vector(target)
    late = fn.module.late_wgmma
    pointers = [f"&{fn.register(r)[0]}" if late else f"d + {i}" for i, r in enumerate(registers)]
    code = "{ " + shape
    if not late:
        values = ", ".join(fn.value(r, "b32") for r in registers)
        code += f"uint32_t d[] = {{{values}}}; "
    code += f"uint32_t* const registers[] = {{{', '.join(pointers)}}}; "
    if in_registers:
        code += _array(fn, "a", a)
    descriptor = "0" if in_registers else fn.value(a, "b64")
    code += (
        f"wgmma(t, {fn.site}, shape, {{registers, {'a' if in_registers else 'nullptr'}, "
        f"{descriptor}, {fn.value(b, 'b64')}, {fn.value(accumulate, 'pred')}}}); "
    )
    return code + ("" if late else _assign_all(fn, target, "d")) + " }"
