"""One PTX function to one C++ function: names, operands, labels. Instructions come by registry."""

import re

from ..errors import TranslationError
from ..syntax import Instruction, Label, Location, Registers, Scope, Table, Variable
from ..types import CPP, FLOATS, HALVES, PACKED, bits_type, register_type, type_bytes
from .polling import polls
from .registry import Modifiers, find

_SPECIAL = {
    "%laneid": "t.lane",
    "%warpid": "t.index / 32",
    "%nwarpid": "(t.block->ntid[0] * t.block->ntid[1] * t.block->ntid[2] + 31) / 32",
    "WARP_SZ": "32",
    "%dynamic_smem_size": "t.block->dynamic_bytes",
    "%total_smem_size": "t.block->shared_bytes",
    "%lanemask_eq": "1u << t.lane",
    "%lanemask_lt": "(1u << t.lane) - 1",
    "%lanemask_le": "(2u << t.lane) - 1",
    "%lanemask_gt": "~((2u << t.lane) - 1)",
    "%lanemask_ge": "~((1u << t.lane) - 1)",
    # One block is a cluster of its own; time is the number of trips round loops.
    "%cluster_ctarank": "0",
    "%cluster_nctarank": "1",
    "%clock": "-t.fuel",
    "%clock64": "-t.fuel",
    "%globaltimer": "-t.fuel",
    "%smid": "0",
    "%is_explicit_cluster": "0",
    # Where the driver of a cooperative launch passes the address of the grid's barrier.
    "%envreg1": "t.block->grid_workspace >> 32",
    "%envreg2": "t.block->grid_workspace",
}
_VECTORS = {"%tid": "t.tid", "%ctaid": "t.block->ctaid", "%ntid": "t.block->ntid",
            "%nctaid": "t.block->nctaid", "%clusterid": "t.block->ctaid",
            "%nclusterid": "t.block->nctaid"}  # fmt: skip
_CLUSTER_VECTORS = {"%cluster_ctaid": "0", "%cluster_nctaid": "1"}


def cpp_name(name):
    """A PTX identifier as part of a C++ one."""
    return re.sub(r"\W", lambda m: "_" if m.group() in "%$." else f"_{ord(m.group())}_", name)


class FunctionTranslator:
    """Translates the body of one function.

    Registers and labels live in scopes, because inline assembly in braces declares its own.
    """

    def __init__(self, module, function):
        self.module, self.function = module, function
        self.lines = []
        self.declarations = []
        self._registers: list[dict] = [{}]
        self._labels: list[dict] = [{}]
        self._scopes = 0
        self._seen_labels = set()
        self.parameters = {}  # name: C++ expression of its first byte
        self.offsets, self.parameter_bytes = {}, 0  # of a kernel's parameters
        self.locals = {}  # .local arrays and .param buffers of calls
        self.shared = {}  # .shared variables of this function: offset
        self.site = 0
        self.polls = polls(function)  # whether its loops may wait for another thread

    # ---- body

    def translate(self):
        """C++ statements of the body; declarations are in self.declarations."""
        body = self.function.body
        self._collect_labels(body, 0)
        for position, statement in enumerate(body):
            try:
                self._statement(body, position, statement)
            except TranslationError as error:
                raise self._located(error, statement) from None
        return self.lines

    def _located(self, error, statement):
        line = getattr(statement, "line", self.site)
        source = self.module.source_line(line)
        return TranslationError(
            f"{self.function.name}: PTX line {line}: {error}\n  {getattr(statement, 'text', '')}"
            + (f"\n  from {source}" if source else "")
        )

    def _statement(self, body, position, statement):
        if isinstance(statement, Instruction):
            self._instruction(statement)
        elif isinstance(statement, Label):
            name = self.label(statement.name)
            self._seen_labels.add(name)
            self.lines.append(f"{name}:;")
        elif isinstance(statement, Scope):
            self._scope(body, position, statement)
        elif isinstance(statement, Registers):
            self._declare_registers(statement)
        elif isinstance(statement, Variable):
            self._declare_variable(statement)
        elif not isinstance(statement, Location | Table):
            raise TranslationError(f"statement {statement} is not known")

    def _scope(self, body, position, scope):
        self.lines.append("{" if scope.opens else "}")
        if not scope.opens:
            self._registers.pop()
            self._labels.pop()
            return
        self._scopes += 1
        self._registers.append({})
        self._labels.append({})
        self._collect_labels(body[position + 1 :], self._scopes)

    def _collect_labels(self, body, scope):
        """Labels of the innermost scope, up to its end: a branch may come before its label."""
        depth = 0
        for statement in body:
            if isinstance(statement, Scope):
                depth += 1 if statement.opens else -1
                if depth < 0:
                    return
            if isinstance(statement, Label) and depth == 0:
                suffix = f"_{scope}" if scope else ""
                self._labels[-1][statement.name] = f"L{cpp_name(statement.name)}{suffix}"

    def _instruction(self, instruction):
        self.site = instruction.line
        translate, counted = find(instruction.opcode)
        if counted == "kInteger" and instruction.modifiers[-1] in (*FLOATS, *PACKED):
            counted = "kFloat"
        modifiers = Modifiers(instruction)
        code = translate(self, modifiers, instruction.operands)
        modifiers.finish()
        if instruction.predicate:
            condition = self.value(instruction.predicate, "pred")
            code = f"if ({'!' if instruction.negated else ''}{condition}) {{ {code} }}"
        self.lines.append(f"COUNT({counted}) {code}")

    # ---- declarations

    def _declare_registers(self, registers):
        suffix = f"_{self._scopes}" if len(self._registers) > 1 else ""
        kind = register_type(registers.type)
        for name in registers.names:
            self._registers[-1][name] = (f"v{cpp_name(name)}{suffix}", kind)
        names = ", ".join(self._registers[-1][name][0] for name in registers.names)
        self.declarations.append(f"{kind} {names};")

    def _declare_variable(self, variable):
        if variable.space == "shared":
            self.shared[variable.name] = self.module.place_shared(self.function, variable)
            return
        if variable.space not in ("local", "param"):
            raise TranslationError(f".{variable.space} variable inside a function")
        name = f"m{cpp_name(variable.name)}_{len(self.declarations)}"
        self.locals[variable.name] = name
        size = max(1, type_bytes(variable.type) * (variable.count or 1))
        self.declarations.append(
            f"alignas({max(16, variable.align)}) char {name}[{size}]; "
            f"const LocalArray a{name}(t, {name}, {size});"
        )

    # ---- names

    def register(self, name):
        """(C++ name, C++ type) of a register, or None."""
        for scope in reversed(self._registers):
            if name in scope:
                return scope[name]
        return None

    def label(self, name):
        for scope in reversed(self._labels):
            if name in scope:
                return scope[name]
        raise TranslationError(f"label {name} is not defined")

    def is_backward(self, label):
        return label in self._seen_labels

    # ---- operands

    def value(self, operand, kind):
        """C++ expression of an operand read as PTX type `kind`."""
        if operand.startswith("!"):
            return f"!{self.value(operand[1:], kind)}"
        register = self.register(operand)
        if register:
            name, have = register
            return self._cast(name, have, kind)
        if operand == "_":
            return f"{CPP[kind]}()"
        immediate = self._immediate(operand, kind)
        if immediate is not None:
            return immediate
        return f"{bits_type(kind)}({self._symbol(operand)})"

    def _cast(self, name, have, kind):
        want = CPP[kind]
        if have == want:
            return name
        if kind == "pred":
            raise TranslationError(f"{name} is no predicate")
        if have == "bool":
            raise TranslationError(f"{name} is a predicate")
        if kind in FLOATS:
            if have != bits_type(kind):
                name = f"{bits_type(kind)}({name})"
            return f"{want}{{{name}}}" if kind in HALVES else f"__builtin_bit_cast({want}, {name})"
        return f"{want}({name})"

    def _immediate(self, text, kind):
        exact = re.fullmatch(r"0([fFdD])([0-9a-fA-F]{8,16})", text)
        if exact:
            have = "float" if exact.group(1) in "fF" else "double"
            bits = f"0x{exact.group(2)}{'u' if have == 'float' else 'ull'}"
            if kind in ("f32", "f64"):
                return f"{CPP[kind]}(__builtin_bit_cast({have}, {bits}))"
            return f"{CPP[kind]}({bits})"
        number = re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text)
        if number:
            value = int(number.group(2), 0 if number.group(2)[:2].lower() in ("0x", "0b") else 10)
            value = (-value if number.group(1) else value) % 2**64
            if kind == "pred":
                return "true" if value else "false"
            bits = f"{bits_type(kind)}({value}ull)"
            return self._cast(bits, bits_type(kind), kind)
        if re.fullmatch(r"-?\d*\.\d+([eE][-+]?\d+)?", text):
            return f"{CPP[kind]}({text})"
        return None

    def _symbol(self, name):
        if name in _SPECIAL:
            return _SPECIAL[name]
        vector, _, part = name.partition(".")
        if part in ("x", "y", "z"):
            if vector in _VECTORS:
                return f"{_VECTORS[vector]}[{'xyz'.index(part)}]"
            if vector in _CLUSTER_VECTORS:
                return _CLUSTER_VECTORS[vector]
        if name in self.shared:
            return str(self.shared[name])
        if name in self.locals:
            return f"uint64_t({self.locals[name]})"
        if name in self.offsets:
            return str(self.offsets[name])
        if name in self.parameters:
            return f"uint64_t({self.parameters[name]})"
        return self.module.symbol(self.function, name)

    def assign(self, target, expression, kind):
        """C++ statement that puts a value of PTX type `kind` into a register."""
        if target == "_":
            return f"(void)({expression});"
        register = self.register(target)
        if not register:
            raise TranslationError(f"register {target} is not declared")
        name, have = register
        if have == "bool" or CPP[kind] == have:
            return f"{name} = {expression};"
        if kind in HALVES:
            return f"{name} = ({expression}).bits;"
        if kind in FLOATS:
            return f"{name} = __builtin_bit_cast({bits_type(kind)}, {CPP[kind]}({expression}));"
        return f"{name} = {have}({CPP[kind]}({expression}));"

    def vector(self, operand):
        """Elements of `{a, b}`, or the operand alone."""
        if operand.startswith("{"):
            return [part.strip() for part in operand[1:-1].split(",")]
        return [operand]

    def values(self, operand, kind):
        """Comma-separated C++ expressions of a vector operand."""
        return ", ".join(self.value(part, kind) for part in self.vector(operand))

    def address(self, operand):
        """C++ expression (uint64_t) of the address in `[base + offset]`."""
        match = re.fullmatch(r"\[\s*(.+?)\s*(?:\+\s*(-?\w+)\s*)?\]", operand)
        if not match:
            raise TranslationError(f"address {operand} cannot be read")
        base, offset = match.group(1), int(match.group(2) or "0", 0)
        register = self.register(base)
        kind = "u64" if not register else "u64" if register[1] == "uint64_t" else "u32"
        start = self.value(base, kind)
        return (
            f"uint64_t({start}) + {offset}ull"
            if offset >= 0
            else f"uint64_t({start}) - {-offset}ull"
        )
