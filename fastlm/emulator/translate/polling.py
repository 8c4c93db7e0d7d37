"""Whether loops of a function may wait for another thread: then each trip lets the others run."""

import re

from ..syntax import Instruction

_WAITS = {"ld": {"volatile", "relaxed", "acquire", "mmio", "cv"}, "atom": {"cas", "exch"}}


def polls(function):
    """Whether it reads what another thread may be about to write, or uses an atomic's result."""
    instructions = [s for s in function.body if isinstance(s, Instruction)]
    if any(
        i.opcode == "nanosleep" or _WAITS.get(i.opcode, set()) & {*i.modifiers}
        for i in instructions
    ):
        return True
    text = "\n".join(i.text for i in instructions)
    results = re.findall(r"\batom\.\S+ (%\w+),", text)
    return any(len(re.findall(rf"{re.escape(result)}\b", text)) > 1 for result in results)
