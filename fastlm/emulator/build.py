"""C++ source to a loaded library, through g++ and a cache that is keyed by content.

Objects of the runtime and libraries of kernels lie in $XDG_CACHE_HOME/fastlm/emulator (or
~/.cache/...). A name is the hash of everything that went in: sources, flags, compiler, processor.
Files appear by rename, so several processes may build the same thing at once.
"""

import concurrent.futures
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


def _run_compiler(arguments):
    result = subprocess.run([_compiler()[0], *arguments], capture_output=True, text=True)
    if result.returncode:
        raise CompilerError(f"g++ failed:\n{result.stderr[-3000:]}")


def _produce(target, make):
    """Calls make(temporary path) unless `target` exists, and renames its output to `target`."""
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        output = pathlib.Path(folder) / target.name
        make(output)
        os.replace(output, target)
    return target


def _compile(name, source, flags, runtime):
    """The cached object of a C++ text that includes headers of the runtime."""
    headers = "".join(header.read_text() for header in sorted(runtime.glob("*.h")))
    target = cache_folder() / f"{name}-{digest(source, headers, *flags, _compiler()[1])}.o"

    def make(output):
        code = output.with_suffix(".cpp")
        code.write_text(source)
        _run_compiler([*flags, f"-I{runtime}", "-c", str(code), "-o", str(output)])

    return _produce(target, make)


def _runtime_object(source, runtime):
    return _compile(source.stem, source.read_text(), (*_FLAGS, "-O2"), runtime)


def build(source, traced):
    """Path of the shared library of a translated module.

    `traced` compiles the calls in that counters and detectors need. Raises CompilerError.
    """
    runtime = RUNTIME
    # Under tracing nearly all time goes to the detectors: -O0 compiles four times as fast. Else
    # -Og: it compiles in less than half of -O1's time, and few kernels run longer (cross_entropy
    # 40 % longer).
    flags = (*_FLAGS, "-O0" if traced else "-Og", "-w", f"-DEMULATOR_TRACED={int(traced)}")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        kernels = pool.submit(_compile, "kernels", source, flags, runtime)
        files = sorted(runtime.glob("*.cpp"))
        objects = list(pool.map(lambda file: _runtime_object(file, runtime), files))
        objects.append(kernels.result())
    target = cache_folder() / f"library-{digest(*(o.name for o in objects))}.so"
    link = ["-shared", "-Wl,--no-undefined", "-pthread", *map(str, objects), "-lm", "-o"]
    return _produce(target, lambda output: _run_compiler([*link, str(output)]))
