"""Builds fastlm._cpu, and fastlm._cuda where nvcc and a GPU are, with ninja. torch is not needed.

Each kernel file of csrc/cpu is compiled once per instruction set, into a namespace of that name;
csrc/cpu/dispatch.cpp chooses at run time. Everything about a build is in the ninja file that this
writes, so a second build compiles only what changed. FASTLM_CUDA=0 leaves CUDA out, 1 demands it
(without a GPU too: about two minutes of nvcc on two cores), auto (the default) takes it where nvcc
and a GPU are found; FASTLM_CUDA_ARCHS lists what to compile for (80 and 90a). FASTLM_SANITIZE has
GCC's sanitizers in fastlm._cpu ("address,undefined" or "thread"); tests/sanitize.py runs them.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CPU_SHARED = ("module.cpp", "dispatch.cpp", "memory.cpp")  # compiled once, for any processor
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -Wall -Wextra -Wno-psabi"
NVCC_FLAGS = "-std=c++17 -O3 -lineinfo --threads=2 -Xcompiler=-fPIC,-fvisibility=hidden,-Wall"
# GCC 12 warns of its own _mm512_undefined_* (bug 105593).
AVX512 = "-march=x86-64-v4 -mprefer-vector-width=512 -Wno-uninitialized -Wno-maybe-uninitialized"
ISAS = {
    "avx512bf16": f"{AVX512} -mavx512bf16",
    "avx512": AVX512,
    "avx2": "-march=x86-64-v3",
    "baseline": "",
}


def isas() -> dict[str, str]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return ISAS if x86 else {"baseline": ""}


def find_nvcc() -> str | None:
    """Path of nvcc, or None where CUDA is not wanted or not there."""
    wanted = os.environ.get("FASTLM_CUDA", "auto")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    if wanted == "1" and nvcc is None:
        raise SystemExit("FASTLM_CUDA=1, but nvcc is neither on PATH nor under CUDA_HOME")
    if wanted == "1":
        return nvcc
    has_gpu = any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))
    if wanted == "auto" and nvcc and not has_gpu:
        print("fastlm: no GPU here: the CUDA kernels are left out (FASTLM_CUDA=1 builds them)")
    return nvcc if wanted == "auto" and has_gpu else None


def cpu_edges(build: Path) -> tuple[list[str], list[Path]]:
    """Ninja build edges for the objects of fastlm._cpu, and those objects."""
    lines, objects = [], []

    def compile_one(source: Path, name: str, flags: str) -> None:
        target = build / f"{name}.o"
        objects.append(target)
        lines.extend([f"build {target}: cxx {source}", f"  flags = {flags}"])

    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        if source.name in CPU_SHARED:
            compile_one(source, source.stem, "")
            continue
        for isa, flags in isas().items():
            compile_one(source, f"{source.stem}-{isa}", f"-DFASTLM_ISA={isa} {flags}")
    return lines, objects


def cuda_edges(build: Path) -> tuple[list[str], list[Path]]:
    """The same for fastlm._cuda: sm_80, sm_90a and PTX of the first for what comes after. Kernels
    are compiled once, to that PTX, and assembled for each: the first half is the slow one.
    """
    archs = os.environ.get("FASTLM_CUDA_ARCHS", "80;90a").split(";")
    ptx = f"compute_{archs[0].rstrip('a')}"
    gencode = f"-gencode=arch={ptx},code=[{','.join(f'sm_{arch}' for arch in archs)},{ptx}]"
    hopper = "-gencode=arch=compute_90a,code=sm_90a"  # what other devices cannot run
    lines, objects = [], []
    for source in sorted((ROOT / "csrc" / "cuda").glob("*")):
        if source.suffix not in (".cu", ".cpp") or ("hopper" in source.name and "90a" not in archs):
            continue
        target = build / f"{source.stem}.o"
        objects.append(target)
        # attention.cu has no kernels; it chooses among those that there are.
        for_hopper = "90a" in archs and ("hopper" in source.name or source.stem == "attention")
        flags = "-x c++" if source.suffix == ".cpp" else hopper if for_hopper else gencode
        lines.extend([f"build {target}: cxx {source}", f"  flags = {flags}"])
    return lines, objects


def ninja_file(build: Path, target: Path, nvcc: str | None) -> str:
    """The build of one module, as text. nvcc compiles and links the whole of fastlm._cuda, host
    code too: it knows where the toolkit is.
    """
    includes = f"-I{sysconfig.get_path('include')} -I{pybind11_include()}"
    compiler = nvcc or os.environ.get("CXX", "g++")
    sanitize = os.environ.get("FASTLM_SANITIZE")
    checked = f" -fsanitize={sanitize} -fno-omit-frame-pointer -O1 -g1" if sanitize else ""
    flags = NVCC_FLAGS if nvcc else CXX_FLAGS + checked
    edges, objects = cuda_edges(build) if nvcc else cpu_edges(build)
    return "\n".join(
        [
            "rule cxx",
            f"  command = {compiler} {flags} {includes} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = c++ $out",
            "rule link",
            f"  command = {compiler} -shared $in -o $out"
            + (" -cudart static" if nvcc else " -fopenmp" + checked),
            "  description = link $out",
            *edges,
            f"build {target}: link {' '.join(map(str, objects))}",
            "",
        ]
    )


class BuildWithNinja(build_ext):
    """Writes one ninja file per module and runs it."""

    def build_extension(self, extension: Extension) -> None:
        name = extension.name.rsplit(".", 1)[-1]
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        # One build folder per interpreter, kept between builds so that ninja finds what it made.
        build = ROOT / "build" / f"{name}-{sysconfig.get_config_var('SOABI')}"
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        nvcc = find_nvcc() if name == "_cuda" else None
        (build / "build.ninja").write_text(ninja_file(build, target, nvcc))
        subprocess.run([ninja_command(), "-C", str(build)], check=True)


def pybind11_include() -> str:
    """Its headers; without build isolation torch's copy of them will do."""
    try:
        import pybind11
    except ImportError:
        torch = importlib.util.find_spec("torch")
        if torch is None or torch.origin is None:
            raise SystemExit("the build needs pybind11: pip install pybind11") from None
        return str(Path(torch.origin).parent / "include")
    return pybind11.get_include()


def ninja_command() -> str:
    """From its package, or from the PATH."""
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise SystemExit("the build needs ninja: pip install ninja") from None
        return found
    return str(Path(ninja.BIN_DIR) / "ninja")


extensions = [Extension("fastlm._cpu", sources=[])]
if find_nvcc():
    extensions.append(Extension("fastlm._cuda", sources=[]))

setup(
    packages=[*find_packages(include=["fastlm", "fastlm.*"]), "fastlm.data", "fastlm.kernels"],
    package_dir={"fastlm": "fastlm", "fastlm.kernels": "kernels"},
    package_data={
        "fastlm": ["py.typed", "*.pyi", "data/*.gz", "emulator/runtime/*", "emulator/cudart/*"]
    },
    ext_modules=extensions,
    cmdclass={"build_ext": BuildWithNinja},
)
