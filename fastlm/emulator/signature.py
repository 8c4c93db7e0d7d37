"""What a kernel's parameters are called and of what type they are, as far as it can be known."""

import re
from typing import NamedTuple

from .names import base_name, parameter_types, spelling, split_top

_GLOBAL = re.compile(r"__attribute__\(\((?:global|__global__)\)\)|\b__global__\b")
_WITH_ARGUMENTS = re.compile(r"(?:__attribute__|__launch_bounds__|alignas)\s*$")
_ATTRIBUTE = re.compile(r"__attribute__\s*\(\(.*?\)\)|\[\[.*?\]\]")
_QUALIFIERS = re.compile(
    r"\b(?:const|volatile|__restrict__|__restrict|restrict|struct|class|typename|register)\b"
)


class Parameter(NamedTuple):
    """`type` without qualifiers, "float*" for instance, or Triton's "*fp32"; None: not known."""

    name: str
    type: str | None = None


def parameters(function, declared=None):
    """The Parameters of a kernel of the syntax tree.

    declared: {kernel: [Parameters, ...]}, what `declarations` found in the source
    """
    known = (declared or {}).get(base_name(function.name), [])
    known = [tuple(Parameter(*p) for p in k) for k in known if len(k) == len(function.parameters)]
    named = tuple(Parameter(v.name) for v in function.parameters)
    if len(known) == 1:  # of overloads with as many parameters it cannot be told which
        named = known[0]
    types = parameter_types(function.name)
    if types is None or len(types) != len(named):
        return named
    return tuple(Parameter(n.name, unqualified(t)) for n, t in zip(named, types, strict=True))


_TRITON = {"fp16": "__half", "bf16": "__nv_bfloat16", "fp32": "float", "fp64": "double",
           "i1": "bool", "u1": "bool", "i8": "signed char", "u8": "unsigned char", "i16": "short",
           "u16": "unsigned short", "i32": "int", "u32": "unsigned int", "i64": "long",
           "u64": "unsigned long"}  # fmt: skip


def of_triton(kernel, signature):
    """{name: [parameters]} of a Triton kernel. signature: {argument: type}, "*bf16" for instance,
    of those that are known when it runs.

    Besides them Triton passes two pointers to scratch memory.
    """
    known = []
    for name in kernel.arg_names:
        kind = signature.get(name)
        if kind and kind != "constexpr":
            stars = "*" * kind.count("*")
            element = _TRITON.get(kind.strip("*"))
            known.append(Parameter(name, element and element + stars))
    scratch = [Parameter("global scratch memory"), Parameter("profile scratch memory")]
    return {kernel.fn.__name__: [tuple(known + scratch), tuple(known)]}


def unqualified(text):
    """A type without const and the like, in one spelling."""
    return spelling(" ".join(_QUALIFIERS.sub(" ", text).split()))


def declarations(source):
    """{name: [Parameters of each overload or template]} of kernels defined in preprocessed C++."""
    found: dict = {}
    for match in _GLOBAL.finditer(source):
        head, text = _declarator(source, match.end())
        name = re.search(r"(\w+)\s*$", head)
        if name and text is not None:
            found.setdefault(name.group(1), []).append(_parse(text))
    return found


def _declarator(source, position):
    """(text before the parameters, text of the parameters or None if this is no definition)."""
    start = position
    while True:
        opening = source.find("(", position)
        if opening < 0 or re.search(r"[;{}]", source[position:opening]):
            return source[start:position], None
        closing = _closing(source, opening)
        head = source[start:opening]
        if not _WITH_ARGUMENTS.search(head):
            is_definition = re.compile(r"[^;{]*\{").match(source, closing + 1)
            return head, source[opening + 1 : closing] if is_definition else None
        position = closing + 1


def _closing(text, opening):
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text)


def _parse(text):
    text = re.sub(r"(?m)^\s*#.*$", " ", text)  # where the preprocessor says which line follows
    parameters = []
    for declared in split_top(text, ","):
        declared = unqualified(_ATTRIBUTE.sub(" ", split_top(declared, "=")[0]))
        match = re.fullmatch(r"(.*?[\s*&>])(\w+)\s*((?:\[\d*\])*)", declared)
        if match:
            pointer = "*" if match.group(3) else ""
            parameters.append(Parameter(match.group(2), match.group(1).strip() + pointer))
        elif declared != "void":
            # A pointer to a function, or a parameter without a name: called by its number.
            parameters.append(Parameter(f"parameter {len(parameters)}"))
    return tuple(parameters)
