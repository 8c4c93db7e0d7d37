"""Kernel arguments: what Python passes, packed as the parameters of a PTX kernel."""

import ctypes
import struct

from .native import Range
from .types import type_bytes

_FORMATS = {"f32": "<f", "f64": "<d", "f16": "<e"}


def _fits(value, kind):
    bits = 8 * type_bytes(kind)
    return -(1 << (bits - 1)) <= value < 1 << bits


def pack_value(value, variable):
    """Bytes of one argument for a .param variable, and its memory (tensor) if it has one.

    Tensors and arrays become their address; ints, floats and bools the parameter's type; bytes and
    ctypes structures are taken as they are, for structs and tensor maps passed by value.
    """
    size = type_bytes(variable.type) * (variable.count or 1)
    if isinstance(value, bytes | bytearray | ctypes.Structure | ctypes.Array):
        data = bytes(value)
        if len(data) != size:
            raise TypeError(f"parameter {variable.name}: {len(data)} bytes for one of {size}")
        return data
    if variable.is_array:
        raise TypeError(f"parameter {variable.name} is a struct of {size} bytes: pass bytes")
    if hasattr(value, "data_ptr"):
        value = value.data_ptr()
    elif hasattr(value, "__array_interface__"):
        value = value.__array_interface__["data"][0]
    elif value is None:
        value = 0
    if isinstance(value, float) and variable.type in _FORMATS:
        return struct.pack(_FORMATS[variable.type], value)
    return _pack_number(value, variable, size)


def _pack_number(value, variable, size):
    if not isinstance(value, int | float):
        raise TypeError(
            f"parameter {variable.name}: a tensor, number, bytes or ctypes structure is accepted, "
            f"got {type(value).__name__}"
        )
    if variable.type in _FORMATS:
        return struct.pack(_FORMATS[variable.type], float(value))
    if isinstance(value, float):
        # nvcc and Triton write float parameters as .f32; .b32 is the only other way they appear.
        if size == 4:
            return struct.pack("<f", value)
        raise TypeError(f"parameter {variable.name} is .{variable.type}, got the float {value}")
    if not _fits(value, variable.type):
        raise OverflowError(f"parameter {variable.name}: {value} does not fit .{variable.type}")
    return (value % (1 << (8 * size))).to_bytes(size, "little")


def memory_of(value):
    """(address, bytes) of a tensor's or array's storage, or None."""
    if hasattr(value, "data_ptr"):
        if value.device.type != "cpu":
            raise TypeError(f"a tensor on {value.device}: the emulator works on CPU tensors")
        storage = value.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    if hasattr(value, "__array_interface__"):
        return value.__array_interface__["data"][0], value.nbytes
    if isinstance(value, ctypes.Array):
        return ctypes.addressof(value), ctypes.sizeof(value)
    if hasattr(value, "address"):
        return value.address, value.bytes
    return None


def memory_ranges(buffers):
    """(native table, names) of the memory that a launch may touch; `buffers`: {name: value}.

    A value is a tensor, an array, or anything with an address and bytes.
    """
    names: dict = {}
    for name, value in buffers.items():
        found = memory_of(value)
        if found and found[1]:
            names.setdefault(found, name)
    known = sorted(names)
    return (Range * len(known))(*known), [names[k] for k in known]
