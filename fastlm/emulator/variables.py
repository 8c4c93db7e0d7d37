"""The values of a module's __device__ and __constant__ variables, from one launch to the next."""

import ctypes
import re


class Variables:
    """One module's own: libraries are shared by all that run the same code, and a launch that
    faults leaves the values as they were before it.
    """

    def __init__(self, module):
        numeric = {v.name: all(map(_is_number, v.initial)) for v in module.variables}
        self._movable = {name for name, movable in numeric.items() if movable}
        self._values = {}

    def of(self, library):
        """{name: bytearray} of the variables that a library has."""
        return {name: self._value(library, name) for name in library.variables}

    def _value(self, library, name):
        # What is initialised by an address is of one library alone.
        key = name if name in self._movable else (name, library.path)
        if key not in self._values:
            self._values[key] = bytearray(library.initial[name])
        return self._values[key]

    def view(self, library, name):
        """A writable view of a variable of a library."""
        return memoryview(self._value(library, name))


def _is_number(value):
    return bool(re.fullmatch(r"-?(0[fFdDxX][0-9a-fA-F]+|\d+)", value))


def load(library, values):
    """Copies values to where the library's kernels have them."""
    for name, value in values.items():
        at = (ctypes.c_char * len(value)).from_buffer(value)
        ctypes.memmove(library.variables[name].address, at, len(value))


def store(library, values):
    """Copies what the library's kernels have made of them back."""
    for name, value in values.items():
        value[:] = ctypes.string_at(library.variables[name].address, len(value))
