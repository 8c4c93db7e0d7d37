"""Which stores use what a load has read: a thread that makes none of them has read it in vain.

Triton gives small tensors to several threads each, and masks off the stores of all but one. Those
threads read what the one overwrites, which is a race that changes nothing.
"""

import re

from .syntax import Instruction
from .translate import instruction_class

_PURE = ("kInteger", "kFloat", "kConversion", "kMove", "kSpecial")
_REGISTER = re.compile(r"%[\w$]+")
_ELSEWHERE = (1 << 64) - 1
_STORES = 64  # one bit for each


def uses(module, kernel):
    """({PTX line of a load: mask of stores}, {PTX line of a store: its bit}) of a kernel.

    A load whose value goes anywhere but to the data of stores has every bit: branches, addresses,
    other threads, functions, local memory.
    """
    body = next(f.body for f in module.functions if f.name == kernel)
    instructions = [s for s in body if isinstance(s, Instruction)]
    bits: dict[int, int] = {}
    for i in instructions:
        if i.opcode == "st" and not {"local", "param"} & {*i.modifiers} and len(bits) < _STORES - 1:
            bits[i.line] = 1 << len(bits)
    masks = dict.fromkeys((i.line for i in instructions if i.opcode == "ld"), 0)
    carried: dict[str, set] = {}  # by register: lines of the loads whose values are in it
    while _pass(instructions, bits, masks, carried):
        pass
    return masks, bits


def _pass(instructions, bits, masks, carried):
    """One round through the kernel; whether it found anything new."""
    before = sum(map(len, carried.values())), sum(map(int.bit_count, masks.values()))
    for i in instructions:
        kind = instruction_class(i.opcode)
        guard = carried.get(i.predicate or "", set())
        if i.opcode == "st":
            _take(masks, guard | _loads(i.operands[:1], carried), _ELSEWHERE)
            _take(masks, _loads(i.operands[1:], carried), bits.get(i.line, _ELSEWHERE))
        elif i.opcode == "ld" or kind in _PURE:
            found = guard | _loads(i.operands[1:], carried)
            if i.opcode == "ld":
                found = found | {i.line}
            for register in _REGISTER.findall(i.operands[0]):
                carried.setdefault(register, set()).update(found)
        else:
            _take(masks, guard | _loads(i.operands, carried), _ELSEWHERE)
    return before != (sum(map(len, carried.values())), sum(map(int.bit_count, masks.values())))


def _loads(operands, carried):
    registers = _REGISTER.findall(" ".join(operands))
    return set().union(*(carried.get(register, ()) for register in registers))


def _take(masks, loads, mask):
    for line in loads:
        masks[line] |= mask
