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

ARCHS = ("80", "90a")
TABLE = Path(__file__).parent / "resources.json"
SOURCES = sorted((Path(__file__).parents[2] / "csrc" / "cuda").glob("*.cu"))
_USAGE = re.compile(
    r"Compiling entry function '(?P<name>\w+)' .*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)


def compile_for(source, arch, output):
    """ptxas's report for one source; warnings are errors."""
    flags = ["-std=c++17", "-O3", "-lineinfo", "-Werror", "all-warnings", "-Xptxas", "-v"]
    target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-cubin"]
    command = ["nvcc", *flags, *target, "-o", str(output), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{source.name} for sm_{arch}:\n{result.stderr[-3000:]}")
    if "Potential Performance Loss" in result.stderr:  # products that wait for one another
        raise RuntimeError(f"{source.name} for sm_{arch}:\n{result.stderr[-3000:]}")
    return result.stderr


def readable(mangled):
    """A kernel's name and template arguments: layer_norm_forward_kernel<float>."""
    name = re.match(r".*\d([a-z]\w*?_kernel)", mangled)[1]
    arguments = re.search(r"_kernelI(.*?)EEv", mangled)
    if not arguments:
        return name
    types = {"f": "float", "6__half": "half", "13__nv_bfloat16": "bfloat16", "t": "u16", "j": "u32"}
    kind, _, values = arguments[1].partition("L")
    numbers = re.findall(r"i(\d+)", values)
    flags = {"1": ["dropout"]}.get("".join(re.findall(r"b([01])", values)), [])
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
    """{kernel: its numbers} of all sources; their cubins stay in `folder`."""
    sources = [source for source in SOURCES if arch == "90a" or "hopper" not in source.name]
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        outputs = [folder / f"{source.stem}-{arch}.cubin" for source in sources]
        reports = pool.map(compile_for, sources, [arch] * len(sources), outputs)
        return {name: numbers for report in reports for name, numbers in usage(report).items()}


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
