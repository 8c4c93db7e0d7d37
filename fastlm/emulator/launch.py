"""Modules, kernels and launches: what `emulator.load` returns."""

import contextlib
import copy
import ctypes
import dataclasses
import re
import sys

from .arguments import memory_ranges, pack_value
from .build import build
from .counters import Counters
from .errors import KernelError
from .native import SCHEDULES, Library, Request
from .parser import parse
from .translate import kernel_groups, parameter_layout, restrict, source_lines, translate

_SHARED_LIMITS = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227}  # KiB for one block
_HINTS = {
    "data race": "the barrier that should stand between the two lines",
    "shared memory": "the size of the array, the index, and the shared bytes of the launch",
    "global memory": "the index, the mask of the last row or tile, and the tensor's size",
    "misaligned": "the offset of the pointer; vector accesses need their own size as alignment",
    "diverged": "branches around the instruction: every lane of the warp must reach it together",
    "barrier": "early returns and branches before the barrier",
    "cp.async": "the constant of cp.async.wait_group and the wait after the loop",
    "deadlock": "barriers in branches, and what the waiting threads wait for",
    "livelock": "the condition of the loop, the parity of the mbarrier, who should set the flag",
    "fence.proxy.async": "the store before the copy: a fence.proxy.async must follow it",
    "asynchronous copy": "the wait (cp.async.wait_group, mbarrier) and the barrier after it",
    "read of shared": "the code that should have filled this part of the array",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """How a module's kernels run.

    schedule: "order", "reverse" or "random" (with `seed`): which ready thread runs next, and in
        which order blocks start
    races, uninitialized: detect data races, and reads of shared memory that was never written
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
    races: bool = False
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
        for name, number in (("workers", self.workers), ("resident", self.resident)):
            if number is not None and number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        if self.workers > 1 and self.traced:
            raise ValueError(
                "workers: expected 1 with races, uninitialized or counters, which need one order "
                f"of all accesses, got {self.workers}"
            )

    @property
    def traced(self):
        """Whether kernels must be compiled with calls to the detectors and counters."""
        return self.races or self.uninitialized or self.counters


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


class Module:
    """The kernels of one PTX text: `module["name"]`, or `module.kernel` if there is only one."""

    def __init__(self, ptx, options=None, shared=0):
        self.ptx, self.options = ptx, options or Options()
        self.ast = parse(ptx)
        self.lines = source_lines(self.ast)
        self.default_shared = shared
        self._groups = {k: tuple(group) for group in kernel_groups(self.ast) for k in group}
        self._libraries = {}
        self._functions = {f.name: f for f in self.ast.functions if f.name in self._groups}

    @property
    def names(self):
        """Names of the kernels, as mangled by the compiler."""
        return list(self._functions)

    @property
    def kernel(self):
        if len(self._functions) != 1:
            raise LookupError(f"the module has {len(self._functions)} kernels: {self.names}")
        return self[self.names[0]]

    def __getitem__(self, name):
        """A kernel by its name, or by the only mangled name that holds it."""
        matches = [n for n in self._functions if n == name] or [
            n for n in self._functions if re.search(rf"(?<![a-z_]){re.escape(name)}(?![a-z_])", n)
        ]
        if len(matches) != 1:
            raise LookupError(f"kernel '{name}': {matches or 'not found'} among {self.names}")
        return Kernel(self, self._functions[matches[0]])

    def with_options(self, **changes):
        """The same module with other options; what is compiled is shared."""
        other = copy.copy(self)
        other.options = dataclasses.replace(self.options, **changes)
        return other

    def library(self, kernel):
        """The compiled library of a kernel, and of those it shares variables with."""
        group, traced, late = self._groups[kernel], self.options.traced, self.options.late_wgmma
        if (group, traced, late) not in self._libraries:
            source = translate(restrict(self.ast, group), late)
            self._libraries[group, traced, late] = Library(build(source, traced))
        return self._libraries[group, traced, late]

    def variable(self, name):
        """A writable view (bytes) of a .global or .const variable, as cudaMemcpyToSymbol has it."""
        for kernel in self.names:
            found = self.library(kernel).variables.get(name)
            if found:
                return memoryview((ctypes.c_char * found.bytes).from_address(found.address)).cast(
                    "B"
                )
        raise LookupError(f"variable '{name}' is not used by any kernel of {self.names}")


class Kernel:
    """One kernel. `kernel[grid, block, shared](*arguments)` runs it; see `emulator.load`."""

    def __init__(self, module, function):
        self.module, self.function, self.name = module, function, function.name
        self.counters = None

    def __getitem__(self, launch):
        grid, block, shared = (*(launch if isinstance(launch, tuple) else (launch,)), None, None)[
            :3
        ]
        grid, block = _triple(grid), self._block(block)
        shared = self.module.default_shared if shared is None else shared
        return lambda *arguments: self._launch(grid, block, shared, arguments)

    def _block(self, block):
        required = self.function.directives.get("reqntid")
        if block is None and not required:
            raise TypeError(
                f"{self.name}: the PTX has no .reqntid, so the launch must name a block"
            )
        if block is not None and required and _triple(block) != _triple(required):
            raise TypeError(
                f"{self.name}: a block of {block}, but the PTX is for {required} threads; "
                "a grid of two dimensions alone is written kernel[(x, y), None]"
            )
        return _triple(required if block is None else block)

    def _parameters(self, arguments):
        """Packed arguments, and everything that must stay alive during the launch."""
        variables = self.function.parameters
        missing = variables[len(arguments) :]
        # Triton adds pointers to scratch memory at the end, which its launcher provides.
        if len(missing) == 2 and all(v.type == "u64" for v in missing):
            scratch = (ctypes.c_char * (1 << 20))()
            arguments = (*arguments, *[ctypes.addressof(scratch)] * 2)
        else:
            scratch = None
        if len(arguments) != len(variables):
            raise TypeError(
                f"{self.name} has {len(variables)} parameters, got {len(arguments)} arguments"
            )
        packed = bytearray()
        for value, variable, (_, offset, _) in zip(
            arguments, variables, parameter_layout(self.function), strict=True
        ):
            packed += bytes(offset - len(packed)) + pack_value(value, variable)
        # By-value tensor maps must lie at multiples of 64.
        buffer = (ctypes.c_char * (len(packed) + 64))()
        address = -(-ctypes.addressof(buffer) // 64) * 64
        ctypes.memmove(address, bytes(packed), len(packed))
        return address, buffer, scratch

    def _request(self, grid, block, shared, address):
        options = self.module.options
        limit = _SHARED_LIMITS.get(self.module.ast.target.rstrip("af"), 227) * 1024
        return Request(
            parameters=address,
            grid=grid,
            block=block,
            dynamic_shared=shared,
            shared_limit=limit,
            schedule=SCHEDULES.index(options.schedule),
            seed=options.seed,
            workers=options.workers,
            resident=options.resident or 0,
            spin_limit=options.spin_limit,
            late_copies=options.late_copies,
            late_wgmma=options.late_wgmma,
            check_proxies=options.proxy_fences,
            detect_races=options.races,
            detect_uninitialized=options.uninitialized,
            count=options.counters,
        )

    def _launch(self, grid, block, shared, arguments):
        library = self.module.library(self.name)
        address, _kept_alive, scratch = self._parameters(arguments)
        request = self._request(grid, block, shared, address)
        ranges, names = memory_ranges(self._buffers(arguments, library, scratch))
        if self._knows_memory(arguments):
            request.ranges, request.range_count = ranges, len(names)
        result, printed = library.launch(self.name, request)
        sys.stdout.write(printed)
        if result.failure.failed:
            raise self._error(result.failure, names)
        if self.module.options.counters:
            self.counters = Counters.from_array(list(result.counters))

    def _buffers(self, arguments, library, scratch):
        """All the memory of a launch, by the name that an error gives it."""
        buffers = {
            f"argument {i} ({v.name})": a
            for i, (a, v) in enumerate(zip(arguments, self.function.parameters, strict=False))
        }
        for i, a in enumerate(self.module.options.memory):
            buffers[getattr(a, "name", None) or f"memory[{i}]"] = a
        buffers |= {f"variable {name}": v for name, v in library.variables.items()}
        return buffers | ({"scratch memory": scratch} if scratch else {})

    def _knows_memory(self, arguments):
        """Structs may hold pointers that only the caller knows: then `memory` must name them."""
        opaque = any(isinstance(a, bytes | bytearray | ctypes.Structure) for a in arguments)
        raw = any(
            isinstance(a, int) and a > 1 << 32 and v.type in ("u64", "b64")
            for a, v in zip(arguments, self.function.parameters, strict=False)
        )
        return bool(self.module.options.memory) or not (opaque or raw)

    def _error(self, failure, names):
        reason = failure.message.decode(errors="replace")
        reason = re.sub(r"buffer #(\d+)", lambda m: names[int(m.group(1))], reason)
        if failure.failed == 2:  # refused before any thread ran
            return KernelError(self.name, reason)
        where = self._describe(failure.site)
        if failure.other_site:
            where += f"\n  and {self._describe(failure.other_site)}"
        hint = next((text for word, text in _HINTS.items() if word in reason), None)
        return KernelError(self.name, reason, where, list(failure.ctaid), list(failure.tid), hint)

    def _describe(self, ptx_line):
        if not ptx_line:
            return "an unknown instruction"
        text = " ".join(self.module.ast.lines[ptx_line - 1].split())
        source = self.module.lines.get(ptx_line)
        place = f"PTX line {ptx_line}: {text[:100]}"
        return f"{source} ({place})" if source else place


def _triple(size):
    size = (size,) if isinstance(size, int) else tuple(int(n) for n in size)
    return (*size, 1, 1)[:3]
