"""What `fastlm info` prints."""

import importlib

import torch

from . import __version__
from .backend import KERNELS, names, not_installed


def info() -> str:
    """Versions, processor, devices, and per op which kernels are usable here or why not."""
    lines = [f"fastlm {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads"]
    reason = not_installed("fastlm._cpu")
    if reason is None:
        cpu = importlib.import_module("fastlm._cpu")
        lines.append(
            f"cpu: {cpu.isa()} in use; this machine runs {', '.join(cpu.available_isas())}"
        )
    else:
        lines.append(f"cpu: {reason}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            capability = "".join(map(str, torch.cuda.get_device_capability(i)))
            lines.append(f"cuda:{i}: {torch.cuda.get_device_name(i)}, sm_{capability}")
    else:
        lines.append("cuda: torch sees no CUDA device")
    for op, kernels in KERNELS.items():
        lines.append(op)
        for kernel in kernels:
            limits = " on " + kernel.on if kernel.on else ""
            dtypes = ": " + names(kernel.dtypes) if kernel.dtypes else ""
            reason = not_installed(kernel.module)
            # Until a GPU's results are in benchmarks/results.
            on_gpu = kernel.on == "cuda"
            proof = "; emulated in CI, not yet run on a GPU" if on_gpu else ""
            usable = f"no: {reason}" if reason else f"yes{limits}{dtypes}{proof}"
            lines.append(f"  {kernel.name:7}{usable}")
    return "\n".join(lines)
