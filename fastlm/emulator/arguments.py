"""Kernel arguments: what Python passes, packed as the parameters of a PTX kernel."""

import ctypes
import math
import numbers
import struct

from .native import Range
from .types import type_bytes

_FORMATS = {"f32": "<f", "f64": "<d", "f16": "<e"}
_BYTES = ("uint8", "int8", "bool", "float8_e4m3fn", "float8_e5m2")
# Element types of the data behind a pointer, by the type in the source. Types of 16 bits may also
# be passed as their bits, and memory of any use as uint8.
_ELEMENTS = {
    "float": ("float32",), "float2": ("float32", "complex64"), "float4": ("float32",),
    "double": ("float64",), "double2": ("float64", "complex128"),
    "__half": ("float16", "int16", "uint16"), "__half2": ("float16", "int16", "uint16"),
    "__nv_bfloat16": ("bfloat16", "int16", "uint16"),
    "__nv_bfloat162": ("bfloat16", "int16", "uint16"),
    "bool": _BYTES, "char": _BYTES, "signed char": _BYTES, "unsigned char": _BYTES,
    **dict.fromkeys(("short", "unsigned short"), ("int16", "uint16")),
    **dict.fromkeys(("int", "unsigned int"), ("int32", "uint32")),
    **dict.fromkeys(("long", "unsigned long", "long long", "unsigned long long"),
                    ("int64", "uint64")),
}  # fmt: skip


def pack_value(value, variable, parameter, kernel):
    """Bytes of one argument for a .param variable.

    Tensors and arrays become their address; ints, floats and bools the parameter's type; bytes and
    ctypes structures are taken as they are, for structs and tensor maps passed by value.

    parameter: its name and its type in the source, as far as they are known (signature.py)
    kernel: its name, for errors
    """
    what = f"{kernel}: parameter {parameter.name}"
    size = type_bytes(variable.type) * (variable.count or 1)
    if isinstance(value, bytes | bytearray | ctypes.Structure | ctypes.Array):
        data = bytes(value)
        if len(data) != size:
            raise TypeError(f"{what}: expected {size} bytes, got {len(data)}")
        return data
    if variable.is_array:
        raise TypeError(f"{what}: expected the {size} bytes of a struct, got {_kind(value)}")
    if _is_memory(value) or value is None:
        _check_elements(value, parameter.type, what)
        return _pack_number(_address(value), variable.type, size, what)
    if hasattr(value, "item"):  # a number of NumPy's
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise TypeError(
            f"{what}: expected a tensor, a number, bytes or a ctypes structure, got {_kind(value)}"
        )
    if _is_pointer(parameter.type) and not isinstance(value, numbers.Integral):
        raise TypeError(f"{what}: expected a tensor, got {value!r}")
    # A 32-bit parameter may be declared without saying what it is.
    kind = {"float": "f32", "double": "f64"}.get(parameter.type, variable.type)
    if kind == "b32" and parameter.type is None and not isinstance(value, numbers.Integral):
        kind = "f32"
    return _pack_number(value, kind, size, what)


def _is_memory(value):
    """Whether it is a tensor or an array; a NumPy number has an array's interface too."""
    if hasattr(value, "__array_interface__"):
        return hasattr(value, "ctypes") or not hasattr(value, "item")
    return hasattr(value, "data_ptr")


def _address(value):
    if value is None:
        return 0
    return value.data_ptr() if hasattr(value, "data_ptr") else value.__array_interface__["data"][0]


def _kind(value):
    return f"a tensor of {value.dtype}" if hasattr(value, "dtype") else type(value).__name__


def _is_pointer(kind):
    return kind is not None and kind.endswith("*")


def _check_elements(value, kind, what):
    """Refuses a tensor whose elements are not those that the source's type says."""
    if kind is None:
        return
    if not _is_pointer(kind):
        if kind in _ELEMENTS:
            raise TypeError(f"{what}: expected {kind}, got {_kind(value)}")
        return
    expected = _ELEMENTS.get(kind[:-1])
    found = str(getattr(value, "dtype", "")).rpartition(".")[2]
    if expected and found and found not in (*expected, "uint8"):
        raise TypeError(f"{what}: expected a tensor of {expected[0]} for {kind}, got {found}")


def _pack_number(value, kind, size, what):
    if kind in _FORMATS:
        try:
            return struct.pack(_FORMATS[kind], float(value))
        except OverflowError:
            raise OverflowError(f"{what}: expected a .{kind} number, got {value}") from None
    if not isinstance(value, numbers.Integral):
        raise TypeError(f"{what}: expected a .{kind} integer, got {value!r}")
    bits = 8 * size
    if not -(1 << (bits - 1)) <= value < 1 << bits:
        raise OverflowError(f"{what}: expected a .{kind} integer, got {value}")
    return (int(value) % (1 << bits)).to_bytes(size, "little")


def memory_of(value):
    """(address, bytes) from the first to the last element of a tensor or array, or None."""
    if hasattr(value, "data_ptr"):
        if value.device.type != "cpu":
            raise TypeError(f"a tensor on {value.device}: the emulator works on CPU tensors")
        size = value.element_size()
        return _extent(value.data_ptr(), value.shape, [s * size for s in value.stride()], size)
    if hasattr(value, "__array_interface__"):
        array = value.__array_interface__
        shape, size = array["shape"], int(array["typestr"][2:])
        strides = array.get("strides") or [
            size * math.prod(shape[i + 1 :]) for i in range(len(shape))
        ]
        return _extent(array["data"][0], shape, strides, size)
    if isinstance(value, ctypes.Array):
        return ctypes.addressof(value), ctypes.sizeof(value)
    if hasattr(value, "address"):
        return value.address, value.bytes
    return None


def _extent(address, shape, strides, size):
    """A view is its own elements: what lies around it in its storage is out of bounds."""
    if 0 in shape:
        return address, 0
    steps = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]
    first = sum(step for step in steps if step < 0)
    return address + first, sum(map(abs, steps)) + size


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
    # With no memory at all the table is still one: without a table, all memory may be touched.
    return (Range * max(1, len(known)))(*known), [names[k] for k in known]
