"""The CPU kernels under GCC's sanitizers: python tests/sanitize.py [address,undefined] [thread]

Builds a copy of the tree for this machine's best instruction set and runs in it the ops' tests and
some of the fuzzer's calls. A report of a sanitizer ends the run and is printed; the exit status is
then 1.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tree_copy import TreeCopy

TESTS = (
    "add_layer_norm", "attention", "attention_with_kvcache", "cross_entropy", "dropout", "gelu",
    "layer_norm", "linear", "linear_cross_entropy", "linear_cross_entropy_tiles", "memory",
    "rms_norm", "special_values",
)  # fmt: skip
# Compilers bring processes and code that is not ours; emulated kernels run none of it.
SELECTION = "not opcheck and not compiled and not cuda and not triton and not torch"
# torch and Python keep what they allocate, and libraries are built without a sanitizer.
OPTIONS = {
    "address,undefined": {
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:alloc_dealloc_mismatch=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    },
    "thread": {"TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1"},
}
LIBRARIES = {"address,undefined": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
CASES = {"address,undefined": 1000, "thread": 300}


def library(name: str) -> str:
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True)
    return found.stdout.strip()


def check(sanitizer: str) -> bool:
    """Whether nothing was reported."""
    start = time.monotonic()
    preload = {"LD_PRELOAD": " ".join(map(library, LIBRARIES[sanitizer])), **OPTIONS[sanitizer]}
    with tempfile.TemporaryDirectory() as folder:
        tree = TreeCopy(Path(folder), FASTLM_SANITIZE=sanitizer)
        tree.build()
        tree.check_it_is_imported(**preload)
        files = [f"tests/test_{name}.py" for name in TESTS]
        fuzzer = ("tests/fuzz.py", "--backend", f"cpp-{tree.isa}", "--cases", str(CASES[sanitizer]))
        for command in (("-m", "pytest", "-x", "-q", "-k", SELECTION, *files), fuzzer):
            found = tree.run(*command, OMP_NUM_THREADS="2", **preload)
            last = (found.stdout.strip().splitlines() or [""])[-1]
            seconds = time.monotonic() - start
            print(f"{sanitizer}, {command[-1]}: {last} ({seconds:.0f} s)", flush=True)
            if found.returncode:
                print(found.stdout[-3000:], found.stderr[:6000])
                return False
    return True


def main() -> int:
    failed = sum(not check(sanitizer) for sanitizer in sys.argv[1:] or OPTIONS)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
