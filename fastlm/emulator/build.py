"""C++ source to a loaded library, through g++ and a cache that is keyed by content.

Objects of the runtime and libraries of kernels lie in $XDG_CACHE_HOME/fastlm/emulator (or
~/.cache/...). A name is the hash of everything that went in: sources, flags, compiler, processor.
Files appear by rename, so several processes may build the same thing at once.
"""

import functools
import hashlib
import os
import pathlib
import platform
import re
import shutil
import subprocess
import tempfile

from .errors import CompilerError

RUNTIME = pathlib.Path(__file__).parent / "runtime"
# -ffp-contract=off: what is fused was decided by the compiler that wrote the PTX.
_FLAGS = ("-std=c++17", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC",
          "-fvisibility=hidden", "-fno-gnu-unique", "-fno-strict-aliasing")  # fmt: skip


def cache_folder():
    """Where compiled kernels are kept; made if it is not there."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = pathlib.Path(base) / "fastlm" / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def _compiler():
    """Path of g++ and a text that changes with it and with the processor."""
    path = shutil.which(os.environ.get("CXX", "g++"))
    if path is None:
        raise CompilerError("g++ is not installed: the emulator compiles kernels with it")
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return path, version.splitlines()[0] + _processor()


def _processor():
    """The instruction sets that -march=native may use."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    flags = re.search(r"^flags.*$", text, re.M)
    return flags.group() if flags else platform.machine()


def digest(*parts):
    """A short hash of texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _start_compiler(arguments):
    return subprocess.Popen(
        [_compiler()[0], *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def _finish(process, output, target):
    """Waits for g++, and gives its output its name."""
    errors = process.communicate()[1]
    if process.returncode:
        raise CompilerError(f"g++ failed:\n{errors[-3000:]}")
    os.replace(output, target)


def _compile(sources, runtime):
    """The cached objects of C++ texts that include headers of the runtime, {name: (text, flags)}.

    What is not there is compiled side by side.
    """
    headers = "".join(header.read_text() for header in sorted(runtime.glob("*.h")))
    objects, running = [], []
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        for name, (text, flags) in sources.items():
            target = cache_folder() / f"{name}-{digest(text, headers, *flags, _compiler()[1])}.o"
            objects.append(target)
            if target.exists():
                continue
            code = pathlib.Path(folder) / f"{name}.cpp"
            output = code.with_suffix(".o")
            code.write_text(text)
            process = _start_compiler([*flags, f"-I{runtime}", "-c", str(code), "-o", str(output)])
            running.append((process, output, target))
        for started in running:
            _finish(*started)
    return objects


def build(source, traced):
    """Path of the shared library of a translated module.

    `traced` compiles the calls in that counters and detectors need. Raises CompilerError.
    """
    runtime = RUNTIME
    # Under tracing nearly all time goes to the detectors: -O0 compiles four times as fast. Else a
    # small kernel, a loop over memory, runs a third faster with -O1, and a large one, attention,
    # compiles in half the time with -Og and runs as fast.
    optimize = "-O0" if traced else "-O1" if len(source) < 100_000 else "-Og"
    flags = (*_FLAGS, optimize, "-w", f"-DEMULATOR_TRACED={int(traced)}")
    sources: dict = {"kernels": (source, flags)}
    for file in sorted(runtime.glob("*.cpp")):
        sources[file.stem] = (file.read_text(), (*_FLAGS, "-O2"))
    objects = _compile(sources, runtime)
    target = cache_folder() / f"library-{digest(*(o.name for o in objects))}.so"
    if not target.exists():
        link = ["-shared", "-Wl,--no-undefined", "-pthread", *map(str, objects), "-lm", "-o"]
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            output = pathlib.Path(folder) / target.name
            _finish(_start_compiler([*link, str(output)]), output, target)
    return target
