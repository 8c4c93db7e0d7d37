"""A launch in a process of its own: what a kernel without bounds checks destroys is not ours."""

import ctypes
import os
import signal

from .errors import KernelError
from .native import Result


def launch_in_child(library, kernel, request, ranges):
    """What library.launch(kernel, request) gives; what it wrote to `ranges` is copied back.

    Raises KernelError where the process died.
    """
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        _run(library, kernel, request, ranges, send)
    os.close(send)
    with open(receive, "rb") as pipe:
        data = pipe.read()
    status = os.waitpid(child, 0)[1]
    if status:
        how = signal.Signals(status).name if os.WIFSIGNALED(status) else f"exit status {status}"
        raise KernelError(
            kernel,
            f"its process died ({how}): without bounds checks a kernel may write anywhere",
            hint="the first access that bounds=True refuses",
        )
    result, at = Result.from_buffer_copy(data), ctypes.sizeof(Result)
    for r in ranges:
        ctypes.memmove(r.begin, data[at : at + r.bytes], r.bytes)
        at += r.bytes
    return result, data[at:].decode()


def _run(library, kernel, request, ranges, send):
    """The child's part; it never returns, so that nothing of Python's own is torn down twice."""
    status = 1
    try:
        result, printed = library.launch(kernel, request)
        with open(send, "wb") as pipe:
            pipe.write(bytes(result))
            for r in ranges:
                pipe.write(ctypes.string_at(r.begin, r.bytes))
            pipe.write(printed.encode())
        status = 0
    finally:
        os._exit(status)
