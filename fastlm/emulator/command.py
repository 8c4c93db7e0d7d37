"""The command line: runs a kernel on made-up data, or looks for faults in it.

    python -m fastlm.emulator check reduce.cu --block 128 f32[1024] f32[1] 1024

An argument is
    a number          1024, 3.5, true; as the kernel's parameter has it, or of a type: bf16:0.5
    a tensor          type[shape] or type[shape]=fill; fill is random (what floats are without one),
                      arange, a number (0 is what integers are without one), a file of NumPy's, or
                      empty: memory that nobody has initialised, which a kernel may not read
    a file            x.npy
    a struct          {type:number, ..., tensor, ...}; a tensor there is a pointer to it
with the types f16 bf16 f32 f64 i8 i16 i32 i64 u8 u16 u32 u64 bool. A tensor or file followed by
@y.npy is written there after the run (bfloat16 as float32).

`run` prints the tensors afterwards and the counters. `check` runs every schedule with every
detector, prints the first fault and exits with 1, or says that it found none. The exit status is 2
for all that is no fault of the kernel's: what the compiler refuses, an argument that does not fit.
"""

import argparse

from . import load
from .errors import EmulatorError, KernelError
from .unwritten import unwritten
from .written_arguments import Argument, UsageError

_CHECKS: list[tuple[str, dict]] = [
    ("bounds, alignment, barriers, data races", {"races": True}),
    ("reads of memory that nobody wrote", {"uninitialized": True}),
    ("threads in reverse order", {"schedule": "reverse"}),
    ("threads in random order", {"schedule": "random", "seed": 1}),
    ("copies that land at once", {"late_copies": False}),
]


def _launch(options, **changes):
    """Loads and runs what the command line names; returns (kernel, arguments)."""
    import numpy

    generator = numpy.random.default_rng(0)
    arguments = [Argument(a, generator) for a in options.arguments]
    arrays = tuple(array for a in arguments for array in a.arrays.values())
    for array in (array for a in arguments for array in a.unwritten):
        unwritten(array)
    flags = [f"-I{folder}" for folder in options.include] + [f"-D{d}" for d in options.define]
    module = load(options.file, arch=options.arch, flags=flags, memory=arrays, **changes)
    kernel = _kernel(module, options, flags)
    block = _size(options.block) if options.block else None
    kernel[_size(options.grid), block, options.shared](*(a.value for a in arguments))
    return kernel, arguments


def _kernel(module, options, flags):
    if not options.kernel:
        return module.kernel
    try:
        return module[options.kernel]
    except LookupError:
        if not options.kernel.endswith(">") or not options.file.endswith(".cu"):
            raise
    # A template that the file does not make this kernel of.
    changes = vars(module.options)
    instantiate = (options.kernel,)
    module = load(options.file, arch=options.arch, flags=flags, instantiate=instantiate, **changes)
    return module[options.kernel]


def _size(text):
    return tuple(int(n) for n in text.split(","))


def run(options):
    """Runs once and shows what came out."""
    schedule = {"schedule": options.schedule} if options.schedule else {}
    kernel, arguments = _launch(options, counters=True, **schedule)
    for argument in arguments:
        for text, values in argument.results():
            print(f"{text}: {values.ravel()[:8]}{' ...' if values.size > 8 else ''}")
    print(f"{kernel.title}: {kernel.counters}")
    return 0


def check(options):
    """Runs under every detector and schedule."""
    for what, changes in _CHECKS:
        if "races" in changes:
            changes = {"races": "all" if options.all else True, "suppress": tuple(options.suppress)}
        try:
            kernel, _ = _launch(options, **changes)
        except KernelError as error:
            if error.block is None:  # refused before it ran
                raise
            print(f"FAULT ({what})\n{error}")
            return 1
        print(f"ok: {what}")
        if kernel.races and not options.all:
            print(f"    {len(kernel.races)} races that change nothing or are suppressed: see --all")
        for race in kernel.races if options.all else ():
            print(race)
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
    parser.add_argument("--kernel", help="its name in the source, such as 'scale<float, 128>'")
    parser.add_argument("--grid", default="1", help="blocks: 4 or 4,2 or 4,2,1")
    parser.add_argument("--block", help="threads: 128 or 32,4; needed unless the PTX fixes it")
    parser.add_argument("--shared", type=int, default=0, help="bytes of dynamic shared memory")
    parser.add_argument("--arch", default="80", help="compute capability: 80, 90a, sm_90a")
    parser.add_argument("-I", dest="include", action="append", default=[], help="folder of headers")
    parser.add_argument("-D", dest="define", action="append", default=[], help="NAME or NAME=VALUE")
    parser.add_argument(
        "--all", action="store_true", help="check: list all races, go on after each"
    )
    parser.add_argument("--suppress", action="append", default=[], metavar="FILE:LINE",
                        help="check: races of an access there are no fault")  # fmt: skip
    parser.add_argument("--schedule", help="run: order, reverse or random")
    return parser


def main(arguments=None):
    """Returns the exit status: 0, 1 for a fault in the kernel, 2 for anything else."""
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    if options.action == "run" and (options.all or options.suppress):
        parser.error("--all and --suppress are of check: run looks for no races")
    if options.action == "check" and options.schedule:
        parser.error("--schedule is of run: check goes through all of them")
    try:
        return {"run": run, "check": check}[options.action](options)
    except (EmulatorError, UsageError, OSError, LookupError, TypeError, ValueError,
            OverflowError) as error:  # fmt: skip
        print(f"error: {error}")
        return 1 if isinstance(error, KernelError) and error.block is not None else 2
