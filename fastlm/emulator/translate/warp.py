"""Barriers, fences and the collectives of a warp."""

from ..errors import TranslationError
from ..types import CPP
from .registry import instruction

_REDUCTIONS = {"add": "+", "min": "<", "max": ">", "and": "&", "or": "|", "xor": "^"}
_SHUFFLES = {"up": "u", "down": "d", "bfly": "b", "idx": "i"}


@instruction("bar", "barrier", counted="kSync")
def barrier(fn, modifiers, operands):
    if modifiers.flag("cluster"):
        raise TranslationError("clusters are not emulated; add them to runtime/warp.cpp")
    if modifiers.flag("warp"):
        modifiers.flag("sync")
        return f"warp_sync(t, {fn.site}, {fn.value(operands[0], 'u32')});"
    modifiers.flag("cta")
    aligned = "true" if modifiers.flag("aligned") or modifiers.opcode == "bar" else "false"
    action = modifiers.need("sync", "arrive", "red")
    if action == "red":
        return _voting_barrier(fn, modifiers, operands, aligned)
    values = [fn.value(o, "u32") for o in operands]
    count = values[1] if len(values) > 1 else "0"
    if action == "arrive":
        return f"barrier_arrive(t, {fn.site}, {values[0]}, {count});"
    return f"barrier_sync(t, {fn.site}, {aligned}, {values[0]}, {count});"


def _voting_barrier(fn, modifiers, operands, aligned):
    vote = modifiers.need("popc", "and", "or")
    kind = modifiers.type()
    target, identifier, *count, predicate = operands
    count = fn.value(count[0], "u32") if count else "0"
    threads = "t.block->ntid[0] * t.block->ntid[1] * t.block->ntid[2]"
    expected = f"({count} ? {count} : {threads})"
    call = (
        f"barrier_sync(t, {fn.site}, {aligned}, {fn.value(identifier, 'u32')}, {count}, "
        f"{fn.value(predicate, 'pred')})"
    )
    code = {"popc": call, "and": f"({call} == {expected})", "or": f"({call} != 0)"}[vote]
    return fn.assign(target, code, kind)


@instruction("membar", "fence", counted="kSync")
def fence(fn, modifiers, operands):
    modifiers.choice("sc", "acq_rel", "acquire", "release")
    modifiers.flag("sync_restrict::shared::cta", "sync_restrict::shared::cluster")
    proxy = modifiers.flag("proxy")
    if proxy:
        return _proxy_fence(modifiers)
    modifiers.flag("mbarrier_init")
    scope = modifiers.choice("cta", "cluster", "gpu", "gl", "sys")
    return f"fence(t, {'true' if scope == 'cta' else 'false'});"


def _proxy_fence(modifiers):
    modifiers.choice("cta", "cluster", "gpu", "sys")
    kind = modifiers.need("async", "async::global", "async::shared", "alias", "tensormap::generic",
                          "async::generic")  # fmt: skip
    modifiers.choice("global", "shared::cta", "shared::cluster")
    # Tensor maps are read from memory at each use: their proxy has nothing to catch up with.
    return "proxy_fence(t);" if kind.startswith("async") else ";"


@instruction("shfl", counted="kSync")
def shuffle(fn, modifiers, operands):
    modifiers.need("sync")
    mode = _SHUFFLES[modifiers.need(*_SHUFFLES)]
    modifiers.type()
    target, _, predicate = operands[0].partition("|")
    values = ", ".join(fn.value(o, "u32") for o in operands[1:])
    call = f"shuffle(t, {fn.site}, '{mode}', {values}, valid)"
    code = f"{{ bool valid; {fn.assign(target.strip(), call, 'b32')}"
    return code + (fn.assign(predicate.strip(), "valid", "pred") if predicate else "") + " }"


@instruction("vote", counted="kSync")
def vote(fn, modifiers, operands):
    modifiers.need("sync")
    kind = modifiers.need("ballot", "any", "all", "uni")
    modifiers.type()
    predicate, mask = fn.value(operands[1], "pred"), fn.value(operands[2], "u32")
    if kind == "ballot":
        return fn.assign(operands[0], f"ballot(t, {fn.site}, {predicate}, {mask})", "b32")
    code = {
        "any": "votes != 0",
        "all": "votes == lanes",
        "uni": "(votes == 0 || votes == lanes)",
    }[kind]
    start = f"const uint32_t lanes = {mask}, votes = ballot(t, {fn.site}, {predicate}, lanes);"
    return f"{{ {start} {fn.assign(operands[0], code, 'pred')} }}"


@instruction("match", counted="kSync")
def match(fn, modifiers, operands):
    kind = modifiers.need("any", "all")
    modifiers.need("sync")
    value = fn.value(operands[1], modifiers.type())
    mask = fn.value(operands[2], "u32")
    if kind == "any":
        return fn.assign(operands[0], f"match_any(t, {fn.site}, {value}, {mask})", "b32")
    target, _, predicate = operands[0].partition("|")
    call = f"match_all(t, {fn.site}, {value}, {mask}, all)"
    code = f"{{ bool all; {fn.assign(target.strip(), call, 'b32')}"
    return code + (fn.assign(predicate.strip(), "all", "pred") if predicate else "") + " }"


@instruction("redux", counted="kSync")
def reduce(fn, modifiers, operands):
    modifiers.need("sync")
    operation = _REDUCTIONS[modifiers.need(*_REDUCTIONS)]
    kind = modifiers.type()
    if kind not in ("s32", "u32", "b32"):
        raise TranslationError(f"redux of .{kind} is not known")
    value, mask = fn.value(operands[1], kind), fn.value(operands[2], "u32")
    call = f"reduce(t, {fn.site}, '{operation}', {CPP[kind]}({value}), {mask})"
    return fn.assign(operands[0], call, kind)


@instruction("elect", counted="kSync")
def elect(fn, modifiers, operands):
    modifiers.need("sync")
    target, _, predicate = operands[0].partition("|")
    call = f"elect(t, {fn.site}, {fn.value(operands[1], 'u32')}, leader)"
    code = f"{{ uint32_t leader; {fn.assign(predicate.strip(), call, 'pred')} "
    return code + fn.assign(target.strip(), "leader", "b32") + " }"


@instruction("activemask", counted="kSync")
def active_mask(fn, modifiers, operands):
    modifiers.type()
    return fn.assign(operands[0], "active_mask(t)", "b32")
