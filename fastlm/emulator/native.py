"""The C structures of runtime/machine.h and tables.h, and the libraries that speak them."""

import ctypes
import threading
from ctypes import c_char, c_char_p, c_uint32, c_uint64, c_void_p

SCHEDULES = ("order", "reverse", "random")
MAX_COUNTERS = 64


# A launch catches faults through handlers that belong to the process.
_LAUNCHING = threading.Lock()


class Range(ctypes.Structure):
    _fields_ = [("begin", c_uint64), ("bytes", c_uint64)]


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


class Result(ctypes.Structure):
    _fields_ = [
        ("failure", Failure),
        ("counters", c_uint64 * MAX_COUNTERS),
        ("printed", c_void_p),
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


_stacks: list = []  # the pool of the first library, which all use (fiber.cpp)


class Library:
    """A compiled module: `kernels` and `variables` by name, and `launch`."""

    def __init__(self, path):
        self._library = ctypes.CDLL(str(path))
        pool = StackPool.in_dll(self._library, "emulator_stacks")
        if not _stacks:
            _stacks.append(StackPool(pool.take, pool.give))
        pool.take, pool.give = _stacks[0].take, _stacks[0].give
        self.kernels = _table(self._library, "emulator_kernels", KernelInfo)
        self.variables = _table(self._library, "emulator_variables", VariableInfo)

    def launch(self, kernel, request):
        """Runs a kernel; returns (Result, text that it printed). The GIL is released meanwhile."""
        result = Result()
        info = ctypes.byref(self.kernels[kernel])
        with _LAUNCHING:
            self._library.emulator_launch(info, ctypes.byref(request), ctypes.byref(result))
        printed = b""
        if result.printed:
            printed = ctypes.string_at(result.printed)
            self._library.emulator_free(c_void_p(result.printed))
        return result, printed.decode(errors="replace")
