"""The syntax tree of a PTX module."""

from dataclasses import dataclass, field


@dataclass
class Variable:
    """A .global, .const, .shared, .local or .param variable; `size` in bytes, None if unsized."""

    space: str
    name: str
    type: str
    count: int | None
    align: int
    initial: list[str] = field(default_factory=list)
    is_array: bool = False


@dataclass
class Registers:
    """`.reg .b32 %r<5>`: names are written out, without the count."""

    type: str
    names: list[str]


@dataclass
class Label:
    name: str


@dataclass
class Scope:
    """`{` (opens) or `}` of a nested block, as inline assembly writes them."""

    opens: bool


@dataclass
class Table:
    """`name : .branchtargets a, b;` for a brx.idx, or `.callprototype` for an indirect call."""

    name: str
    kind: str
    entries: list[str]


@dataclass
class Location:
    """`.loc`: the source line of what follows, and the line it was inlined at, if it was."""

    file: int
    line: int
    inlined_at: tuple[int, int] | None = None


@dataclass
class Instruction:
    """One instruction: `@!%p add.s32 a, b, c` has opcode "add", modifiers ("s32",)."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: list[str]
    predicate: str | None
    negated: bool
    line: int
    text: str


@dataclass
class Function:
    """An .entry (kernel) or .func; `body` is None for a declaration."""

    name: str
    is_kernel: bool
    parameters: list[Variable]
    results: list[Variable]
    directives: dict[str, tuple[int, ...]]
    body: list | None


@dataclass
class Module:
    """`files` by number; `target` as written, for instance "sm_90a"."""

    target: str
    files: dict[int, str]
    variables: list[Variable]
    functions: list[Function]
    lines: list[str]
