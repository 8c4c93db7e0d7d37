"""The backends "emulated:cuda" and "emulated:triton": kernels of a GPU on CPU tensors, run
instruction by instruction by fastlm.emulator."""

import functools
import importlib
from pathlib import Path
from types import ModuleType

import torch

from . import emulator
from .backend import CUDA_SOURCES


@functools.cache
def module_of(base: str, module: str) -> ModuleType:
    """The module of a "cuda" or "triton" kernel with its launches in the emulator."""
    if base == "cuda":
        return cuda()
    launch = importlib.import_module("fastlm.kernels.launch")
    launch.emulate = emulator.triton_launcher  # type: ignore[attr-defined]
    return importlib.import_module(module)


def cuda_sources() -> list[Path]:
    """The files that fastlm._cuda is built from."""
    return [file for file in CUDA_SOURCES.glob("cuda/*") if file.suffix in (".cu", ".cpp")]


def cuda(sources: list[Path] | None = None) -> ModuleType:
    """fastlm._cuda, built from its sources or from others, with its kernels in the emulator."""
    return emulator.extension(
        sources or cuda_sources(),
        name="_cuda",
        # torch has pybind11's headers.
        include=[CUDA_SOURCES, Path(torch.__file__).parent / "include"],
        flags=["-DFASTLM_DEVICE_TYPE=fastlm::dlpack::kCpu"],
    )
