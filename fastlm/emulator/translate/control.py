"""Branches, calls, printf and assert."""

from ..errors import TranslationError
from ..syntax import Table
from .function import cpp_name
from .registry import instruction


@instruction("bra", counted="kControl")
def branch(fn, modifiers, operands):
    modifiers.flag("uni")
    return _jump(fn, operands[0])


def _jump(fn, name):
    label = fn.label(name)
    if not fn.is_backward(label):
        return f"goto {label};"
    # A loop that polls memory lets the other threads run; any other only has to end one day.
    turn = "spin" if fn.polls else "loop"
    return f"{turn}(t, {fn.site}); goto {label};"


@instruction("brx", counted="kControl")
def branch_by_index(fn, modifiers, operands):
    """To the label of that number in a .branchtargets; the ISA leaves other numbers undefined."""
    modifiers.need("idx")
    modifiers.flag("uni")
    index, name = operands
    tables = {s.name: s.entries for s in fn.function.body if isinstance(s, Table)}
    if name not in tables:
        raise TranslationError(f"brx.idx: {name} is no .branchtargets of this function")
    labels = tables[name]
    cases = " ".join(f"case {i}: {_jump(fn, label)}" for i, label in enumerate(labels))
    wrong = f'fail(t, {fn.site}, "brx.idx: the index is not below %u", {len(labels)}u);'
    return f"switch ({fn.value(index, 'u32')}) {{ {cases} default: {wrong} }}"


@instruction("ret", "exit", counted="kControl")
def leave(fn, modifiers, operands):
    modifiers.flag("uni")
    if modifiers.opcode == "exit" and not fn.function.is_kernel:
        raise TranslationError("exit inside a function that is not inlined is not known")
    return "return;"


@instruction("trap", "brkpt", counted="kControl")
def trap(fn, modifiers, operands):
    return f'fail(t, {fn.site}, "{modifiers.opcode}: the kernel stopped itself");'


@instruction("nanosleep", counted="kControl")
def sleep(fn, modifiers, operands):
    modifiers.type()
    return f"spin(t, {fn.site});"


@instruction("pmevent", counted="kControl")
def profiler_event(fn, modifiers, operands):
    modifiers.flag("mask")
    return ";"  # counted by profilers only


@instruction("call", counted="kControl")
def call(fn, modifiers, operands):
    """call (results), callee, (arguments), prototype; each value is a buffer in parameter space."""
    modifiers.flag("uni")
    operands = list(operands)
    results = _names(operands.pop(0)) if operands[0].startswith("(") else []
    callee = operands.pop(0)
    arguments = _names(operands.pop(0)) if operands and operands[0].startswith("(") else []
    buffers = [fn.locals[name] for name in (*results, *arguments)]
    if callee == "vprintf":
        text, values = (f"peek<const char*>({buffer})" for buffer in buffers[1:])
        return f"poke({buffers[0]}, print(t, {fn.site}, {text}, {values}));"
    if callee == "__assertfail":
        return _assertion(fn, buffers)
    passed = ", ".join(("t", *buffers))
    if fn.register(callee):
        types = ", ".join(("Thread&", *["char*"] * len(buffers)))
        address = fn.value(callee, "u64")
        return f"reinterpret_cast<void (*)({types})>({address})({passed});"
    if not fn.module.has_body(callee):
        raise TranslationError(
            f"function {callee} has no body here; system calls other than vprintf and "
            "__assertfail are not known: add it to fastlm/emulator/translate/control.py"
        )
    return f"f{cpp_name(callee)}({passed});"


def _names(operand):
    return [name.strip() for name in operand.strip("()").split(",") if name.strip()]


def _assertion(fn, buffers):
    message, file, line, function, _ = buffers
    text = [f"peek<const char*>({buffer})" for buffer in (message, file, function)]
    return (
        f'fail(t, {fn.site}, "assertion failed: %s (%s:%d, %s)", {text[0]}, {text[1]}, '
        f"peek<int32_t>({line}), {text[2]});"
    )
