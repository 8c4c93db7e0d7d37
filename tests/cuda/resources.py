"""What ptxas says of every kernel, for sm_80 and sm_90a.

python -m tests.cuda.resources    writes resources.json anew; look at what changed in it
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastlm import emulated

ARCHS = ("80", "90a")
TABLE = Path(__file__).parent / "resources.json"
_USAGE = re.compile(
    r"Compiling entry function '(?P<name>\w+)' .*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)


def assemble(source, built, arch, output):
    """ptxas's report for one source; warnings are errors."""
    flags = ["-v", "-O3", "--generate-line-info", f"-arch=sm_{arch}"]
    command = [_ptxas(), *flags, "-o", str(output), str(built / "kernels.ptx")]
    result = subprocess.run(command, capture_output=True, text=True)
    messages = json.loads((built / "built.json").read_text())["messages"]
    # ptxas has a remark on products that wait for one another.
    if result.returncode or messages or "Potential Performance Loss" in result.stderr:
        raise RuntimeError(f"{source.name} for sm_{arch}:\n{messages}{result.stderr[-3000:]}")
    return result.stderr


def _ptxas():
    """Of the toolkit that nvcc is of."""
    nvcc = Path(shutil.which("nvcc")).resolve()
    return shutil.which("ptxas", path=nvcc.parent) or shutil.which("ptxas")


def readable(mangled):
    """A kernel's name and template arguments: layer_norm_forward_kernel<float>."""
    name = re.match(r".*\d([a-z]\w*?_kernel)", mangled)[1]
    arguments = re.search(r"_kernelI(.*?)EEv", mangled)
    if not arguments:
        return name
    types = {"f": "float", "6__half": "half", "13__nv_bfloat16": "bfloat16", "t": "u16", "j": "u32"}
    kind, _, values = arguments[1].partition("L")
    numbers = re.findall(r"i(\d+)", values)
    flag = "dropout" if "hopper" in name else "bias"
    flags = {"1": [flag]}.get("".join(re.findall(r"b([01])", values)), [])
    return f"{name}<{', '.join([types[kind], *numbers, *flags])}>"


def usage(report):
    """{kernel: its numbers} of one report."""
    found = {}
    for match in _USAGE.finditer(report):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        found[readable(match["name"])] = {
            "registers": int(match["registers"]),
            "shared": int(shared[1]) if shared else 0,
            "stack": int(match["stack"]),
            "spills": int(match["stores"]) + int(match["loads"]),
        }
    return found


def measure(arch, folder):
    """{kernel: its numbers} of all sources; their cubins stay in `folder`. setup.py's flags give
    the same, and the emulator has compiled half of it already.
    """
    builds = {s: built for s, built in emulated.cuda_builds(arch).items() if _has_kernels(built)}
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        reports = pool.map(
            lambda source: assemble(
                source, builds[source], arch, folder / f"{source.stem}-{arch}.cubin"
            ),
            builds,
        )
        return {name: numbers for report in reports for name, numbers in usage(report).items()}


def _has_kernels(built):
    return (built / "kernels.ptx").exists() and ".entry" in (built / "kernels.ptx").read_text()


def toolkit():
    """The version of nvcc whose numbers these are, or None where there is no nvcc."""
    if not shutil.which("nvcc"):
        return None
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    return re.search(r"V([\d.]+)", text)[1]


def main():
    with tempfile.TemporaryDirectory() as folder:
        table = {f"sm_{arch}": measure(arch, Path(folder)) for arch in ARCHS}
    TABLE.write_text(json.dumps({"nvcc": toolkit()} | table, indent=1, sort_keys=True) + "\n")
    print(f"wrote {TABLE}")


if __name__ == "__main__":
    sys.exit(main())
