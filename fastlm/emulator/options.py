"""How kernels run: the options of a module, and those that hold for a block of code."""

import contextlib
import dataclasses
import re

from .native import SCHEDULES

_PLACE = re.compile(r".+:\d+")


@dataclasses.dataclass(frozen=True)
class Options:
    """How a module's kernels run.

    schedule: "order", "reverse" or "random" (with `seed`): which ready thread runs next, and in
        which order blocks start
    races: True raises at the first data race; "all" goes on to the end of the launch and raises
        with a list of all of them
    suppress: "file:line" places in the source; races of an access there are listed, not raised
    uninitialized: detect reads of shared memory that was never written, and of global memory that
        is marked as `unwritten`
    late_copies: cp.async and TMA data lands only when the program has waited for it
    late_wgmma: accumulators hold NaN until wgmma.wait_group
    proxy_fences: wgmma and TMA may not read what ordinary stores or cp.async wrote before a
        fence.proxy.async (Triton 3.6 leaves it out after cp.async; 3.9 does not)
    counters: fill `kernel.counters` at each launch
    workers: OS threads that run blocks; detectors and counters need 1
    resident: blocks that may be under way at the same time in each worker; None: as many as an H100
        holds of them
    spin_limit: turns that polling threads get without any event before it is called a livelock
    memory: more tensors that the kernel may touch, such as those that structs point to
    """

    schedule: str = "order"
    seed: int = 0
    races: bool | str = False
    suppress: tuple = ()
    uninitialized: bool = False
    late_copies: bool = True
    late_wgmma: bool = False
    proxy_fences: bool = True
    counters: bool = False
    workers: int = 1
    resident: int | None = None
    spin_limit: int = 20_000_000
    memory: tuple = ()

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule '{self.schedule}': one of {', '.join(SCHEDULES)} is accepted"
            )
        if self.races not in (False, True, "all"):
            raise ValueError(f"races: expected False, True or 'all', got {self.races!r}")
        for name, number in (("workers", self.workers), ("resident", self.resident)):
            if number is not None and number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        if self.workers > 1 and self.traced:
            raise ValueError(
                "workers: expected 1 with races, uninitialized or counters, which need one order "
                f"of all accesses, got {self.workers}"
            )
        if isinstance(self.suppress, str) or not all(map(_PLACE.fullmatch, self.suppress)):
            raise ValueError(f"suppress: expected a list of 'file:line', got {self.suppress!r}")

    @property
    def traced(self):
        """Whether kernels must be compiled with calls to the detectors and counters."""
        return bool(self.races or self.uninitialized or self.counters)


_defaults: dict = {}  # of `defaults`; for all threads, as backward runs in one of its own


@contextlib.contextmanager
def defaults(**options):
    """Every launch inside runs with these fields of Options, whatever its module was given.

    For kernels that are launched by other code: those of an `extension` and of a `triton_launcher`.
    Raises TypeError or ValueError for options that there are not.
    """
    global _defaults
    Options(**options)
    before, _defaults = _defaults, {**_defaults, **options}
    try:
        yield
    finally:
        _defaults = before


def defaults_over(options):
    """`options` with those of `defaults` in their place."""
    return dataclasses.replace(options, **_defaults)
