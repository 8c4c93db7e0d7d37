"""Loads and stores in every state space, and conversions of addresses."""

from ..errors import TranslationError
from ..types import CPP, type_bytes
from .registry import instruction

_SPACES = ("global", "shared", "shared::cta", "shared::cluster", "local", "const", "param",
           "param::entry", "param::func")  # fmt: skip
# Hints to the caches: they change speed, never a value.
_CACHE = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "L1::", "L2::", "unified", "level::")


def space_of(modifiers):
    space = modifiers.choice(*_SPACES, default="generic").split("::")[0]
    return "global" if space == "const" else space


def scope_of(modifiers):
    """kBlockScope for .cta; .cluster is one block here, .gpu and .sys the whole machine."""
    return " | kBlockScope" if modifiers.choice("cta", "cluster", "gpu", "sys") == "cta" else ""


def access_of(modifiers, base):
    """C++ Access flags of a load or store."""
    order = modifiers.choice("weak", "volatile", "relaxed", "acquire", "release", "mmio")
    scope = scope_of(modifiers)
    if order in (None, "weak"):
        return base
    extra = {"acquire": " | kAcquire", "release": " | kRelease", "volatile": " | kVolatile"}
    return f"{base} | kStrong{extra.get(order, '')}{scope}"


def location(fn, operand, space, size, access):
    """C++ expression (char*) of a checked address; needs `hint` in scope."""
    address = fn.address(operand)
    call = f"<{size}, {access}>(t, {address}, {fn.site}"
    if space == "shared":
        return f"shared_at{call})"
    if space == "local":
        return f"local_at{call})"
    return f"{space}_at{call}, hint)"


def _parameter_at(fn, address):
    """C++ expression (uint64_t) of the host's address of one in parameter space. A kernel's
    parameters have offsets there, because compilers keep their addresses in 32 bits; the buffers
    of calls have host addresses, which are larger than any offset.
    """
    if not fn.function.is_kernel:
        return f"uint64_t({address})"
    return f"parameter_at(parameters, {fn.parameter_bytes}, {address})"


def _parameter(fn, operand):
    """C++ expression of `[name+offset]` in parameter space, or of `[register+offset]`: nvcc takes
    the address of a struct that is used in a loop.
    """
    name, _, offset = operand.strip("[] ").partition("+")
    name = name.strip()
    if fn.register(name):
        return f"reinterpret_cast<char*>({_parameter_at(fn, fn.address(operand))})"
    base = fn.parameters.get(name) or fn.locals.get(name)
    if base is None:
        raise TranslationError(f"parameter {name} is not declared")
    return f"{base} + {int(offset or '0', 0)}"


def _vector_size(modifiers):
    return int((modifiers.choice("v2", "v4", "v8") or "v1")[1:])


def _modifiers(modifiers, base):
    access = access_of(modifiers, base)
    space = space_of(modifiers)
    count = _vector_size(modifiers)
    modifiers.ignore(*_CACHE)
    return access, space, count


@instruction("ld", "ldu", counted="kMemory")
def load(fn, modifiers, operands):
    kind = modifiers.type()
    access, space, count = _modifiers(modifiers, "kRead")
    size = type_bytes(kind)
    # Stored bits are moved as they are: a conversion to float and back could quieten a NaN.
    raw = f"b{8 * size}" if kind[0] in "fb" else kind
    targets = fn.vector(operands[0])
    if len(targets) != count:
        raise TranslationError(f"{len(targets)} registers for a load of {count} elements")
    if space == "param":
        place = _parameter(fn, operands[1])
    else:
        place = location(fn, operands[1], space, size * count, access)
    code = f"{{ static uint8_t hint; (void)hint; const char* p = {place}; "
    for i, target in enumerate(targets):
        code += fn.assign(target, f"peek<{CPP[raw]}>(p + {i * size})", raw) + " "
    return code + "}"


@instruction("st", counted="kMemory")
def store(fn, modifiers, operands):
    kind = modifiers.type()
    access, space, count = _modifiers(modifiers, "kWrite")
    size = type_bytes(kind)
    sources = fn.vector(operands[1])
    if len(sources) != count:
        raise TranslationError(f"{len(sources)} registers for a store of {count} elements")
    if space == "param":
        place = _parameter(fn, operands[0])
    else:
        place = location(fn, operands[0], space, size * count, access)
    code = f"{{ static uint8_t hint; (void)hint; char* p = {place}; "
    for i, source in enumerate(sources):
        value = fn.value(source, kind if kind in ("f32", "f64") else f"b{8 * size}")
        code += f"poke(p + {i * size}, {value}); "
    return code + "}"


@instruction("cvta", counted="kConversion")
def convert_address(fn, modifiers, operands):
    """Generic addresses are host addresses; shared memory and parameters have offsets."""
    to_space = modifiers.flag("to")
    space = space_of(modifiers)
    kind = modifiers.type()
    register = fn.register(operands[1])
    value = (
        fn.address(f"[{operands[1]}]")
        if register or "+" in operands[1]
        else fn.value(operands[1], "u64")
    )
    if space == "shared":
        name = "generic_to_shared" if to_space else "shared_to_generic"
        value = f"{name}(t, {value})"
    elif space == "param" and not to_space:
        value = _parameter_at(fn, value)
    return fn.assign(operands[0], value, kind)


@instruction("isspacep", counted="kConversion")
def is_space(fn, modifiers, operands):
    space = space_of(modifiers)
    value = fn.value(operands[1], "u64")
    tests = {
        "shared": f"is_shared(t, {value})",
        "local": f"is_local(t, {value})",
        "global": f"!is_shared(t, {value}) && !is_local(t, {value})",
    }
    if space not in tests:
        raise TranslationError(f"isspacep.{space} is not known")
    return fn.assign(operands[0], tests[space], "pred")


@instruction("prefetch", "prefetchu", "discard", "applypriority", counted="kMemory")
def cache_control(fn, modifiers, operands):
    """Moves data between caches, which the emulator does not have; discard only forgets it."""
    space_of(modifiers)
    modifiers.ignore(*_CACHE, "L1", "L2", "tensormap", "evict")
    return ";"
