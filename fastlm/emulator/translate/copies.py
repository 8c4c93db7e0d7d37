"""Asynchronous copies: cp.async, bulk copies, TMA, mbarrier, tensor maps."""

import re

from ..errors import TranslationError
from .registry import instruction


@instruction("cp", counted="kCopy")
def copy(fn, modifiers, operands):
    adds = modifiers.flag("reduce")
    modifiers.need("async")
    if adds:
        modifiers.need("bulk")
        modifiers.need("add")
        modifiers.need("f32")
        return _bulk_store(fn, modifiers, operands, "true")
    if modifiers.flag("bulk"):
        return _bulk(fn, modifiers, operands)
    if modifiers.flag("commit_group"):
        return "commit_copies(t);"
    if modifiers.flag("wait_group"):
        return f"wait_copies(t, {operands[0]});"
    if modifiers.flag("wait_all"):
        return "commit_copies(t); wait_copies(t, 0);"
    if modifiers.flag("mbarrier"):
        return _arrive_after_copies(fn, modifiers, operands)
    modifiers.need("ca", "cg")
    modifiers.need("shared", "shared::cta")
    modifiers.need("global")
    operands = _without_policy(modifiers, operands)
    to, source, size = fn.address(operands[0]), fn.address(operands[1]), int(operands[2], 0)
    source_size = fn.value(operands[3], "u32") if len(operands) > 3 else str(size)
    return f"copy_async(t, {fn.site}, {to}, {source}, {size}, {source_size});"


def _without_policy(modifiers, operands):
    """A cache policy is the last operand and changes no value."""
    if modifiers.flag("L2::cache_hint"):
        operands = operands[:-1]
    modifiers.ignore("L2::")
    return operands


def _arrive_after_copies(fn, modifiers, operands):
    modifiers.need("arrive")
    counted = "true" if modifiers.flag("noinc") else "false"
    modifiers.choice("shared", "shared::cta")
    modifiers.need("b64")
    return f"mbarrier_arrive_after_copies(t, {fn.site}, {fn.address(operands[0])}, {counted});"


def _bulk(fn, modifiers, operands):
    if modifiers.flag("commit_group"):
        return "commit_bulk(t);"
    if modifiers.flag("wait_group"):
        modifiers.flag("read")
        return f"wait_bulk(t, {operands[0]});"
    if modifiers.flag("prefetch"):
        modifiers.flag("tensor")
        modifiers.ignore("1d", "2d", "3d", "4d", "5d", "L2", "global", "tile")
        return ";"  # moves data between caches only
    if modifiers.flag("tensor"):
        return _tensor(fn, modifiers, operands)
    operands = _without_policy(modifiers, operands)
    if modifiers.flag("shared::cluster", "shared::cta") and modifiers.flag(
        "mbarrier::complete_tx::bytes"
    ):
        modifiers.need("global")
        shared, source, size, barrier = operands
        values = f"{fn.address(shared)}, {fn.address(source)}, {fn.value(size, 'u32')}"
        return f"bulk_load(t, {fn.site}, {values}, {fn.address(barrier)});"
    return _bulk_store(fn, modifiers, operands, "false")


def _bulk_store(fn, modifiers, operands, adds):
    modifiers.need("global")
    modifiers.choice("shared::cta")
    modifiers.need("bulk_group")
    target, shared, size = _without_policy(modifiers, operands)
    values = f"{fn.address(target)}, {fn.address(shared)}, {fn.value(size, 'u32')}"
    return f"bulk_store(t, {fn.site}, {values}, {adds});"


def _tensor(fn, modifiers, operands):
    rank = int(modifiers.need("1d", "2d", "3d", "4d", "5d")[0])
    modifiers.flag("tile")
    operands = _without_policy(modifiers, operands)
    if modifiers.flag("mbarrier::complete_tx::bytes"):
        modifiers.need("shared::cluster", "shared::cta")
        modifiers.need("global")
        shared, tensor, barrier = operands
        map_address, coordinates = _map_and_coordinates(fn, tensor)
        call = f"tensor_load(t, {fn.site}, {fn.address(shared)}, {map_address}, {rank}, c, "
        return f"{{ const int32_t c[] = {{{coordinates}}}; {call}{fn.address(barrier)}); }}"
    modifiers.need("global")
    modifiers.need("shared::cta")
    modifiers.need("bulk_group")
    tensor, shared = operands
    map_address, coordinates = _map_and_coordinates(fn, tensor)
    call = f"tensor_store(t, {fn.site}, {map_address}, {rank}, c, {fn.address(shared)});"
    return f"{{ const int32_t c[] = {{{coordinates}}}; {call} }}"


def _map_and_coordinates(fn, operand):
    match = re.fullmatch(r"\[\s*([^,]+?)\s*,\s*\{(.*)\}\s*\]", operand)
    if not match:
        raise TranslationError(f"tensor operand {operand} cannot be read")
    coordinates = ", ".join(fn.value(c.strip(), "s32") for c in match.group(2).split(","))
    return fn.address(f"[{match.group(1)}]"), coordinates


@instruction("mbarrier", counted="kSync")
def mbarrier(fn, modifiers, operands):
    action = modifiers.need("init", "inval", "arrive", "arrive_drop", "expect_tx", "complete_tx",
                            "test_wait", "try_wait")  # fmt: skip
    modifiers.choice("release", "acquire", "relaxed")
    modifiers.choice("cta", "cluster")
    modifiers.choice("shared", "shared::cta", "shared::cluster")
    expects = modifiers.flag("expect_tx") if action.startswith("arrive") else False
    parity = modifiers.flag("parity")
    modifiers.need("b64")
    if action.startswith("arrive"):
        return _arrive(fn, operands, expects, action == "arrive_drop")
    if action.endswith("_wait"):
        passed = f"mbarrier_test(t, {fn.site}, {fn.address(operands[1])}, "
        phase = fn.value(operands[2], "u32" if parity else "u64")
        return fn.assign(operands[0], f"{passed}uint32_t({phase}))", "pred")
    call = f"t, {fn.site}, {fn.address(operands[0])}"
    if action == "inval":
        return f"mbarrier_invalidate({call});"
    name = {"init": "init", "expect_tx": "expect", "complete_tx": "complete"}[action]
    return f"mbarrier_{name}({call}, {fn.value(operands[1], 'u32')});"


def _arrive(fn, operands, expects, drops):
    token, address = ("_", operands[0]) if operands[0].startswith("[") else operands[:2]
    extra = operands[operands.index(address) + 1 :]
    value = fn.value(extra[0], "u32") if extra else None
    count, size = ("1", value) if expects else (value or "1", "0")
    drop = "true" if drops else "false"
    call = f"mbarrier_arrive(t, {fn.site}, {fn.address(address)}, {count}, {size}, {drop})"
    return fn.assign(token, call, "b64")


@instruction("tensormap", counted="kCopy")
def tensor_map(fn, modifiers, operands):
    if modifiers.flag("cp_fenceproxy"):
        modifiers.ignore("global", "shared::cta", "tensormap::generic", "release", "acquire", "gpu",
                         "cta", "sys", "sync", "aligned")  # fmt: skip
        to, source = (
            fn.address(operands[0]),
            f"uint64_t(t.block->shared) + {fn.address(operands[1])}",
        )
        return f"tensor_map_copy(t, {fn.site}, (char*)({to}), (const char*)({source}));"
    modifiers.need("replace")
    modifiers.need("tile")
    field = modifiers.need("global_address", "rank", "box_dim", "global_dim", "global_stride",
                           "element_stride", "elemtype", "interleave_layout", "swizzle_mode",
                           "fill_mode")  # fmt: skip
    shared = modifiers.choice("global", "shared::cta").startswith("shared")
    modifiers.need("b1024")
    kind = modifiers.need("b32", "b64")
    address = fn.address(operands[0])
    place = f"uint64_t(t.block->shared) + {address}" if shared else address
    ordinal = operands[1] if len(operands) == 3 else "0"
    value = fn.value(operands[-1], kind)
    return f'tensor_map_replace(t, {fn.site}, (char*)({place}), "{field}", {ordinal}, {value});'


@instruction("createpolicy", counted="kMove")
def create_policy(fn, modifiers, operands):
    """A cache policy: opaque, and without effect on values."""
    modifiers.ignore("fractional", "range", "cvt", "L2")
    return fn.assign(operands[0], "0", modifiers.type())


@instruction("setmaxnreg", "griddepcontrol", counted="kControl")
def resources(fn, modifiers, operands):
    """Registers are plenty here, and one launch ends before the next begins."""
    modifiers.ignore("inc", "dec", "sync", "aligned", "u32", "wait", "launch_dependents")
    return ";"
