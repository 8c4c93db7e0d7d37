"""A whole PTX module to one C++ source: variables, functions, and the table of kernels."""

import dataclasses
import re

from ..errors import TranslationError
from ..syntax import Instruction, Location, Variable
from ..types import type_bytes
from .function import FunctionTranslator, cpp_name

# The emulator puts a gap between shared variables, where an access is an error.
_SHARED_GAP = 16


class ModuleTranslator:
    """What the functions of a module share: variables, their addresses, source lines."""

    def __init__(self, module, late_wgmma):
        self.ast, self.late_wgmma = module, late_wgmma
        self._globals = {v.name: v for v in module.variables if v.space in ("global", "const")}
        self._bodies = {f.name: f for f in module.functions if f.body is not None}
        self._extern_shared = {
            v.name: v.align for v in module.variables if v.space == "shared" and v.count is None
        }
        self._module_shared, self._module_shared_end = {}, 0
        for variable in self._common_shared():
            self._place_module_shared(variable)
        self._placed = {}  # by kernel: list of (offset, size)

    # ---- shared memory

    def _common_shared(self):
        """Shared variables of the module, and of functions that several kernels may call."""
        yield from (v for v in self.ast.variables if v.space == "shared" and v.count is not None)
        for function in self._bodies.values():
            if not function.is_kernel:
                variables = (s for s in function.body if isinstance(s, Variable))
                yield from (v for v in variables if v.space == "shared")

    def _place_module_shared(self, variable):
        size = type_bytes(variable.type) * variable.count
        offset = -(-self._module_shared_end // variable.align) * variable.align
        self._module_shared[variable.name] = (offset, size)
        self._module_shared_end = offset + size + _SHARED_GAP

    def place_shared(self, function, variable):
        """Offset of a .shared variable declared inside a function."""
        if not function.is_kernel:
            return self._module_shared[variable.name][0]
        size = type_bytes(variable.type) * (variable.count or 1)
        placed = self._placed.setdefault(function.name, list(self._module_shared.values()))
        end = placed[-1][0] + placed[-1][1] + _SHARED_GAP if placed else 0
        offset = -(-end // variable.align) * variable.align
        placed.append((offset, size))
        return offset

    def _shared_variables(self, function):
        return self._placed.get(function.name, list(self._module_shared.values()))

    def dynamic_alignment(self):
        return max([16, *self._extern_shared.values()])

    # ---- names

    def symbol(self, function, name):
        """C++ expression of the address of a variable or function."""
        if name in self._module_shared:
            return str(self._module_shared[name][0])
        if name in self._extern_shared:
            return "t.block->shared_bytes - t.block->dynamic_bytes"
        if name in self._globals:
            return f"uint64_t(&g{cpp_name(name)})"
        if name in self._bodies:
            return f"uint64_t(&f{cpp_name(name)})"
        raise TranslationError(f"operand {name} is not known")

    def has_body(self, name):
        return name in self._bodies

    def source_line(self, ptx_line):
        """'file:line' of the CUDA or Python source that a PTX line came from, or None."""
        return source_lines(self.ast).get(ptx_line)

    # ---- output

    def variable(self, variable):
        size = type_bytes(variable.type) * (variable.count or 1)
        return f"alignas({max(16, variable.align)}) static char g{cpp_name(variable.name)}[{size}];"

    def initializer(self, variable):
        """C++ statements that fill a variable when the library is loaded."""
        size = type_bytes(variable.type)
        lines = []
        for i, value in enumerate(variable.initial):
            expression = self._initial_value(value, variable.type)
            lines.append(f"poke(g{cpp_name(variable.name)} + {i * size}, {expression});")
        return lines

    def _initial_value(self, value, kind):
        bits = f"uint{8 * type_bytes(kind)}_t"
        exact = re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", value)
        if exact:
            return f"{bits}(0x{exact.group(1)}ull)"
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)", value):
            return f"{bits}({int(value, 0)}ll)" if int(value, 0) < 2**63 else f"{bits}({value}ull)"
        address = re.fullmatch(r"(?:generic\(\s*)?([\w$%]+)\s*\)?\s*(?:\+\s*(\d+))?", value)
        if not address:
            raise TranslationError(f"initial value '{value}' cannot be read")
        return f"{bits}({self.symbol(None, address.group(1))} + {address.group(2) or 0})"

    def signature(self, function):
        """C++ declaration of a function that is called, not launched: buffers by address."""
        parts = [
            "Thread& t",
            *(f"char* p{cpp_name(v.name)}" for v in (*function.results, *function.parameters)),
        ]
        return f"void f{cpp_name(function.name)}({', '.join(parts)})"

    def function(self, function):
        translator = FunctionTranslator(self, function)
        if function.is_kernel:
            for name, offset, size in parameter_layout(function):
                translator.parameters[name] = f"const_cast<char*>(parameters) + {offset}"
                translator.offsets[name] = offset
                translator.parameter_bytes = offset + size
            head = f"static void k{cpp_name(function.name)}(Thread& t, const char* parameters)"
        else:
            for variable in (*function.results, *function.parameters):
                translator.parameters[variable.name] = f"p{cpp_name(variable.name)}"
            head = f"static {self.signature(function)}"
        body = translator.translate()
        lines = [
            head + " {",
            "bool carry = false; (void)carry;",
            *translator.declarations,
            *body,
            "}",
        ]
        return "\n".join(lines)

    def kernel_entry(self, function):
        placed = self._shared_variables(function)
        end = max((offset + size for offset, size in placed), default=0)
        layout = parameter_layout(function)
        size = layout[-1][1] + layout[-1][2] if layout else 0
        table = ", ".join(f"{{{offset}, {length}}}" for offset, length in placed)
        name = cpp_name(function.name)
        proxy = int(uses_async_proxy(self.ast))
        cooperative = int(_synchronizes_grid(self.ast, function.name))
        return (
            f"static const SharedVariable s{name}[] = {{{table or '{0, 0}'}}};\n"
            f'{{"{function.name}", k{name}, {end}, {self.dynamic_alignment()}, {size}, '
            f"s{name}, {len(placed)}, {proxy}, {cooperative}}},"
        )


def parameter_layout(function):
    """[(name, offset, size)] of a kernel's parameters, each at its natural alignment."""
    layout, offset = [], 0
    for variable in function.parameters:
        size = type_bytes(variable.type) * (variable.count or 1)
        offset = -(-offset // variable.align) * variable.align
        layout.append((variable.name, offset, size))
        offset += size
    return layout


def source_lines(module):
    """{PTX line: 'file:line'} from the .loc directives before each instruction."""
    lines = {}
    for function in module.functions:
        here = None
        for statement in function.body or []:
            if isinstance(statement, Location) and statement.line:
                here = _place(module, statement)
            elif isinstance(statement, Instruction) and here:
                lines[statement.line] = here
    return lines


def _place(module, location):
    """A line inlined from another file, such as __syncwarp, is named by the line that called it."""
    inner = f"{module.files.get(location.file, '?')}:{location.line}"
    if location.inlined_at is None or location.inlined_at[0] == location.file:
        return inner
    file, line = location.inlined_at
    return f"{module.files.get(file, '?')}:{line}, from {inner.rpartition('/')[2]}"


def uses_async_proxy(module):
    """Whether wgmma or a bulk store may read what ordinary stores wrote."""
    return any(
        s.opcode == "wgmma" or (s.opcode == "cp" and "bulk" in s.modifiers)
        for f in module.functions
        for s in f.body or []
        if isinstance(s, Instruction)
    )


def _synchronizes_grid(module, kernel):
    """Whether a kernel asks for the barrier of the grid that a cooperative launch provides."""
    reachable = _reachable(module, kernel)
    return any(
        isinstance(s, Instruction) and "%envreg2" in s.text
        for f in module.functions
        if f.name in reachable
        for s in f.body or []
    )


def _reachable(module, kernel):
    """Names of the functions and variables that a kernel can reach, itself included."""
    bodies = {f.name: f for f in module.functions if f.body is not None}
    variables = {v.name: v for v in module.variables if v.space in ("global", "const")}
    names, open_names = set(), [kernel]
    while open_names:
        name = open_names.pop()
        if name in names or (name not in bodies and name not in variables):
            continue
        names.add(name)
        if name in bodies:
            statements = bodies[name].body
            texts = [s.text for s in statements if isinstance(s, Instruction)]
        else:
            texts = variables[name].initial
        open_names += {word for text in texts for word in re.findall(r"[\w$]+", text)}
    return names


def kernel_groups(module):
    """Lists of kernels that must live in one library because they share a variable."""
    variables = {v.name for v in module.variables if v.space in ("global", "const")}
    groups: list[tuple] = []  # (kernels, variables)
    for function in module.functions:
        if not function.is_kernel or function.body is None:
            continue
        kernels, used = [function.name], _reachable(module, function.name) & variables
        for group in [g for g in groups if g[1] & used]:
            groups.remove(group)
            kernels, used = group[0] + kernels, group[1] | used
        groups.append((kernels, used))
    return [kernels for kernels, _ in groups]


def restrict(module, kernels):
    """The module with only these kernels and what they reach."""
    names = set().union(*(_reachable(module, kernel) for kernel in kernels))
    functions = [f for f in module.functions if f.name in names]
    variables = [
        v for v in module.variables if v.space not in ("global", "const") or v.name in names
    ]
    return dataclasses.replace(module, functions=functions, variables=variables)


def translate(module, late_wgmma=False):
    """C++ source of a parsed module.

    It defines `emulator_kernels`, a table of emulator::KernelInfo, and `emulator_variables`.
    Raises TranslationError for anything that is not known, with the PTX line and the source line.
    """
    translator = ModuleTranslator(module, late_wgmma)
    functions = [f for f in module.functions if f.body is not None]
    variables = [v for v in module.variables if v.space in ("global", "const")]
    bodies = [translator.function(f) for f in functions]
    entries = [translator.kernel_entry(f).split("\n") for f in functions if f.is_kernel]
    parts = [
        f"#define EMULATOR_ASYNC_PROXY {int(uses_async_proxy(module))}",
        '#include "kernel.h"',
        '#include "tables.h"',
        "using namespace emulator;",
        *(translator.variable(v) for v in variables),
        *(f"static {translator.signature(f)};" for f in functions if not f.is_kernel),
        *bodies,
        *(entry[0] for entry in entries),
        *_table("KernelInfo", "kernels", [entry[1] for entry in entries]),
        *_table("VariableInfo", "variables", [_variable_entry(v) for v in variables]),
        "__attribute__((constructor)) static void initialize_variables() {",
        *(line for v in variables for line in translator.initializer(v)),
        "}",
    ]
    return "\n".join(parts) + "\n"


def _variable_entry(variable):
    name = cpp_name(variable.name)
    return f'{{"{variable.name}", g{name}, sizeof g{name}}},'


def _table(kind, name, entries):
    """An exported array that ends with an empty entry."""
    head = f'extern "C" EMULATOR_EXPORT const {kind} emulator_{name}[] = {{'
    return [head, *entries, "{}};"]
