"""Every kernel compiles for sm_80 and sm_90a without a warning, a spill or local memory, and with
the registers and shared memory that were committed. Attention with a bias, which is rare, may spill
some registers where heads are wide."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from . import resources

pytestmark = pytest.mark.skipif(resources.toolkit() is None, reason="nvcc is not on the PATH")


# What kernels for Hopper say they use: wgmma, TMA both ways, and the addition by the copy engine.
HOPPER = {
    "attention_hopper_forward": ("HGMMA", "UTMALDG", "UTMASTG"),
    "attention_hopper_backward": ("HGMMA", "UTMALDG", "UTMASTG", "UBLKRED", "UBLKCP"),
}


SPILLS_OF_BIAS = 64  # bytes of a thread


@pytest.fixture(scope="module", params=resources.ARCHS)
def compiled(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cubins")
    return request.param, resources.measure(request.param, folder), folder


def test_resources(compiled):
    """One test, so that processes that share the suite compile each source once."""
    arch, kernels, folder = compiled
    assert len(kernels) > 40
    for name, numbers in kernels.items():
        allowed = SPILLS_OF_BIAS if name.endswith("bias>") else 0
        assert max(numbers["spills"], numbers["stack"]) <= allowed, f"{name} on sm_{arch} spills"
    table = json.loads(resources.TABLE.read_text())
    if table["nvcc"] == resources.toolkit():
        assert kernels == table[f"sm_{arch}"], "regenerate: python -m tests.cuda.resources"
    disassembler = _nvdisasm()
    if disassembler is None:
        return  # ptxas has said the same already: no stack frame
    for cubin in folder.glob(f"*-{arch}.cubin"):
        text = subprocess.run([disassembler, "-c", cubin], capture_output=True, text=True).stdout
        assert "EXIT" in text
        for kernel, body in _sections(text):
            if not resources.readable(kernel).endswith("bias>"):
                assert " LDL" not in body and " STL" not in body, kernel
        for instruction in HOPPER.get(cubin.stem.rpartition("-")[0], ()):
            assert f" {instruction}" in text, f"{cubin.stem} has no {instruction}"


def _sections(text):
    """(mangled name, code) of each kernel of a disassembled cubin."""
    parts = text.split(".section\t.text.")[1:]
    return [(part.split(",", 1)[0], part) for part in parts if "_kernel" in part.split(",", 1)[0]]


def _nvdisasm():
    """From the toolkit, or the one that triton brings along."""
    if shutil.which("nvdisasm"):
        return shutil.which("nvdisasm")
    triton = pytest.importorskip("triton")
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return path if path.exists() else None


def test_names_are_readable():
    mangled = "_ZN6fastlm4cuda12_GLOBAL__N_124attention_forward_kernelI13__nv_bfloat16Li64EEEvNS_1X"
    assert resources.readable(mangled) == "attention_forward_kernel<bfloat16, 64>"
