"""PTX text to a module of variables and functions; bodies stay in the order they were written.

Grammar: PTX ISA 9.x, "Syntax" and "Directives", as far as nvcc 13 and Triton 3.6 to 3.9 use it.
"""

import math
import re
from bisect import bisect_right

from .errors import TranslationError
from .syntax import (
    Function,
    Instruction,
    Label,
    Location,
    Module,
    Registers,
    Scope,
    Table,
    Variable,
)
from .types import type_bytes

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_LABEL = re.compile(r"([\w$%]+)\s*:(?!:)")
_TABLE = re.compile(r"\s*\.(callprototype|branchtargets|calltargets)\b")
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)(?:[^\n]*?inlined_at\s+(\d+)\s+(\d+))?[^\n]*")
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"[^\n]*')
_HEADER = re.compile(r"(?m)^[ \t]*\.(?:version|target|address_size)\b[^\n]*$")
_SECTION = re.compile(r"\.section\b[^{]*\{[^}]*\}")
_LINKAGE = r"(?:\.(?:visible|extern|weak|common)\s+)*"
_FUNCTION = re.compile(
    _LINKAGE + r"\.(entry|func)\s*(?:\(([^)]*)\)\s*)?([\w$]+)\s*(?:\(([^)]*)\))?([^{;]*)"
)
_VARIABLE = re.compile(
    _LINKAGE + r"\.(global|const|shared|local|param)\s+(?:\.attribute\([^)]*\)\s*)?"
    r"(?:\.align\s+(\d+)\s+)?\.(\w+)((?:\s+\.\w+(?:\s+\d+)?)*)\s+([\w$%]+)"
    r"((?:\[\d*\])*)\s*(?:=\s*(.*))?$",
    re.S,
)
_INSTRUCTION = re.compile(r"(?:@(!?)([\w$%]+)\s+)?([a-z]\w*)((?:\.[\w:]+)*)\s*(.*)$", re.S)


def split_operands(text):
    """Operands separated by commas outside of brackets."""
    operands, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            operands.append(current.strip())
            current = ""
        else:
            current += character
    return [*operands, current.strip()] if current.strip() else operands


class _Text:
    """The PTX without comments (newlines kept), and where its lines start."""

    def __init__(self, source):
        keep_lines = lambda match: "\n" * match.group().count("\n")  # noqa: E731
        self.text = _SECTION.sub(keep_lines, _COMMENT.sub(keep_lines, source))
        self._starts = None

    def line(self, position):
        if self._starts is None:
            self._starts = [0, *(m.end() for m in re.finditer("\n", self.text))]
        return bisect_right(self._starts, position)


def parse(source):
    """Parses PTX text.

    Raises TranslationError for text that is not PTX or ends in the middle of a function.
    """
    version = re.search(r"^\s*\.version\s+\d+\.\d+", source, re.M)
    target = re.search(r"^\s*\.target\s+(\w+)", source, re.M)
    if not version or not target:
        raise TranslationError("this is no PTX: it has no .version or no .target directive")
    text = _Text(source)
    module = Module(target.group(1), {}, [], [], source.splitlines())
    for match in _FILE.finditer(text.text):
        module.files[int(match.group(1))] = match.group(2)
    text.text = _HEADER.sub("", _FILE.sub("", text.text))
    _parse_top_level(text, module)
    return module


def _parse_top_level(text, module):
    position = 0
    while True:
        position = _skip_space(text.text, position)
        if position >= len(text.text):
            return
        match = _LOC.match(text.text, position)
        if match:
            position = match.end()
            continue
        match = _FUNCTION.match(text.text, position)
        if match:
            position = _parse_function(text, match, module)
            continue
        end = text.text.find(";", position)
        if end < 0:
            raise _truncated(text, position)
        statement = text.text[position:end].strip()
        module.variables.append(_parse_variable(statement, text.line(position)))
        position = end + 1


def _skip_space(text, position):
    while position < len(text) and text[position] in " \t\r\n;":
        position += 1
    return position


def _truncated(text, position):
    return TranslationError(
        f"PTX line {text.line(position)}: the text ends in the middle of a statement; "
        "was the file cut off?"
    )


def _parse_function(text, match, module):
    kind, results, name, parameters, directives = match.groups()
    split = lambda part: [_parse_variable(p, text.line(match.start()))  # noqa: E731
                          for p in split_operands(part or "")]  # fmt: skip
    sizes = {
        key: tuple(int(n) for n in re.findall(r"\d+", numbers))
        for key, numbers in re.findall(r"\.(reqntid|maxntid)([\s\d,]+)", directives)
    }
    function = Function(name, kind == "entry", split(parameters), split(results), sizes, None)
    module.functions.append(function)
    position = match.end()
    if position >= len(text.text):
        raise _truncated(text, match.start())
    if text.text[position] == ";":
        return position + 1
    function.body, position = _parse_body(text, position + 1)
    return position


def _parse_body(text, position):
    """Statements up to the brace that closes the function."""
    body: list = []
    depth = 1
    while True:
        position = _skip_space(text.text, position)
        if position >= len(text.text):
            raise _truncated(text, len(text.text))
        if text.text[position] in "{}":
            opens = text.text[position] == "{"
            depth += 1 if opens else -1
            position += 1
            if depth == 0:
                return body, position
            body.append(Scope(opens))
            continue
        statement, position = _parse_statement(text, position)
        if statement is not None:
            body.append(statement)


def _parse_statement(text, position):
    match = _LOC.match(text.text, position)
    if match:
        file, line, *outer = (int(n) for n in match.groups() if n)
        return Location(file, line, (outer[0], outer[1]) if outer else None), match.end()
    match = _LABEL.match(text.text, position)
    table = match and _TABLE.match(text.text, match.end())
    if match and not table:
        return Label(match.group(1)), match.end()
    end = text.text.find(";", position)
    if end < 0:
        raise _truncated(text, position)
    if match and table:
        entries = split_operands(text.text[table.end() : end])
        return Table(match.group(1), table.group(1), entries), end + 1
    line = text.line(position)
    statement = " ".join(text.text[position:end].split())
    if statement.startswith("."):
        return _parse_directive(statement, line), end + 1
    return _parse_instruction(statement, line), end + 1


def _parse_directive(statement, line):
    if statement.startswith(".reg"):
        return _parse_registers(statement, line)
    if statement.startswith(".pragma"):
        return None  # hints to ptxas, such as "nounroll"
    return _parse_variable(statement, line)


def _parse_registers(statement, line):
    match = re.match(r"\.reg\s+(\.v[24]\s+)?\.(\w+)\s+(.*)$", statement)
    if not match or match.group(1):
        raise TranslationError(f"PTX line {line}: cannot read '{statement}'")
    names = []
    for name in split_operands(match.group(3)):
        counted = re.match(r"(.*)<(\d+)>$", name)
        if counted:
            names += [f"{counted.group(1)}{i}" for i in range(int(counted.group(2)))]
        else:
            names.append(name)
    return Registers(match.group(2), names)


def _parse_variable(statement, line):
    match = _VARIABLE.match(statement.strip())
    if not match:
        raise TranslationError(f"PTX line {line}: cannot read '{statement[:120]}'")
    space, align, kind, _, name, dims, initial = match.groups()
    sizes = re.findall(r"\[(\d*)\]", dims)
    count = None if "" in sizes else math.prod(int(size) for size in sizes)
    values = split_operands(re.sub(r"[{}]", " ", initial)) if initial else []
    return Variable(
        space, name, kind, count, int(align or type_bytes(kind)), values, is_array=bool(sizes)
    )


def _parse_instruction(statement, line):
    match = _INSTRUCTION.match(statement)
    if not match:
        raise TranslationError(f"PTX line {line}: cannot read '{statement[:120]}'")
    negated, predicate, opcode, modifiers, operands = match.groups()
    return Instruction(
        opcode,
        tuple(modifiers.split(".")[1:]),
        split_operands(operands),
        predicate,
        bool(negated),
        line,
        statement,
    )
