"""atom and red: read, change and write in one step, in global or shared memory."""

from ..errors import TranslationError
from ..types import CPP, HALVES, PACKED, type_bytes
from .memory import location, space_of
from .registry import instruction

_OPERATIONS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
_INTEGER = {
    "and": "old & {0}",
    "or": "old | {0}",
    "xor": "old ^ {0}",
    "exch": "{0}",
    "min": "old < {0} ? old : {0}",
    "max": "old > {0} ? old : {0}",
    "inc": "old >= {0} ? 0 : old + 1",
    "dec": "old == 0 || old > {0} ? {0} : old - 1",
    "cas": "old == {0} ? {1} : old",
}


def _update(operation, kind):
    """C++ expression of the new value, from `old` and the operands {0} and {1}."""
    if kind in HALVES or kind in ("f32", "f64"):
        if operation not in ("add", "min", "max"):
            raise TranslationError(f"atomic {operation} of .{kind} is not known")
        pattern = {"add": "{0} + {1}", "min": "minimum({0}, {1})", "max": "maximum({0}, {1})"}
        if kind not in HALVES:
            return pattern[operation].format("old", "{0}")
        return f"narrow_{CPP[kind]}({pattern[operation].format('widen(old)', 'widen({0})')})"
    if operation == "add":
        return f"uint{max(32, 8 * type_bytes(kind))}_t(old) + {{0}}"
    return _INTEGER[operation]


def _modifiers(modifiers, base):
    order = modifiers.choice("relaxed", "acquire", "release", "acq_rel", default="relaxed")
    scope = modifiers.choice("cta", "cluster", "gpu", "sys")
    modifiers.flag("noftz")
    modifiers.ignore("L2::", "level::")
    access = base
    if order in ("acquire", "acq_rel"):
        access += " | kAcquire"
    if order in ("release", "acq_rel"):
        access += " | kRelease"
    return access + (" | kBlockScope" if scope == "cta" else "")


def _elements(fn, kind, operand):
    """The separately updated elements of an operand: a vector's parts, or a pair's halves."""
    if kind not in PACKED:
        return [fn.value(part, kind) for part in fn.vector(operand)]
    words = [fn.value(part, "b32") for part in fn.vector(operand)]
    return [f"{CPP[PACKED[kind]]}{{uint16_t({w} >> {s})}}" for w in words for s in (0, 16)]


@instruction("atom", "red", counted="kAtomic")
def atomic(fn, modifiers, operands):
    kind = modifiers.type()
    base = "kRead | kWrite | kStrong" + (" | kNoResult" if modifiers.opcode == "red" else "")
    access = _modifiers(modifiers, base)
    space = space_of(modifiers)
    operation = modifiers.need(*_OPERATIONS)
    count = int(modifiers.choice("v2", "v4", "v8", default="v1")[1:])
    operands = list(operands)
    target = operands.pop(0) if modifiers.opcode == "atom" else "_"
    place = location(fn, operands[0], space, type_bytes(kind) * count, access)
    code = f"{{ static uint8_t hint; (void)hint; char* p = {place}; "
    return code + _updates(fn, operation, kind, target, operands[1:]) + "}"


def _updates(fn, operation, kind, target, sources):
    element = PACKED.get(kind, kind)
    size = type_bytes(element)
    columns = [_elements(fn, kind, source) for source in sources]
    code, results = "", []
    # All operands are read before a register is written: target and source may be the same.
    for i, arguments in enumerate(zip(*columns, strict=True)):
        names = [f"x{i}_{j}" for j in range(len(arguments))]
        code += "".join(
            f"const {CPP[element]} {n} = {a}; " for n, a in zip(names, arguments, strict=True)
        )
        update = _update(operation, element).format(*names)
        code += (
            f"const {CPP[element]} old{i} = atomic_update<{CPP[element]}>(p + {i * size}, "
            f"[&]({CPP[element]} old) {{ return {CPP[element]}({update}); }}); "
        )
        results.append(f"old{i}")
    return code + _results(fn, kind, target, results)


def _results(fn, kind, target, results):
    if target == "_":
        return f"(void){results[0]}; "
    code = ""
    if kind in PACKED:
        for i, register in enumerate(fn.vector(target)):
            low, high = results[2 * i : 2 * i + 2]
            code += fn.assign(register, f"{low}.bits | uint32_t({high}.bits) << 16", "b32") + " "
        return code
    for register, result in zip(fn.vector(target), results, strict=True):
        code += fn.assign(register, result, kind) + " "
    return code
