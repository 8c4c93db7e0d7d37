"""What rows are held against: the bandwidths and the GEMM rate of the same run, the allocator, and
the environment.
"""

import contextlib
import ctypes
import functools
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import fastlm
from fastlm import _cpu, memory

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_GLIBC_LARGEST_MMAP_THRESHOLD = (
    32 << 20
)  # where glibc's own adaptation stops, and freed memory leaves the process


def _mallopt(mmap_threshold: int, trim_threshold: int) -> None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        raise RuntimeError("the pooled allocator of the benchmarks needs glibc's mallopt")
    libc.mallopt(_M_MMAP_THRESHOLD, mmap_threshold)
    libc.mallopt(_M_TRIM_THRESHOLD, trim_threshold)
    libc.malloc_trim(0)


@contextlib.contextmanager
def pooled_allocator() -> Iterator[None]:
    """torch with an allocator that keeps what is freed, so that large results pay no page
    faults.
    """
    _mallopt(2**31 - 1, 2**31 - 1)
    try:
        yield
    finally:
        default_allocator()


def default_allocator() -> None:
    """glibc as torch finds it: blocks over 32 MB go back to the system when they are freed."""
    _mallopt(_GLIBC_LARGEST_MMAP_THRESHOLD, 2 * _GLIBC_LARGEST_MMAP_THRESHOLD)


def seconds(call: Callable[[], object]) -> float:
    """One call. What it returns is freed inside the timed region: giving memory back costs time
    too.
    """
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def best(call: Callable[[], object], repeats: int = 9) -> float:
    """The least of some calls, of fewer where they take long."""
    found = [seconds(call)]
    while len(found) < repeats and sum(found) < 10:
        found.append(seconds(call))
    return min(found)


@functools.cache
def _scrubber() -> torch.Tensor:
    return torch.zeros(32 << 20)  # 128 MB, several times the last cache


def clean_caches() -> None:
    """Leave nothing of a call before, above all no dirty lines: writing those back is its cost."""
    _cpu.traffic("read", _scrubber(), _scrubber(), torch.get_num_threads())


_PASSES = {"read": 1, "copy": 2, "in_place": 2}


@functools.cache
def _traffic_buffers() -> tuple[torch.Tensor, torch.Tensor]:
    cpu = torch.device("cpu")
    source, target = (memory.empty((50_000_000,), torch.float32, cpu).zero_() for _ in range(2))
    return source, target


def rate(kind: str) -> float:
    """GB/s of "read", "copy" (past the caches) or "in_place" traffic, or GFLOP/s of a 2048^3 torch
    matmul in the dtype of "gemm <dtype>" or in float32, to which one can always widen: where torch
    has no kernel for a dtype its rate is no floor.
    """
    if kind in _PASSES:
        source, target = _traffic_buffers()
        threads = torch.get_num_threads()
        elapsed = best(lambda: _cpu.traffic(kind, target, source, threads))
        return _PASSES[kind] * source.nbytes / elapsed / 1e9
    dtypes = {torch.float32, getattr(torch, kind.removeprefix("gemm "))}
    matrices = [torch.randn(2048, 2048).to(dtype) for dtype in dtypes]
    return max(2 * 2048**3 / best(lambda a=a: a @ a) / 1e9 for a in matrices)


def denominators(dtypes: tuple[torch.dtype, ...]) -> dict[str, float]:
    """Every rate that rows of these dtypes are held against."""
    return {kind: rate(kind) for kind in (*_PASSES, *(f"gemm {name_of(d)}" for d in dtypes))}


def peak_bytes(call: Callable[[], object]) -> int:
    """How far one call raises the process's resident memory, fresh memory only."""
    memory.empty_cache()
    default_allocator()
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak

    def read(field: str) -> int:
        line = next(s for s in status.read_text().splitlines() if s.startswith(field))
        return int(line.split()[1]) * 1024

    before = read("VmRSS")
    call()
    return max(0, read("VmHWM") - before)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [s for s in cpuinfo.read_text().splitlines() if s.startswith("model name")]
        if names:
            return names[0].split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def environment() -> dict[str, str]:
    """What a reader needs to judge or repeat a run."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "isa": _cpu.isa(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastlm": fastlm.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "command": "python -m benchmarks " + " ".join(sys.argv[1:]),
    }
