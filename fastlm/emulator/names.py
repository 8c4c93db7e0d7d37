"""Names as the source has them, of what the compiler has mangled: tk<float, 128>, ns::table."""

import ctypes
import functools
import re

# One spelling for each of the names that a type or a template argument may have.
_SYNONYMS = {"unsigned": "unsigned int", "uint32_t": "unsigned int", "int32_t": "int",
             "uint64_t": "unsigned long", "int64_t": "long", "size_t": "unsigned long",
             "uint16_t": "unsigned short", "int16_t": "short", "uint8_t": "unsigned char",
             "int8_t": "signed char", "half": "__half", "nv_bfloat16": "__nv_bfloat16",
             "half2": "__half2", "nv_bfloat162": "__nv_bfloat162"}  # fmt: skip
_OPENING, _CLOSING = "(<[{", ")>]}"


@functools.cache
def _demangler():
    function = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    function.restype = ctypes.c_void_p
    free = ctypes.CDLL(None).free
    free.argtypes = [ctypes.c_void_p]
    return function, free


@functools.cache
def demangle(name):
    """The declaration that a mangled name stands for; any other name as it is."""
    if not name.startswith("_Z"):
        return name
    function, free = _demangler()
    status = ctypes.c_int()
    text = function(name.encode(), None, None, ctypes.byref(status))
    if not text:
        return name
    result = ctypes.string_at(text).decode()
    free(text)
    return result


def split_top(text, separator):
    """The parts of a text between separators that stand outside of all brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in _OPENING) - (character in _CLOSING)
        if depth == 0 and character == separator:
            parts.append(text[start:i])
            start = i + 1
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def _split_declaration(name):
    """(name with its template arguments, text of the parameters or None)."""
    text = demangle(name)
    if not text.endswith(")"):
        return text, None
    depth = 0
    for i in range(len(text) - 1, -1, -1):
        depth += (text[i] in _CLOSING) - (text[i] in _OPENING)
        if depth == 0:
            # A template's declaration begins with its result.
            return split_top(text[:i], " ")[-1], text[i + 1 : -1]
    return text, None


def source_name(name):
    """What the source calls a kernel or variable: without its result and its parameters."""
    return _split_declaration(name)[0]


def parameter_types(name):
    """The types of a mangled function's parameters; None where the name does not say."""
    text = _split_declaration(name)[1]
    return None if text is None else [t for t in split_top(text, ",") if t != "void"]


def base_name(name):
    """A name without its scopes and its template arguments."""
    return _scopes(_plain(source_name(name)))[-1]


def _plain(name):
    return re.sub(r"<.*>$", "", name)


def _scopes(name):
    return [part for part in split_top(name.replace("::", "\0"), "\0") if part]


def spelling(name):
    """The name in one spelling: spaces, casts and suffixes of numbers, and synonyms."""
    name = re.sub(r"\((?!anonymous)[^()]*\)(?=-?\d)", "", name)
    name = re.sub(r"\b(\d+)[uUlL]+\b", r"\1", name)
    name = re.sub(r"\bstd::(?=\w+_t\b)", "", name)
    name = re.sub(r"(?<!unsigned )(?<!signed )\b(?!unsigned \w)\w+", _synonym, name)
    return re.sub(r"\s*([<>,*&])\s*", r"\1", name.strip())


def _synonym(match):
    return _SYNONYMS.get(match.group(), match.group())


def find(names, name):
    """The names that `name` stands for: mangled, or as written in the source. Scopes, and template
    arguments from the last one on, may be left out.
    """
    if name in names:
        return [name]
    wanted = spelling(name)
    spellings = {n: spelling(source_name(n)) for n in names}

    def named(matches, scopes):
        return [n for n, s in spellings.items() if any(map(matches, scopes(s)))]

    return (
        named(wanted.__eq__, lambda spelling: [spelling])
        or named(wanted.__eq__, _tails)
        or named(lambda s: _plain(s) == wanted, _tails)
        or named(lambda s: wanted.endswith(">") and s.startswith(wanted[:-1] + ","), _tails)
    )


def _tails(name):
    """The name with all of its scopes, then with fewer and fewer."""
    scopes = _scopes(name)
    return ["::".join(scopes[i:]) for i in range(len(scopes))]
