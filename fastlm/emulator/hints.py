"""Where to look after a fault, by what went wrong and by the instructions that were involved."""

import re
from typing import NamedTuple

from .syntax import Instruction, Label

_PARITY = (
    "the parity that the mbarrier is waited on with (0 at first, the other one each time round), "
    "its count, and the bytes that it expects"
)
_LOCK = "the lock: every path must release it, and no thread of a warp may wait for another's"
_FLAG = "who sets the flag that the loop reads, and whether its block can be resident by then"
_VOLATILE = (
    "volatile, which orders nothing: use barriers within a block, and between blocks atomics, or "
    "__threadfence() before the write and after the read"
)
_BLOCKS = (
    "what orders blocks: an atomic on the data, a lock or flag with __threadfence() on both sides, "
    "grid.sync(), or a second launch"
)
_ATOMIC = (
    "the access that is not atomic: make it atomic too, or order it by a barrier within the block, "
    "by fences and a flag or by a second launch between blocks"
)
_SCOPE = "the scope of the accesses: .cta orders the threads of one block alone"

# By the text of the reason: the first that matches.
_BY_REASON = (
    (r"still to fill.*bulk", _PARITY),
    (r"still to fill", "how many groups cp.async.wait_group lets be in flight, and the barrier "
     "after it: a wait covers the thread's own copies alone"),
    (r"cp\.async not waited", "the cp.async.wait_group after the loop"),
    (r"bulk store has read", "cp.async.bulk.commit_group and wait_group after the store"),
    (r"bulk load is in flight", _PARITY),
    (r"wgmma not waited", "the wgmma.wait_group after the last product"),
    (r"fence\.proxy\.async", "the store before the copy: a fence.proxy.async must follow it"),
    (r"mbarrier: more arrivals", _PARITY + ", and whether mbarrier.init comes first"),
    (r"mbarrier\.init", "the count of mbarrier.init"),
    (r"tensor map|tensor copy|bulk copy", "the descriptor: type, box, strides, swizzle, alignment"),
    (r"global memory that nobody", "who should have filled the tensor before this launch, or the "
     "store before this read"),
    (r"that nobody has written", "the code that should have filled this part of the array"),
    (r"shared memory .* out of", "the size of the array, the index, and the launch's shared bytes"),
    (r"local memory", "the index into the local array, and the array's size"),
    (r"global memory", "the index, the mask of the last row or tile, and the tensor's size"),
    (r"misaligned", "the offset of the pointer; vector accesses need their own size as alignment"),
    (r"stack overflow", "the depth of the recursion, and the size of local arrays"),
    (r"invalid memory", "the pointer that the access goes through"),
    (r"exits while lanes|have exited or do not", "early returns before the warp operation: every "
     "lane of its mask must reach it"),
    (r"diverged warp|not in mask|on the mask", "branches around the warp operation, and its mask: "
     "the lanes named there must reach it together"),
    (r"warpgroup", "branches around wgmma: all 128 threads must reach it with the same operands"),
    (r"barrier's count|barrier for", "the number of threads that the named barrier is given"),
    (r"have not started", "blocks that wait for others need all of them resident: a smaller grid, "
     "smaller blocks, or the option `resident`"),
    (r"barrier", "early returns and branches before the barrier"),
    (r"loops 2\^28 times", "the condition of the loop, and what each trip changes"),
)  # fmt: skip


class Site(NamedTuple):
    """An instruction that was involved, and the loop that it jumps back in, if it does."""

    instruction: Instruction
    loop: list


def site(module, ptx_line):
    """The Site of a line of a parsed module, or None."""
    for function in module.functions:
        for position, statement in enumerate(function.body or []):
            if isinstance(statement, Instruction) and statement.line == ptx_line:
                return Site(statement, _loop(function.body, position))
    return None


def _loop(body, position):
    """Instructions from the label that a branch jumps back to; none if it is no such branch."""
    jump = body[position]
    if jump.opcode != "bra":
        return []
    for start in range(position, -1, -1):
        if isinstance(body[start], Label) and body[start].name == jump.operands[0]:
            return [s for s in body[start:position] if isinstance(s, Instruction)]
    return []


def same_warp(reason, block):
    """Whether the two threads that the reason of a race names are of one warp."""
    found = re.findall(r"thread \((\d+), (\d+), (\d+)\)", reason)
    warps = {(int(x) + block[0] * (int(y) + block[1] * int(z))) // 32 for x, y, z in found}
    return len(found) == 2 and len(warps) == 1 and "of block number" not in reason


def hint(reason, here, other, same_warp=False):
    """What to look at, or None. `here` and `other` are the Sites of a fault, or None."""
    if "data race" in reason:
        found = [s.instruction for s in (here, other) if s]
        return _of_race(reason, found, same_warp)
    waits = reason.startswith(("livelock", "deadlock"))
    if waits and here and "not started" not in reason:
        polled = _of_wait(reason, [here.instruction, *here.loop])
        if polled:
            return polled
    return next((text for pattern, text in _BY_REASON if re.search(pattern, reason)), None)


def _of_wait(reason, instructions):
    opcodes = {i.opcode for i in instructions}
    if "mbarrier" in opcodes:
        return _PARITY
    if any(i.opcode == "atom" and {"cas", "exch"} & {*i.modifiers} for i in instructions):
        return _LOCK
    if any(i.opcode in ("ld", "atom") and _is_strong(i) for i in instructions):
        return _FLAG
    if reason.startswith("deadlock"):
        return "the barriers in branches, and the number of threads that named barriers are given"
    return None


def _is_strong(instruction):
    return instruction.opcode in ("atom", "red") or bool(
        {"volatile", "relaxed", "acquire", "release"} & {*instruction.modifiers}
    )


def _of_race(reason, instructions, same_warp):
    opcodes = {i.opcode for i in instructions}
    modifiers = {m for i in instructions for m in i.modifiers}
    between_blocks = "of block number" in reason
    if "wgmma" in opcodes or "by wgmma" in reason:
        return "the wgmma.wait_group that must come before the buffer is filled again"
    if "cp" in opcodes and {"bulk", "tensor"} & modifiers:
        return "the mbarrier that says when the buffer is full, or free again: " + _PARITY
    if "cp" in opcodes:
        return (
            "cp.async.wait_group and the barrier after it, which must stand between the copy and "
            "the other threads' accesses, before and after"
        )
    if "mbarrier" in opcodes:
        return "the barrier between mbarrier.init and the first use by other threads"
    if {"atom", "red"} & opcodes:
        strong = all(map(_is_strong, instructions))
        return _SCOPE if strong and "cta" in modifiers else _ATOMIC
    if "volatile" in modifiers:
        return _VOLATILE
    if between_blocks:
        return _BLOCKS
    barrier = "__syncthreads()"
    if same_warp:
        barrier = "__syncwarp(), or __syncthreads() if other warps use the data too"
    return f"the barrier that should stand between the two lines, such as {barrier}"
