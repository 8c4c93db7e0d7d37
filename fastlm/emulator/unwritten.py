"""Global memory that nothing has been written to yet, for the detector of uninitialised reads."""

import ctypes
import weakref

from .arguments import memory_of
from .native import Shadow

_marked: dict = {}  # by number of the tensor object: its _Marked


class _Marked:
    def __init__(self, tensor):
        key = id(tensor)

        def forget(_):
            _marked.pop(key, None)

        self.tensor = weakref.ref(tensor, forget)
        self.version = getattr(tensor, "_version", None)
        self.address, self.bytes = memory_of(tensor)
        self.written = (ctypes.c_uint8 * self.bytes)()

    def is_filled_by_host(self):
        """torch counts its changes of a tensor, and not those of kernels in the emulator."""
        return getattr(self.tensor(), "_version", None) != self.version


def unwritten(tensor):
    """Marks a tensor's memory as not initialised, and returns the tensor.

        y = emulator.unwritten(torch.empty(n))

    Under uninitialized=True a kernel that reads an element which no kernel has written since is a
    fault. What torch writes to the tensor in place ends the mark, and so does a launch without the
    detector, which does not see what it writes. For an array of NumPy's, mark it after the host has
    written to it for the last time.
    """
    found = _Marked(tensor)
    if found.bytes:
        _marked[id(tensor)] = found
    return tensor


def shadows(ranges, buffers, detects):
    """The native table of memory that counts as unwritten, for a launch that may touch `ranges`.

    buffers: those with an attribute `written` are memory of an extension's host code, which has one
        byte there for each of theirs
    detects: whether the launch sees what is written; else it all counts as written afterwards
    """
    for key, marked in list(_marked.items()):
        touched = any(
            marked.address < r.begin + r.bytes and r.begin < marked.address + marked.bytes
            for r in ranges
        )
        if marked.is_filled_by_host() or (touched and not detects):
            _marked.pop(key, None)
    known = [Shadow(m.address, m.bytes, ctypes.addressof(m.written)) for m in _marked.values()]
    for buffer in buffers:
        written = getattr(buffer, "written", None)
        if written and detects:
            known.append(Shadow(buffer.address, buffer.bytes, written))
        elif written:
            ctypes.memset(written, 1, buffer.bytes)
    return (Shadow * len(known))(*known)
