"""Which function translates which instruction, and the check that nothing in one was ignored."""

from ..errors import TranslationError
from ..types import CPP, PACKED

_TRANSLATORS: dict = {}


def instruction(*opcodes, counted):
    """Registers a translator for these opcodes.

    The function gets (Function translator, Modifiers, operands) and returns C++ statements. It must
    take every modifier it knows; one that is left over is an error. `counted` names the class the
    instruction is counted in (runtime/counters.h).
    """

    def register(translate):
        for opcode in opcodes:
            _TRANSLATORS[opcode] = (translate, counted)
        return translate

    return register


def find(opcode):
    """(translator, class) of an opcode. Raises TranslationError that says what to add."""
    if opcode not in _TRANSLATORS:
        raise TranslationError(
            f"instruction '{opcode}' is not known; add a function marked "
            f'@instruction("{opcode}", counted=...) to fastlm/emulator/translate/'
        )
    return _TRANSLATORS[opcode]


def instruction_class(opcode):
    """The class that an instruction is counted in."""
    return find(opcode)[1]


class Modifiers:
    """The dotted parts of an instruction, taken one by one by its translator.

    "ld.global.nc.L1::no_allocate.v4.f32" has the modifiers global, nc, L1::no_allocate, v4, f32.
    """

    def __init__(self, instruction):
        self.opcode, self.line, self.text = instruction.opcode, instruction.line, instruction.text
        self._left = list(instruction.modifiers)

    def flag(self, *names):
        """Whether one of these was written; takes it."""
        return self.choice(*names) is not None

    def choice(self, *names, default=None):
        """The first of `names` that was written, or the default; takes it."""
        for name in names:
            if name in self._left:
                self._left.remove(name)
                return name
        return default

    def need(self, *names):
        """Like choice, but one of them must be there."""
        found = self.choice(*names)
        if found is None:
            raise TranslationError(f"one of .{', .'.join(names)} is expected")
        return found

    def type(self):
        """Takes the last modifier, which must be a type."""
        if not self._left or self._left[-1] not in (*CPP, *PACKED):
            got = f".{self._left[-1]}" if self._left else "nothing"
            raise TranslationError(f"a type is expected at the end of '{self.opcode}', got {got}")
        return self._left.pop()

    def ignore(self, *prefixes):
        """Takes modifiers that cannot change a result, such as cache hints."""
        self._left = [m for m in self._left if not m.startswith(prefixes)]

    def finish(self):
        """Raises TranslationError if a modifier was not taken."""
        if self._left:
            raise TranslationError(
                f"modifier .{self._left[0]} of '{self.opcode}' is not known; "
                "add it to the instruction's function in fastlm/emulator/translate/"
            )
