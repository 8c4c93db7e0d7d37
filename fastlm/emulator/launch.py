"""Modules, kernels and launches: what `emulator.load` returns."""

import copy
import ctypes
import dataclasses
import numbers
import re
import sys

from . import hints
from .arguments import memory_ranges, pack_value
from .build import build
from .counters import Counters
from .errors import KernelError
from .names import find, source_name
from .native import SCHEDULES, Request, library
from .options import Options
from .parser import parse
from .races import listed, tables
from .signature import parameters
from .translate import kernel_groups, parameter_layout, restrict, source_lines, translate
from .unwritten import shadows
from .variables import Variables

_SHARED_LIMITS = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227}  # KiB for one block


class Module:
    """The kernels of one PTX text: `module["name"]`, or `module.kernel` if there is only one."""

    def __init__(self, ptx, options=None, shared=0, declared=None):
        """declared: {kernel: [parameters, ...]}, what is known of them (signature.py)"""
        self.ptx, self.options = ptx, options or Options()
        self.ast = parse(ptx)
        self.lines = source_lines(self.ast)
        self.default_shared = shared
        self._groups = {k: tuple(group) for group in kernel_groups(self.ast) for k in group}
        self._libraries, self._tables = {}, {}
        self._functions = {f.name: f for f in self.ast.functions if f.name in self._groups}
        self.parameters = {n: parameters(f, declared) for n, f in self._functions.items()}
        self.variables = Variables(self.ast)

    @property
    def names(self):
        """Names of the kernels, as mangled by the compiler."""
        return list(self._functions)

    @property
    def kernel(self):
        if len(self._functions) != 1:
            raise LookupError(f"the module has {len(self._functions)} kernels: {self._sources()}")
        return self[self.names[0]]

    def __getitem__(self, name):
        """A kernel by its name in the PTX or in the source, such as scale<float, 128>."""
        matches = find(self.names, name)
        if len(matches) != 1:
            found = f"{len(matches)} of that name" if matches else "none"
            raise LookupError(f"kernel '{name}': expected one of {self._sources()}, got {found}")
        return Kernel(self, self._functions[matches[0]])

    def _sources(self):
        return ", ".join(map(source_name, self.names)) or "none"

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
            self._libraries[group, traced, late] = library(build(source, traced))
        return self._libraries[group, traced, late]

    def tables(self, kernel):
        """What the race detector knows of a kernel before it runs."""
        key = kernel, tuple(self.options.suppress)
        if key not in self._tables:
            self._tables[key] = tables(self.ast, kernel, self.lines, self.options.suppress)
        return self._tables[key]

    def variable(self, name):
        """A writable view (bytes) of a __device__ or __constant__ variable, called as in the source
        or in the PTX; cudaMemcpyToSymbol writes there.
        """
        known = [v.name for v in self.ast.variables if v.space in ("global", "const")]
        matches = find(known, name)
        for kernel in self.names if len(matches) == 1 else ():
            if matches[0] in self.library(kernel).variables:
                return self.variables.view(self.library(kernel), matches[0])
        sources = ", ".join(map(source_name, known)) or "none"
        raise LookupError(f"variable '{name}': expected one that a kernel uses, of {sources}")


class Kernel:
    """One kernel. `kernel[grid, block, shared](*arguments)` runs it; see `emulator.load`."""

    def __init__(self, module, function):
        self.module, self.function, self.name = module, function, function.name
        self.title = source_name(self.name)  # for people
        self.counters = None
        self.races = []  # of the last launch, where they are looked for

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
                f"{self.title}: the PTX has no .reqntid, so the launch must name a block"
            )
        if block is not None and required and _triple(block) != _triple(required):
            raise TypeError(
                f"{self.title}: a block of {block}, but the PTX is for {required} threads; "
                "a grid of two dimensions alone is written kernel[(x, y), None]"
            )
        return _triple(required if block is None else block)

    def _parameters(self, arguments):
        """Packed arguments, and everything that must stay alive during the launch."""
        variables, declared = self.function.parameters, self.module.parameters[self.name]
        missing = variables[len(arguments) :]
        # Triton adds pointers to scratch memory at the end, which its launcher provides.
        if len(missing) == 2 and all(v.type == "u64" for v in missing):
            scratch = (ctypes.c_char * (1 << 20))()
            arguments = (*arguments, *[ctypes.addressof(scratch)] * 2)
        else:
            scratch = None
        if len(arguments) != len(variables):
            raise TypeError(
                f"{self.title} has {len(variables)} parameters, got {len(arguments)} arguments"
            )
        packed = bytearray()
        for value, variable, parameter, (_, offset, _) in zip(
            arguments, variables, declared, parameter_layout(self.function), strict=True
        ):
            data = pack_value(value, variable, parameter, self.title)
            packed += bytes(offset - len(packed)) + data
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
            detect_races=bool(options.races),
            all_races=options.races == "all",
            detect_uninitialized=options.uninitialized,
            count=options.counters,
        )

    def _launch(self, grid, block, shared, arguments):
        module, options = self.module, self.module.options
        library = module.library(self.name)
        address, _kept_alive, scratch = self._parameters(arguments)
        request = self._request(grid, block, shared, address)
        buffers = self._buffers(arguments, library, scratch)
        ranges, names = memory_ranges(buffers)
        if self._knows_memory(arguments):
            request.ranges, request.range_count = ranges, len(names)
        marked = shadows(ranges, buffers.values(), options.uninitialized)
        request.shadows, request.shadow_count = marked, len(marked)
        if options.races:
            for field, value in module.tables(self.name)._asdict().items():
                setattr(request, field, value)
        result, printed = library.launch(self.name, request, module.variables.of(library))
        sys.stdout.write(printed)
        self.races = listed(result, self._describe)
        if result.failure.failed:
            raise self._error(result.failure, names, _triple(block))
        if any(not race.quiet for race in self.races):
            raise self._error_of_races()
        if options.counters:
            self.counters = Counters.from_array(list(result.counters))

    def _buffers(self, arguments, library, scratch):
        """All the memory of a launch, by the name that an error gives it."""
        buffers = {
            f"argument {i} ({p.name})": a
            for i, (a, p) in enumerate(
                zip(arguments, self.module.parameters[self.name], strict=False)
            )
        }
        for i, a in enumerate(self.module.options.memory):
            buffers[getattr(a, "name", None) or f"memory[{i}]"] = a
        buffers |= {f"variable {name}": v for name, v in library.variables.items()}
        return buffers | ({"scratch memory": scratch} if scratch else {})

    def _knows_memory(self, arguments):
        """Structs may hold pointers that only the caller knows: then `memory` must name them."""
        opaque = any(isinstance(a, bytes | bytearray | ctypes.Structure) for a in arguments)
        raw = any(
            isinstance(a, numbers.Integral) and int(a) > 1 << 32 and v.type in ("u64", "b64")
            for a, v in zip(arguments, self.function.parameters, strict=False)
        )
        return bool(self.module.options.memory) or not (opaque or raw)

    def _error(self, failure, names, block):
        reason = failure.message.decode(errors="replace")
        reason = re.sub(r"buffer #(\d+)", lambda m: names[int(m.group(1))], reason)
        if failure.failed == 2:  # refused before any thread ran
            return KernelError(self.title, reason)
        where = self._describe(failure.site, failure.other_site)
        here, other = (hints.site(self.module.ast, s) for s in (failure.site, failure.other_site))
        hint = hints.hint(reason, here, other, hints.same_warp(reason, block))
        return KernelError(self.title, reason, where, [*failure.ctaid], [*failure.tid], hint)

    def _error_of_races(self):
        """What is raised at the end of a launch that has gone on after its races."""
        loud = sum(not race.quiet for race in self.races)
        first, *more = self.races
        races = "data race" if loud == 1 else "data races"
        reason = f"{loud} {races}, and {len(self.races) - loud} that would not be raised; the "
        reason += f"first: {first.reason}"
        return KernelError(self.title, reason, first.where, first.block, first.thread, more=more)

    def _describe(self, ptx_line, other=0):
        """Where a line of the PTX comes from, and another one if there is one."""
        places = [self._place(line) for line in (ptx_line, other) if line]
        return "\n  and ".join(places) or "an unknown instruction"

    def _place(self, ptx_line):
        text = " ".join(self.module.ast.lines[ptx_line - 1].split())
        source = self.module.lines.get(ptx_line)
        place = f"PTX line {ptx_line}: {text[:100]}"
        return f"{source} ({place})" if source else place


def _triple(size):
    size = (size,) if isinstance(size, int) else tuple(int(n) for n in size)
    return (*size, 1, 1)[:3]
