"""Tensor maps (TMA descriptors) in the emulator's own 128 bytes: see runtime/async.h."""

import struct

# Numbers of tensormap.replace's elemtype; sizes in bytes.
_ELEMENTS = {"uint8": (0, 1), "uint16": (1, 2), "int32": (3, 4), "int64": (5, 8),
             "float16": (6, 2), "float32": (7, 4), "float64": (9, 8),
             "bfloat16": (10, 2)}  # fmt: skip
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}


def _check(tensor, box, swizzle):
    """(number of the element type, its size, rank) of what TMA can describe."""
    name, rank = str(tensor.dtype).rpartition(".")[2], tensor.ndim
    if name not in _ELEMENTS:
        raise ValueError(f"tensor_map: dtype {name}; accepted are {', '.join(_ELEMENTS)}")
    if not 1 <= rank <= 5 or len(box) != rank:
        raise ValueError(f"tensor_map: a box of {len(box)} for {rank} dimensions (1 to 5)")
    if tensor.stride(-1) != 1:
        raise ValueError("tensor_map: the last dimension must be contiguous")
    if swizzle not in _SWIZZLES:
        raise ValueError(f"tensor_map: swizzle {swizzle}; accepted are 0, 32, 64, 128")
    if any(not 1 <= side <= 256 for side in box):
        raise ValueError(f"tensor_map: box {tuple(box)}; sides are 1 to 256")
    return *_ELEMENTS[name], rank


def tensor_map(tensor, box, swizzle=128):
    """Bytes to pass for a `const __grid_constant__ CUtensorMap`, like cuTensorMapEncodeTiled's.

    tensor: up to 5 dimensions, the last one contiguous
    box: elements that one copy moves, by dimension in the tensor's order
    swizzle: 0, 32, 64 or 128 bytes

    Raises ValueError for a tensor or box that TMA cannot describe.
    """
    number, size, rank = _check(tensor, box, swizzle)
    reverse = range(rank - 1, -1, -1)  # TMA counts dimensions from the fastest
    pad = lambda values, count: (*values, *[0] * (count - len(values)))  # noqa: E731
    strides = pad([tensor.stride(i) * size for i in reverse][1:], 4)
    dims = pad([tensor.shape[i] for i in reverse], 5)
    sides = pad([box[i] for i in reverse], 5)
    return struct.pack(
        "<5Q22I",
        tensor.data_ptr(),
        *strides,
        *dims,
        *sides,
        *[1] * 5,
        rank - 1,
        number,
        0,
        _SWIZZLES[swizzle],
        0,
        0,
        0,
    )
