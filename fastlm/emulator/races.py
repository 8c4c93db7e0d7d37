"""The data races of a launch: those that were raised, and those that are only listed."""

import ctypes
from typing import NamedTuple

from .dataflow import uses

# In the order of Quiet in runtime/machine.h.
_QUIET = (None, "all stored the same value", "the value that was read is not used", "suppressed")


class Race(NamedTuple):
    """Two accesses that nothing orders; `quiet` says why that was not raised, or is None.

    times: how many times the two instructions raced
    """

    reason: str
    where: str
    block: tuple
    thread: tuple
    times: int
    quiet: str | None

    def __str__(self):
        quiet = f"\n  not raised: {self.quiet}" if self.quiet else ""
        times = f" ({self.times} times)" if self.times > 1 else ""
        return f"{self.reason}{times}\n  at {self.where}{quiet}"


def listed(result, describe):
    """The Races of a launch's result, the loud ones first; `describe` names two PTX lines."""
    races = [
        Race(r.text.decode(errors="replace"), describe(r.site, r.other_site), (*r.ctaid,),
             (*r.tid,), r.count, _QUIET[r.quiet])
        for r in result.race_list
    ]  # fmt: skip
    return sorted(races, key=lambda race: race.quiet is not None)


class Tables(NamedTuple):
    """What the race detector knows of each PTX line: see Request in runtime/machine.h."""

    lines: int
    load_uses: ctypes.Array
    store_bits: ctypes.Array
    suppressed: ctypes.Array


def tables(module, kernel, places, suppress):
    """The Tables of a kernel of a parsed module.

    places: {PTX line: 'file:line'}
    suppress: the places whose races are listed and not raised
    """
    count = len(module.lines) + 1
    elsewhere = (1 << 64) - 1
    load_uses = (ctypes.c_uint64 * count)(*[elsewhere] * count)
    store_bits, suppressed = (ctypes.c_uint64 * count)(), (ctypes.c_uint8 * count)()
    masks, bits = uses(module, kernel)
    for line, mask in masks.items():
        load_uses[line] = mask
    for line, bit in bits.items():
        store_bits[line] = bit
    for line, place in places.items():
        suppressed[line] = any(_is_at(place, wanted) for wanted in suppress)
    return Tables(count, load_uses, store_bits, suppressed)


def check_places(places, suppress):
    """Raises ValueError for a suppressed place that is none of {PTX line: place}."""
    for wanted in suppress:
        if not any(_is_at(place, wanted) for place in places.values()):
            raise ValueError(f"suppress: expected a line that has instructions, got {wanted}")


def _is_at(place, wanted):
    """Whether 'folder/file:line', or 'file:line, from header:line', is the place that is meant."""
    place = place.partition(",")[0]
    return place == wanted or place.endswith("/" + wanted)
