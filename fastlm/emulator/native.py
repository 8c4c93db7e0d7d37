"""The C structures of runtime/machine.h and tables.h, and the libraries that speak them."""

import ctypes
import functools
import threading
from ctypes import c_char, c_char_p, c_uint8, c_uint32, c_uint64, c_void_p

from . import variables

SCHEDULES = ("order", "reverse", "random")
MAX_COUNTERS = 64


# A launch catches faults through handlers that belong to the process.
_LAUNCHING = threading.Lock()


class Range(ctypes.Structure):
    _fields_ = [("begin", c_uint64), ("bytes", c_uint64)]


class Shadow(ctypes.Structure):
    _fields_ = [("begin", c_uint64), ("bytes", c_uint64), ("written", c_void_p)]


class Request(ctypes.Structure):
    _fields_ = [
        ("parameters", c_void_p),
        ("ranges", ctypes.POINTER(Range)),
        ("range_count", c_uint32),
        ("grid", c_uint32 * 3),
        ("block", c_uint32 * 3),
        ("dynamic_shared", c_uint32),
        ("shared_limit", c_uint32),
        ("schedule", c_uint32),
        ("seed", c_uint64),
        ("workers", c_uint32),
        ("resident", c_uint32),
        ("spin_limit", c_uint64),
        ("late_copies", c_uint32),
        ("late_wgmma", c_uint32),
        ("check_proxies", c_uint32),
        ("detect_races", c_uint32),
        ("detect_uninitialized", c_uint32),
        ("count", c_uint32),
        ("all_races", c_uint32),
        ("shadows", ctypes.POINTER(Shadow)),
        ("shadow_count", c_uint32),
        ("lines", c_uint32),
        ("load_uses", ctypes.POINTER(c_uint64)),
        ("store_bits", ctypes.POINTER(c_uint64)),
        ("suppressed", ctypes.POINTER(c_uint8)),
    ]


class Failure(ctypes.Structure):
    _fields_ = [
        ("message", c_char * 768),
        ("failed", c_uint32),
        ("site", c_uint32),
        ("other_site", c_uint32),
        ("ctaid", c_uint32 * 3),
        ("tid", c_uint32 * 3),
    ]


class RaceRecord(ctypes.Structure):
    _fields_ = [
        ("text", c_char * 256),
        ("site", c_uint32),
        ("other_site", c_uint32),
        ("quiet", c_uint32),
        ("ctaid", c_uint32 * 3),
        ("tid", c_uint32 * 3),
        ("count", c_uint64),
    ]


class Result(ctypes.Structure):
    """`race_list` are the RaceRecords, which the library has freed."""

    race_list: list
    _fields_ = [
        ("failure", Failure),
        ("counters", c_uint64 * MAX_COUNTERS),
        ("printed", c_void_p),
        ("races", ctypes.POINTER(RaceRecord)),
        ("race_count", c_uint64),
    ]


class KernelInfo(ctypes.Structure):
    _fields_ = [
        ("name", c_char_p),
        ("run", c_void_p),
        ("static_shared", c_uint32),
        ("dynamic_alignment", c_uint32),
        ("parameter_bytes", c_uint32),
        ("variables", c_void_p),
        ("variable_count", c_uint32),
        ("async_proxy", c_uint32),
        ("synchronizes_grid", c_uint32),
    ]


class VariableInfo(ctypes.Structure):
    _fields_ = [("name", c_char_p), ("address", c_uint64), ("bytes", c_uint64)]


def _table(library, name, kind):
    """Entries of an exported array up to its empty last one, by name."""
    entries = ctypes.cast(getattr(library, name), ctypes.POINTER(kind))
    found: dict = {}
    for i in range(1 << 20):
        if entries[i].name is None:
            return found
        found[entries[i].name.decode()] = entries[i]
    raise ValueError(f"{name} has no end")


class StackPool(ctypes.Structure):
    _fields_ = [("take", c_void_p), ("give", c_void_p)]


@functools.cache
def library(path):
    """The Library at a path."""
    return Library(path)


_stacks: list = []  # the pool of the first library, which all use (fiber.cpp)


class Library:
    """A compiled module: `kernels` and `variables` by name, what the variables hold at first, and
    `launch`. There is one for each path, as a process loads a library once.
    """

    def __init__(self, path):
        self.path = path
        self._library = ctypes.CDLL(str(path))
        pool = StackPool.in_dll(self._library, "emulator_stacks")
        if not _stacks:
            _stacks.append(StackPool(pool.take, pool.give))
        pool.take, pool.give = _stacks[0].take, _stacks[0].give
        self.kernels = _table(self._library, "emulator_kernels", KernelInfo)
        self.variables = _table(self._library, "emulator_variables", VariableInfo)
        self.initial = {n: ctypes.string_at(v.address, v.bytes) for n, v in self.variables.items()}

    def launch(self, kernel, request, values):
        """Runs a kernel; returns (Result, text that it printed). The GIL is released meanwhile.

        values: {name: bytearray} of the variables, which change unless the kernel faults
        """
        result = Result()
        info = ctypes.byref(self.kernels[kernel])
        with _LAUNCHING:
            variables.load(self, values)
            self._library.emulator_launch(info, ctypes.byref(request), ctypes.byref(result))
            if not result.failure.failed:
                variables.store(self, values)
        printed = b""
        if result.printed:
            printed = ctypes.string_at(result.printed)
            self._library.emulator_free(c_void_p(result.printed))
        result.race_list = [
            RaceRecord.from_buffer_copy(result.races[i]) for i in range(result.race_count)
        ]
        self._library.emulator_free(result.races)
        return result, printed.decode(errors="replace")
