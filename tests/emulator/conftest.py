"""Fixtures of the emulator's tests: kernels of this folder, compiled once for each architecture."""

import pathlib
import shutil

import pytest

from fastlm import emulator

KERNELS = pathlib.Path(__file__).parent / "kernels"


@pytest.fixture
def cuda():
    """cuda("faults", arch=80, **options): the module of tests/emulator/kernels/faults.cu."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed: kernels in CUDA C++ cannot be compiled")

    def load(name, arch=80, **options):
        return emulator.load(KERNELS / f"{name}.cu", arch=arch, **options)

    return load
