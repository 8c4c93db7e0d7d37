"""Kernel arguments as the command line has them: f32[64,768]=arange@out.npy and so on."""

import re
import struct

from .names import split_top

# NumPy's types; bfloat16, which NumPy does not have, is its bits in uint16.
_DTYPES = {"f16": "float16", "bf16": "uint16", "f32": "float32", "f64": "float64", "bool": "bool",
           **{f"{kind}{bits}": f"{name}{bits}" for kind, name in (("i", "int"), ("u", "uint"))
              for bits in (8, 16, 32, 64)}}  # fmt: skip
_FLOATS = ("f16", "bf16", "f32", "f64")
_TYPES = ", ".join(_DTYPES)


class UsageError(Exception):
    """Something on the command line that cannot be read."""


class Argument:
    """One argument.

    value: what the kernel gets: a number, an array, or the bytes of a struct
    arrays: {text: array} of the memory that it brings, itself or behind the pointers of a struct
    unwritten: those of them that count as not initialised
    """

    def __init__(self, text, generator):
        self.arrays, self.unwritten = {}, []
        self._types, self._files = {}, {}
        if text.startswith("{") and text.endswith("}"):
            self.value = self._struct(text, generator)
        else:
            self.value = self._one(text, generator)[1]

    def _one(self, text, generator):
        """(type or "pointer", value) of a number or a tensor; a typed number is its bytes."""
        described, _, file = text.partition("@")
        tensor = re.fullmatch(r"(\w+)\[([\d,]*)\](?:=(.+))?", described)
        if tensor or described.endswith(".npy"):
            if tensor:
                kind, shape, fill = tensor.groups()
                array = self._tensor(text, kind, shape, fill, generator)
            else:
                kind, array = _from_file(described)
            self.arrays[text], self._types[text], self._files[text] = array, kind, file
            return "pointer", array
        if file:
            raise UsageError(f"'{text}': expected a tensor before @, got '{described}'")
        typed = re.fullmatch(r"(\w+):(.+)", text)
        if typed:
            return typed.group(1), _scalar(text, *typed.groups()).tobytes()
        number = _number(text)
        return {bool: "bool", int: "i32", float: "f32"}[type(number)], number

    def _tensor(self, text, kind, shape, fill, generator):
        import numpy

        _check_type(text, kind)
        sides = tuple(int(n) for n in shape.split(",") if n)
        array = aligned(numpy.zeros(sides, _DTYPES[kind]))
        fill = fill or ("random" if kind in _FLOATS else "0")
        if fill == "empty":
            array.view("uint8")[...] = 0xFF  # NaN in every float type
            self.unwritten.append(array)
        elif fill == "random":
            array[...] = encode(generator.standard_normal(sides), kind)
        elif fill == "arange":
            array[...] = encode(numpy.arange(array.size).reshape(sides), kind)
        elif fill.endswith(".npy"):
            values = numpy.load(fill)
            if values.shape != sides or (kind not in _FLOATS and values.dtype.kind == "f"):
                found = f"{values.dtype}{list(values.shape)}"
                raise UsageError(f"'{text}': expected {kind}{list(sides)} in {fill}, got {found}")
            array[...] = encode(values, kind)
        else:
            array[...] = _scalar(text, kind, fill)
        return array

    def _struct(self, text, generator):
        """The fields as C has them: each at a multiple of its size, the whole of the largest."""
        data, alignment = b"", 1
        for field in split_top(text[1:-1], ","):
            kind, value = self._one(field, generator)
            if kind == "pointer":
                value = struct.pack("<Q", value.ctypes.data)
            elif not isinstance(value, bytes):
                value = _scalar(field, kind, field).tobytes()
            alignment = max(alignment, len(value))
            data += bytes(-len(data) % len(value)) + value
        return data + bytes(-len(data) % alignment)

    def results(self):
        """[(text, numbers)] of the arrays, which are saved where the text says so."""
        import numpy

        found = [(text, decode(array, self._types[text])) for text, array in self.arrays.items()]
        for text, values in found:
            if self._files[text]:
                numpy.save(self._files[text], values)
        return found


def _check_type(text, kind):
    if kind not in _DTYPES:
        raise UsageError(f"'{text}': expected one of the types {_TYPES}, got {kind}")


def _from_file(path):
    """(type, array) of a file."""
    import numpy

    array = numpy.load(path)
    kinds = [k for k, name in _DTYPES.items() if name == array.dtype.name and k != "bf16"]
    if not kinds:
        raise UsageError(f"'{path}': expected one of the types {_TYPES}, got {array.dtype}")
    return kinds[0], aligned(array)


def _number(text):
    if text in ("true", "false"):
        return text == "true"
    try:
        return int(text, 0)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            raise UsageError(
                f"'{text}': expected a number or a tensor such as f32[64,768]"
            ) from None


def _scalar(text, kind, value):
    """A number of a type, as an array of one element."""
    import numpy

    _check_type(text, kind)
    number = _number(value)
    if kind in _FLOATS:
        return encode(numpy.array([number], "float64"), kind)
    try:
        if isinstance(number, float):
            raise OverflowError
        return numpy.array([number], _DTYPES[kind])
    except OverflowError:
        raise UsageError(f"'{text}': expected an integer that fits {kind}, got {value}") from None


def encode(values, kind):
    """Numbers as an array of the type."""
    import numpy

    if kind != "bf16":
        return values.astype(_DTYPES[kind])
    bits = values.astype("float32").view("uint32")
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # to the nearest, ties to even
    return numpy.where(numpy.isnan(values), 0x7FC0, rounded).astype("uint16")


def decode(array, kind):
    """The numbers that an array of the type holds."""
    return (array.astype("uint32") << 16).view("float32") if kind == "bf16" else array


def aligned(array, boundary=256):
    """A copy that starts where cudaMalloc would let it start."""
    import numpy

    memory = numpy.empty(array.nbytes + boundary, "uint8")
    start = -memory.ctypes.data % boundary
    result = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    result[...] = array
    return result
