"""The backends "emulated:cuda", "emulated:cuda:90a", "emulated:triton" and "emulated:gluon":
kernels of a GPU on CPU tensors, run instruction by instruction by fastlm.emulator. cuda is a device
of compute capability 8.0, cuda:90a one of 9.0, for which there are kernels of its own."""

import functools
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import emulator
from .backend import CUDA_SOURCES


@functools.cache
def module_of(base: str, module: str, arch: str) -> ModuleType:
    """The module of a "cuda" or "triton" kernel with its launches in the emulator."""
    if base == "cuda":
        return cuda(arch=arch or "80")
    launch = importlib.import_module("fastlm.kernels.launch")
    launch.emulate = emulator.triton_launcher  # type: ignore[attr-defined]
    return importlib.import_module(module)


_FOR_HOPPER = ("attention", "attention_hopper_forward", "attention_hopper_backward")


def cuda_sources(arch: str = "80") -> list[Path]:
    """The files that fastlm._cuda is built from for one compute capability."""
    files = [file for file in CUDA_SOURCES.glob("cuda/*") if file.suffix in (".cu", ".cpp")]
    return [file for file in files if arch == "90a" or "hopper" not in file.name]


def cuda(sources: list[Path] | None = None, arch: str = "80") -> ModuleType:
    """fastlm._cuda, built from its sources or from others, with its kernels in the emulator."""
    sources = sources or cuda_sources(arch)
    return emulator.extension(sources, name="_cuda", **_how(sources, arch))


def cuda_builds(arch: str = "80") -> dict[Path, Path]:
    """Of each source the folder with its kernels.ptx, compiled once for that module too."""
    sources = cuda_sources(arch)
    return emulator.compile_sources(sources, **_how(sources, arch))


def _how(sources: list[Path], arch: str) -> dict[str, Any]:
    return {
        # torch has pybind11's headers.
        "include": [CUDA_SOURCES, Path(torch.__file__).parent / "include"],
        "flags": ["-DFASTLM_DEVICE_TYPE=fastlm::dlpack::kCpu"],
        "arch": arch,
        # The kernels of every device are compiled once for all.
        "arch_of": {file: "80" for file in sources if file.stem not in _FOR_HOPPER},
    }
