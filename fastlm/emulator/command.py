"""The command line: runs a kernel on made-up data, or looks for faults in it.

    python -m fastlm.emulator check reduce.cu --block 128 f32[1024] f32[1] 1024

An argument is a number, or a tensor written type[shape] or type[shape]=fill. Types: f16 bf16 f32
f64 i32 i64 u8; fills: random (the default for floats), arange, or a number (0 is the default for
integers). `run` prints the tensors afterwards and the counters; `check` runs every schedule with
every detector, prints the first fault and exits with 1, or says that it found none.
"""

import argparse
import dataclasses
import re

from . import load
from .errors import EmulatorError
from .launch import Options

_CHECKS: list[tuple[str, dict]] = [
    ("bounds, alignment, barriers, data races", {"races": True}),
    ("reads of shared memory that nobody wrote", {"uninitialized": True}),
    ("threads in reverse order", {"schedule": "reverse"}),
    ("threads in random order", {"schedule": "random", "seed": 1}),
    ("copies that land at once", {"late_copies": False}),
]
_TYPES = {"f16": "float16", "f32": "float32", "f64": "float64", "i32": "int32", "i64": "int64",
          "u8": "uint8", "bf16": "uint16"}  # fmt: skip


class UsageError(Exception):
    """An argument on the command line that cannot be read."""


def make_argument(text, generator):
    """A number, or the NumPy array that `text` describes; bfloat16 as its bits in uint16."""
    import numpy

    match = re.fullmatch(r"(\w+)\[([\d,]+)\](?:=(.+))?", text)
    if not match:
        try:
            return int(text, 0) if re.fullmatch(r"-?\w+", text) else float(text)
        except ValueError:
            raise UsageError(f"'{text}' is no number and no tensor such as f32[64,768]") from None
    kind, shape, fill = match.group(1), [int(n) for n in match.group(2).split(",")], match.group(3)
    if kind not in _TYPES:
        raise UsageError(f"'{text}': type {kind}; accepted are {', '.join(_TYPES)}")
    fill = fill or ("random" if "f" in kind else "0")
    size = int(numpy.prod(shape))
    if fill == "random":
        values = generator.standard_normal(size)
    elif fill == "arange":
        values = numpy.arange(size)
    else:
        values = numpy.full(size, float(fill))
    if kind == "bf16":
        values = values.astype("float32").view("uint32") >> 16
    return _aligned(values.astype(_TYPES[kind])).reshape(shape)


def _aligned(array, boundary=256):
    """A copy that starts where cudaMalloc would let it start."""
    import numpy

    memory = numpy.empty(array.nbytes + boundary, "uint8")
    start = -memory.ctypes.data % boundary
    result = memory[start : start + array.nbytes].view(array.dtype)
    result[:] = array
    return result


def _launch(options, **changes):
    """Loads and runs what the command line names; returns (kernel, arguments)."""
    import numpy

    generator = numpy.random.default_rng(0)
    arguments = [make_argument(a, generator) for a in options.arguments]
    module = load(options.file, arch=options.arch, **changes)
    kernel = module[options.kernel] if options.kernel else module.kernel
    block = _size(options.block) if options.block else None
    kernel[_size(options.grid), block, options.shared](*arguments)
    return kernel, arguments


def _size(text):
    return tuple(int(n) for n in text.split(","))


def run(options):
    """Runs once and shows what came out."""
    kernel, arguments = _launch(options, counters=True, schedule=options.schedule)
    for text, value in zip(options.arguments, arguments, strict=True):
        if hasattr(value, "shape"):
            print(f"{text}: {value.ravel()[:8]}{' ...' if value.size > 8 else ''}")
    print(f"{kernel.name}: {kernel.counters}")
    return 0


def check(options):
    """Runs under every detector and schedule."""
    for what, changes in _CHECKS:
        try:
            _launch(options, **changes)
        except EmulatorError as error:
            print(f"FAULT ({what})\n{error}")
            return 1
        print(f"ok: {what}")
    print("no fault found on this data (docs/emulator.md says what that does not cover)")
    return 0


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m fastlm.emulator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("run", "check"))
    parser.add_argument("file", help=".cu (needs nvcc) or .ptx")
    parser.add_argument("arguments", nargs="*", help="of the kernel, in order")
    parser.add_argument("--kernel", help="its name, if the file has several")
    parser.add_argument("--grid", default="1", help="blocks: 4 or 4,2 or 4,2,1")
    parser.add_argument("--block", help="threads: 128 or 32,4; needed unless the PTX fixes it")
    parser.add_argument("--shared", type=int, default=0, help="bytes of dynamic shared memory")
    parser.add_argument("--arch", default="80", help="compute capability for nvcc, such as 90a")
    schedules = next(f for f in dataclasses.fields(Options) if f.name == "schedule")
    parser.add_argument("--schedule", default=schedules.default, help="order, reverse or random")
    return parser


def main(arguments=None):
    """Returns the exit status: 0, 1 for a fault in the kernel, 2 for anything else."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        return {"run": run, "check": check}[options.action](options)
    except (EmulatorError, UsageError, OSError, LookupError, TypeError, ValueError) as error:
        print(f"error: {error}")
        return 2
