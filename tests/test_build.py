"""What the build promises: no torch in the C++, one OpenMP, nothing that starts CUDA or Triton; and
of fastlm._cuda, where it is built (FASTLM_CUDA=1), that it holds its targets and never guesses."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlm import backend

ROOT = Path(__file__).parent.parent
SOURCES = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_no_torch_header():
    """One build serves every torch, and needs none."""
    included = {
        (path.name, name)
        for path in SOURCES
        for name in re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text())
    }
    assert len(included) > 20
    assert not [pair for pair in included if re.search(r"torch|ATen|c10", pair[1])]


def test_setup_does_not_import_torch():
    names = set()
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    assert "setuptools" in names and "torch" not in names


def test_the_module_imports_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None; import importlib.util as u, glob;"
        "spec = u.spec_from_file_location('_cpu', sys.argv[1]); m = u.module_from_spec(spec);"
        "spec.loader.exec_module(m); print(m.isa() in m.available_isas())"
    )
    from fastlm import _cpu

    found = subprocess.run(
        [sys.executable, "-c", code, _cpu.__file__], capture_output=True, text=True
    )
    assert found.stdout.strip() == "True", found.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process map, which is Linux's")
def test_one_openmp_in_the_process():
    """Two would be two teams of threads, and torch.set_num_threads would reach one of them."""
    code = (
        "import fastlm, torch; torch.rand(9999, 99).sum(); fastlm.ops.gelu(torch.rand(999, 999));"
        "print('\\\\n'.join({l.split()[-1] for l in open('/proc/self/maps') if 'omp' in l}))"
    )
    libraries = [name for name in run_python(code).split() if re.search(r"lib[gi]?omp", name)]
    assert len({Path(name).resolve() for name in libraries}) == 1, libraries


def test_import_starts_neither_cuda_nor_triton():
    code = (
        "import sys, fastlm, fastlm.models, torch;"
        "print(torch.cuda.is_initialized(), 'triton' in sys.modules)"
    )
    assert run_python(code).strip() == "False False"


def test_kernels_offer_nothing_under_another_name():
    """PyPI has a package called kernels, and a clone's folder must not pass for it."""
    found = subprocess.run(
        [sys.executable, "-c", "import kernels; kernels.get_kernel"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 1 and "use fastlm.kernels" in found.stderr


# ---- CUDA ----


@pytest.mark.parametrize("wanted, status", [("1", 1), ("auto", 0), ("0", 0)])
def test_build_without_nvcc(wanted, status, tmp_path):
    """Only who asks for CUDA is told that there is no compiler for it."""
    (tmp_path / "setup.py").write_text((ROOT / "setup.py").read_text())
    (tmp_path / "fastlm").mkdir()
    nothing = {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path), "FASTLM_CUDA": wanted}
    found = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=tmp_path, env=os.environ | nothing, capture_output=True, text=True,
    )  # fmt: skip
    told = "FASTLM_CUDA=1, but nvcc is neither on PATH nor under CUDA_HOME" in found.stderr
    assert (found.returncode, told) == (status, bool(status)), found.stderr


@pytest.fixture
def built():
    reason = backend.not_installed("fastlm._cuda")
    if reason:
        pytest.skip(reason)
    from fastlm import _cuda

    return _cuda


def test_cuda_module_holds_every_target(built):
    triton = pytest.importorskip("triton", reason="its wheel brings cuobjdump")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listed = subprocess.run(
        [tool, "--list-elf", "--list-ptx", built.__file__],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    kernels = len(list((ROOT / "csrc" / "cuda").glob("*.cu")))
    for target in (r"sm_80\.cubin", r"sm_90a?\.cubin", r"sm_80\.ptx"):  # CUDA 12 has no 90a here
        assert len(re.findall(target, listed)) == kernels, target


ALONE = """import importlib.util, sys, types
spec = importlib.util.spec_from_file_location("_cuda", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
if sys.argv[2] == "call":
    x = types.SimpleNamespace(dtype="torch.float32", shape=(0, 8), stride=lambda: (8, 1))
    x.device, x.data_ptr = types.SimpleNamespace(type="cuda", index=0), lambda: 0
    try:
        module.gelu_forward(x, x, None, False, 0)
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the loader that tells is glibc's")
@pytest.mark.parametrize("way", ["import", "call"])
def test_cuda_module_looks_for_the_driver_only_when_it_is_called(built, way):
    """The runtime is in the module and loads libcuda.so at its first call; torch is not there."""
    found = subprocess.run(
        [sys.executable, "-c", ALONE, built.__file__, way],
        env=os.environ | {"LD_DEBUG": "libs"}, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-500:]
    assert ("libcuda.so" in found.stderr) == (way == "call")


class OnNoDevice:
    """What is read of a tensor, of one on a GPU that is not there."""

    dtype, device, shape = torch.float32, torch.device("cuda", 0), (4, 8)

    def stride(self):
        return (8, 1)

    def data_ptr(self):
        return 4096


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_call_without_a_driver_is_an_error(built):
    x = OnNoDevice()
    with pytest.raises(RuntimeError, match=r"^cudaGetDevice: .*(driver|no CUDA-capable device)"):
        built.gelu_forward(x, x, None, False, 0)
    with pytest.raises(ValueError, match=r"a tensor on this module's device, got .* cpu"):
        built.gelu_forward(torch.zeros(4, 8), torch.zeros(4, 8), None, False, 0)


# ---- instruction sets ----


def objects_of_one_isa() -> list[Path]:
    return sorted((ROOT / "build").glob("_cpu-*/*-*.o"))


@pytest.mark.skipif(not objects_of_one_isa(), reason="no objects: installed from elsewhere")
def test_instruction_sets_share_no_inline_function():
    """The linker keeps one copy of a weak function. Were it the AVX-512 one, others would stop."""
    shared = []
    for path in objects_of_one_isa():
        isa = path.stem.rsplit("-", 1)[1]
        symbols = subprocess.run(
            ["nm", "--demangle", "--defined-only", path], capture_output=True, text=True, check=True
        ).stdout
        for line in symbols.splitlines():
            _, kind, name = line.split(maxsplit=2)
            if kind == "W" and f"fastlm::cpu::{isa}::" not in name:
                shared.append(f"{path.name}: {name}")
    assert not shared, "\n".join(shared)
