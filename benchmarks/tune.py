"""`python -m benchmarks.tune --out h100.json`: block sizes of the Triton kernels, by measuring.

For rows of gpu_rows.py, each kernel's sizes are varied one at a time from its defaults on, and what
is faster is kept until nothing is. A candidate is timed only when its results are right by the rule
of the tests. Times are those of benchmarks.gpu, with the L2 cache full of
something else; candidate and best take turns. The file is used where someone calls
fastlm.kernels.tuning.use(path), on the same device with the same triton.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from fastlm.kernels import tuning
from fastlm.kernels.tuning import Blocks

from fastlm.backend import KERNELS, BackendUnavailable

from . import gpu
from .gpu_rows import GPU_ROWS
from .harness import Bench, phase_call, relative_error
from .report import write_json

_WORTH = 1.02  # times faster than the best so far: less is within the noise of a GPU's clocks


class Row:
    """One row's call, with any sizes in force: checked, timed, and asked which kernels it runs.

    Raises ArithmeticError where the defaults are less accurate than the rule allows, and
    BackendUnavailable where the backend does not take the row.
    """

    def __init__(self, bench: Bench, dtype: torch.dtype, backend: str, device: str = "cuda"):
        torch.manual_seed(0)
        op, theirs = gpu.using(backend, bench.ours), bench.baselines["torch"]
        small, self._restore_small = gpu.made(
            bench, lambda: (bench.checked or bench.inputs)(dtype), device
        )
        large, self._restore_large = gpu.made(bench, lambda: bench.inputs(dtype), device)
        wide = tuple(t.detach().double() if t.is_floating_point() else t for t in small)
        self._dtype, self._truth = dtype, phase_call(bench, theirs, wide)()
        error = relative_error(phase_call(bench, theirs, small)(), self._truth)
        self._allowed = 2 * error + 4 * torch.finfo(dtype).eps
        self._check, self._timed = (phase_call(bench, op, inputs) for inputs in (small, large))
        with tuning.trying({}) as self.defaults:
            error = self._error()
        if not error <= self._allowed:
            raise ArithmeticError(f"the defaults: error {error:.1e}, allowed {self._allowed:.1e}")

    def _error(self) -> float:
        # Freed at once: what a kernel forgets to write is then no result of the one before it.
        for t in self._truth:
            torch.full_like(t, math.nan, dtype=self._dtype)
        self._restore_small()
        return relative_error(self._check(), self._truth)

    def refusal(self, sizes: dict[str, Blocks]) -> str | None:
        """Why these sizes must not be timed; None if they may."""
        try:
            with tuning.trying(sizes):
                error = self._error()
                self._restore_large()
                self._timed()  # compiles, so that what is timed is not that
        except Exception as error:  # of any kind: registers or shared memory that there are not
            return f"{type(error).__name__}: {(str(error) or '-').splitlines()[0][:200]}"
        if not error <= self._allowed:
            return f"wrong: error {error:.1e}, allowed {self._allowed:.1e}"
        return None

    def milliseconds(self, sizes: dict[str, Blocks], timer: Callable) -> float:
        self._restore_large()
        with tuning.trying(sizes):
            return timer(self._timed)


def neighbours(sizes: Blocks) -> list[Blocks]:
    """Sizes with one of them halved or doubled; stages with one less or more."""
    found = []
    for name, size in sizes.items():
        stages = name.lower().endswith("stages")
        for other in (size - 1, size + 1) if stages else (size // 2, size * 2):
            if other > 0:
                found.append({**sizes, name: other})
    return found


def search(row: Row, key: str, found: dict, timer: Callable, rounds: int, say: Callable) -> Blocks:
    """The fastest sizes for one kernel of the row, with those in `found` for the others."""
    best = row.defaults[key]
    tried = [best]
    while True:
        faster = {}
        for sizes in neighbours(best):
            if sizes in tried:
                continue
            tried.append(sizes)
            refused = row.refusal({**found, key: sizes})
            if refused:
                say(f"    {sizes}: {refused}")
                continue
            pairs = [
                [row.milliseconds({**found, key: s}, timer) for s in (best, sizes)]
                for _ in range(rounds)
            ]
            ratio = statistics.median(old / new for old, new in pairs)
            say(f"    {sizes}: {ratio:.3f} times as fast as {best}")
            faster[ratio] = sizes
        if not faster or max(faster) < _WORTH:
            return best
        best = faster[max(faster)]


def tune(row: Row, found: dict[str, Blocks], timer: Callable, rounds: int, say: Callable) -> None:
    """Adds to `found` the sizes of the row's kernels that it has not yet."""
    for key in row.defaults:
        if key not in found:
            say(f"  {key}")
            found[key] = search(row, key, found, timer, rounds, say)


def save(path: Path, blocks: dict[str, Blocks]) -> None:
    write_json(path, {**tuning.here(), "date": time.strftime("%Y-%m-%d"), "blocks": blocks})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="written after every row")
    parser.add_argument("--op", nargs="*", default=[], help="ops by name; default: all")
    parser.add_argument("--dtype", nargs="*", default=["bfloat16"], help="default: bfloat16")
    parser.add_argument("--rounds", type=int, default=15, help="turns of candidate and best")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.tune: torch sees no CUDA device")
    flush = torch.empty(gpu.FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    found: dict[str, Blocks] = {}
    for name in options.dtype:
        for bench in GPU_ROWS:
            if options.op and bench.op not in options.op:
                continue
            for backend in (k.name for k in KERNELS[bench.op] if ".kernels." in k.module):
                print(f"{bench.op} {bench.phase} {bench.shape} {name} {backend}", flush=True)
                try:
                    row = Row(bench, getattr(torch, name), backend)
                except (ArithmeticError, BackendUnavailable, torch.OutOfMemoryError) as error:
                    print(f"  {error}")
                    continue
                tune(row, found, lambda call: gpu.milliseconds(call, flush), options.rounds, print)
                save(options.out, found)


if __name__ == "__main__":
    main()
