"""What each kernel costs on a GPU, found without one: compiled ahead of time to a cubin.

    python tests/triton_kernels/resources.py     # writes resources.csv beside this file

Registers of a thread, bytes of shared memory of a block, and bytes that were spilled.
"""

import csv
import functools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from launches import CALLS, Launch, arches_of, recorded

from fastlm.emulator.triton_launcher import TritonLauncher

TABLE = Path(__file__).with_suffix(".csv")
DTYPE = torch.bfloat16
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@functools.cache
def launches(call: str) -> list[Launch]:
    return recorded(CALLS[call], DTYPE)


def compiled(launch: Launch, arch: int):
    """Triton's CompiledKernel."""
    return TritonLauncher(launch.kernel, arch=arch).compiled(*launch.arguments, **launch.constexprs)


def _dumped(kernel, tool: str, *flags: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(_TOOLS / tool), *flags, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(kernel) -> dict[str, int]:
    text = _dumped(kernel, "cuobjdump", "-res-usage")
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    spilled = found["STACK"] + found["LOCAL"]
    return {"registers": found["REG"], "shared": kernel.metadata.shared, "spilled": spilled}


def sass(kernel) -> str:
    """The instructions that the GPU would run."""
    return _dumped(kernel, "nvdisasm", "-c")


def rows(call: str, arch: int):
    """The table's rows of one call."""
    for launch in launches(call):
        found = resources(compiled(launch, arch))
        yield {"call": call, "kernel": launch.kernel.__name__, "arch": f"sm_{arch}", **found}


def main() -> None:
    table = [row for call in CALLS for arch in arches_of(call) for row in rows(call, arch)]
    with TABLE.open("w", newline="") as file:
        file.write(f"# triton {triton.__version__}, bfloat16; written by {Path(__file__).name}\n")
        writer = csv.DictWriter(file, table[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    print(TABLE.read_text())
    sys.exit(any(row["spilled"] for row in table))


if __name__ == "__main__":
    main()
