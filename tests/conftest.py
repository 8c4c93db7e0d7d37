"""What every test file shares: the backends, fixed seeds, and settings that are put back."""

import contextlib
import datetime
import os

import numpy as np
import pytest
import torch

import fastlm
from fastlm import _cpu
from fastlm.backend import KERNELS

_KERNELS = {kernel.name: kernel for kernels in KERNELS.values() for kernel in kernels}
CPP = [f"cpp-{isa}" for isa in _cpu.available_isas()]
GPU = [name for name in _KERNELS if name in ("cuda", "triton")]


def fuzz_seed() -> int:
    """A new one each day, unless FASTLM_FUZZ_SEED says which."""
    today = datetime.date.today().strftime("%Y%m%d")
    return int(os.environ.get("FASTLM_FUZZ_SEED", today))


def pytest_report_header():
    return f"fuzzer: FASTLM_FUZZ_SEED={fuzz_seed()}"


WORDS = ["alpha ", "beta ", "gamma ", "delta ", "the end.\n"]


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """30 kB in three files, of words in random order: what can be learnt is how words are spelt."""
    folder = tmp_path_factory.mktemp("text")
    random = np.random.default_rng(0)
    for number in range(3):
        words = random.choice(WORDS, 1500)
        (folder / f"{number}.txt").write_text("".join(words), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(params=[*CPP, *GPU, "torch"])
def backend(request):
    """Each backend of the table in turn; cpp once for each instruction set of this machine."""
    with backend_in_force(request.param) as name:
        yield name


@pytest.fixture(params=CPP)
def cpp(request):
    """The CPU kernels in every instruction set of this machine."""
    with backend_in_force(request.param) as name:
        yield name


@pytest.fixture(params=GPU)
def gpu(request):
    """The CUDA and Triton kernels."""
    with backend_in_force(request.param) as name:
        yield name


@pytest.fixture
def gluon():
    """The kernel in Gluon, which only attention has, for some calls."""
    with backend_in_force("gluon") as name:
        yield name


@contextlib.contextmanager
def backend_in_force(name_and_isa):
    """Kernels of a GPU run on the GPU where there is one, and in the emulator elsewhere."""
    name, _, isa = name_and_isa.partition("-")
    kernel = _KERNELS[name]
    on_gpu = kernel.on == "cuda" and torch.cuda.is_available()
    emulated = kernel.on == "cuda" and not on_gpu
    device = torch.device("cuda" if on_gpu else "cpu")
    before = _cpu.isa()
    _cpu.set_isa(isa or before)
    placed = device if on_gpu else contextlib.nullcontext()
    with fastlm.use(f"emulated:{name}" if emulated else name), placed:
        dtype = kernel.dtypes[0] if kernel.dtypes else None
        reason = kernel.why_not(torch.empty(1, dtype=dtype, device=device), None, emulated)
        if reason:
            pytest.skip(f"{name}: {reason}")
        try:
            yield name
        finally:
            _cpu.set_isa(before)


@pytest.fixture
def poisoned(monkeypatch):
    """Every fresh tensor is full of NaN: what a kernel forgets cannot pass for a result."""
    monkeypatch.setattr(fastlm.memory, "_POOLED_BYTES", 2**62)  # the pool does not poison
    torch.use_deterministic_algorithms(True)  # also what makes torch.empty fill its memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """torch.set_num_threads, put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
