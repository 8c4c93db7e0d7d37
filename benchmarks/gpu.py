"""`python -m benchmarks.gpu --out out/gpu`: the rows of gpu_rows.py on a CUDA device.

Every kernel for a GPU beside torch, torch.compile, each SDPA backend by name and Liger where it is
installed. Numbers are checked first, as on the CPU. A call is timed by CUDA events with the
L2 cache full of something else; providers are interleaved and ratios taken within a round. Copy
bandwidth and GEMM rate are measured in the same run. Results are written after every row.

All rows come in bfloat16 first. Only there does torch.compile take part, which compiles for seconds
a row, and not for attention, where it calls what SDPA calls.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastlm
from fastlm.backend import KERNELS

from .gpu_rows import GPU_ROWS
from .harness import Bench, phase_call, relative_error
from .report import write_json
from .rows import compiled

FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SDPA = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")


def milliseconds(call, flush: torch.Tensor) -> float:
    """GPU time of one call; the flush before it hides what launching costs the CPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def host_microseconds(call) -> float:
    """What launching a call costs the CPU, its results' memory included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e5 * elapsed


def rates(flush: torch.Tensor) -> dict[str, float]:
    """GB/s of a copy (read and written), TFLOP/s of an 8192^3 product."""
    source = torch.randn(1 << 28, device="cuda")
    target, a = torch.empty_like(source), torch.randn(8192, 8192, device="cuda").bfloat16()

    def best(call):
        return min(milliseconds(call, flush) for _ in range(10))

    return {
        "copy GB/s": 2 * source.nbytes / best(lambda: target.copy_(source)) / 1e6,
        "gemm bfloat16 TFLOP/s": 2 * 8192**3 / best(lambda: a @ a) / 1e9,
    }


def using(name: str, op):
    def call(*inputs):
        with fastlm.use(name):
            return op(*inputs)

    return call


def _sdpa_on(name: str, op):
    def call(*inputs):
        with sdpa_kernel(getattr(SDPBackend, name)):
            return op(*inputs)

    return call


def _liger(op: str):
    """Liger's function for an op, or None."""
    try:
        from liger_kernel.transformers import functional
    except ImportError:
        return None
    return {
        "layer_norm": lambda x, w, b: functional.liger_layer_norm(x, w, b, 1e-5),
        "rms_norm": lambda x, w: functional.liger_rms_norm(x, w, torch.finfo(x.dtype).eps),
        "cross_entropy": functional.liger_cross_entropy,
    }.get(op)


def providers(bench: Bench, dtype: torch.dtype) -> dict:
    """What is timed for a row, by name; torch, the first, is the baseline of the ratios."""
    found = dict(bench.baselines)
    theirs = found["torch"]
    if dtype != torch.bfloat16:
        found.pop("torch.compile", None)
    elif not bench.op.startswith("attention"):
        found.setdefault("torch.compile", lambda *inputs: compiled(theirs)(*inputs))
    if bench.op.startswith("attention"):
        found |= {f"SDPA {name}": _sdpa_on(name, theirs) for name in _SDPA}
    if _liger(bench.op):
        found["Liger"] = _liger(bench.op)
    names = [k.name for k in KERNELS[bench.op] if k.on == "cuda"]
    return found | {f"fastlm {name}": using(name, bench.ours) for name in names}


def made(bench: Bench, inputs, device: str):
    """(inputs, what puts the first of them back where a call may have written over it)"""
    with torch.device(device):
        given = inputs()
    if not bench.fresh:
        return given, lambda: None
    kept = given[0].clone()
    return given, lambda: given[0].data.copy_(kept)


def checked(bench: Bench, dtype: torch.dtype, device: str) -> tuple[dict, dict]:
    """Errors by provider, and why each of the others cannot be timed."""
    inputs, restore = made(bench, lambda: (bench.checked or bench.inputs)(dtype), device)
    wide = tuple(t.detach().double() if t.is_floating_point() else t for t in inputs)
    truth = phase_call(bench, bench.baselines["torch"], wide)()
    errors: dict[str, float] = {}
    skipped: dict[str, str] = {}
    for name, op in providers(bench, dtype).items():
        restore()
        try:
            errors[name] = relative_error(phase_call(bench, op, inputs)(), truth)
        except Exception as error:  # of any kind: one provider must not end the run
            skipped[name] = f"{type(error).__name__}: {(str(error) or '-').splitlines()[0][:200]}"
            continue
        allowed = 2 * errors["torch"] + 4 * torch.finfo(dtype).eps
        if name.startswith("fastlm") and not errors[name] <= allowed:
            skipped[name] = f"wrong: error {errors[name]:.1e}, allowed {allowed:.1e}"
    return errors, skipped


def run(
    bench: Bench, dtype: torch.dtype, rounds: int, flush: torch.Tensor, device: str = "cuda"
) -> dict:
    """One row: milliseconds and ratios by provider, and why each of the others did not run."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # or its limit of recompilations would make the baseline eager
    errors, skipped = checked(bench, dtype, device)
    inputs, restore = made(bench, lambda: bench.inputs(dtype), device)
    calls = {
        name: phase_call(bench, op, inputs)
        for name, op in providers(bench, dtype).items()
        if name not in skipped
    }
    host, times = {}, {}
    for name, call in calls.items():
        restore()
        call()  # compiles
        host[name], times[name] = host_microseconds(call), []
    for _ in range(rounds):
        for name, call in calls.items():
            restore()
            times[name].append(milliseconds(call, flush))
    ratios = {
        name: statistics.median(t / o for t, o in zip(times["torch"], ts, strict=True))
        for name, ts in times.items()
    }
    medians = {name: statistics.median(ts) for name, ts in times.items()}
    work = bench.work(dtype.itemsize)
    return {
        "op": bench.op, "phase": bench.phase, "shape": bench.shape,
        "dtype": str(dtype).removeprefix("torch."), "milliseconds": medians,
        "host microseconds": host, "times faster than torch": ratios,
        "errors": errors, "skipped": skipped,
        "work per ms": {name: work / ms for name, ms in medians.items()},
        "unit": "FLOP" if bench.traffic == "gemm" else "bytes",
    }  # fmt: skip


def markdown(rows: list[dict], environment: dict, measured: dict) -> str:
    lines = [f"{environment}", "", f"measured in this run: {measured}", ""]
    lines += ["| op | dtype | provider | ms | of floor | x torch | host us |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        bandwidth = row["unit"] == "bytes"
        floor = (
            measured["copy GB/s"] * 1e6 if bandwidth else 1e9 * measured["gemm bfloat16 TFLOP/s"]
        )
        op = f"{row['op']} {row['phase']} {row['shape']}"
        for name, ms in row["milliseconds"].items():
            share, ratio = row["work per ms"][name] / floor, row["times faster than torch"][name]
            lines.append(
                f"| {op} | {row['dtype']} | {name} | {ms:.4f} | {share:.0%} | {ratio:.2f} "
                f"| {row['host microseconds'][name]:.0f} |"
            )
        lines += [
            f"| {op} | {row['dtype']} | {name}: {why} | | | | |"
            for name, why in row["skipped"].items()
        ]
    return "\n".join(lines) + "\n"


def failed(bench: Bench, dtype: torch.dtype, error: Exception) -> dict:
    """The row of a shape that could not be run at all, for want of memory for instance."""
    return {
        "op": bench.op, "phase": bench.phase, "shape": bench.shape,
        "dtype": str(dtype).removeprefix("torch."), "milliseconds": {}, "unit": "bytes",
        "skipped": {"all": f"{type(error).__name__}: {str(error)[:200]}".replace("\n", " ")},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=180, help="no row is begun after that")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: torch sees no CUDA device")
    start, flush = time.perf_counter(), torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    environment = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        "fastlm": fastlm.__version__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    measured, rows = rates(flush), []
    for dtype in _DTYPES:
        for bench in GPU_ROWS:
            if time.perf_counter() - start > options.seconds:
                break
            try:
                rows.append(run(bench, dtype, options.rounds, flush))
            except Exception as error:  # of any kind: the other rows are worth having
                rows.append(failed(bench, dtype, error))
            torch.cuda.empty_cache()
            write(options.out, rows, environment, measured)
    print((options.out / "benchmarks.md").read_text())


def write(out: Path, rows: list[dict], environment: dict, measured: dict) -> None:
    content = {"environment": environment, "rates": measured, "results": rows}
    write_json(out / "benchmarks.json", content)
    (out / "benchmarks.md").write_text(markdown(rows, environment, measured))


if __name__ == "__main__":
    main()
