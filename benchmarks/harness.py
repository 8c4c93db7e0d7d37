"""Runs declarations: checks numbers first, then times ours and the baselines interleaved, round by
round.

A bench file is a list of Bench. A kernel whose error passes the accuracy rule of the tests is
timed; another is refused. Every ratio is taken within a round and the median of the rounds is kept,
so that a machine that slows down slows both sides.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .machine import (
    clean_caches,
    default_allocator,
    name_of,
    peak_bytes,
    pooled_allocator,
    rate,
    seconds,
)

# A call that takes longer is timed once and stands for every round: torch's bfloat16 products take
# minutes where it has no kernel for the processor.
LONGEST_SECONDS = 60.0

Op = Callable[..., Tensor]


@dataclass(frozen=True)
class Bench:
    """One op in one phase at one shape.

    inputs(dtype) gives the tensors, ours and baselines take them; those of a floating dtype get
    gradients in phases with backward. work is the bytes (traffic "read", "copy", "in_place") or
    FLOPs ("gemm") one call must move or do, for an element width in bytes. goals name the least
    ratio to a baseline that is expected. checked(dtype) gives the inputs whose results are checked
    where float64 at full size takes too much memory; fresh: a call may write over its first input,
    which is put back before each.
    """

    op: str
    phase: str
    shape: str
    inputs: Callable[[torch.dtype], tuple[Tensor, ...]]
    ours: Op
    baselines: dict[str, Op]
    traffic: str
    work: Callable[[int], float]
    goals: dict[str, float] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    checked: Callable[[torch.dtype], tuple[Tensor, ...]] | None = None
    fresh: bool = False


@dataclass
class Result:
    """One row: milliseconds are medians, ratios are time(baseline) / time(ours), errors relative in
    max norm.
    """

    op: str
    phase: str
    shape: str
    dtype: str
    ours_ms: float
    floor_ms: float
    ratios: dict[str, float]
    spread: float
    error: float
    torch_error: float
    peak_mb: float
    torch_peak_mb: float
    goals: dict[str, float]

    def short_of(self) -> dict[str, float]:
        """The goals that this row misses."""
        return {
            name: goal for name, goal in self.goals.items() if self.ratios.get(name, goal) < goal
        }


def phase_call(
    bench: Bench, op: Op, inputs: tuple[Tensor, ...]
) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed: the phase of one provider, as a call without arguments."""
    if bench.phase == "forward":

        def forward():
            with torch.no_grad():
                return (op(*inputs),)

        return forward
    leaves = [t for t in inputs if t.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()
    if bench.phase == "forward+backward":
        return lambda: torch.autograd.grad(op(*inputs), leaves)
    out = op(*inputs)
    torch.manual_seed(1)
    upstream = torch.randn(out.shape, device=out.device).to(out)
    return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)


def relative_error(result: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    """The largest error of all results, each in max norm relative to its truth's scale."""
    return max(
        ((r.double() - t).abs().max() / t.abs().max().clamp_min(1e-30)).item()
        for r, t in zip(result, truth, strict=True)
    )


def errors(bench: Bench, inputs: tuple[Tensor, ...]) -> tuple[float, float]:
    """Error of ours and of the first baseline against that baseline in float64 on the same rounded
    inputs.
    """
    baseline = next(iter(bench.baselines.values()))
    wide = tuple(t.detach().double() if t.is_floating_point() else t for t in inputs)
    truth = phase_call(bench, baseline, wide)()
    ours = relative_error(phase_call(bench, bench.ours, inputs)(), truth)
    return ours, relative_error(phase_call(bench, baseline, inputs)(), truth)


def run(bench: Bench, dtype: torch.dtype, rates: dict[str, float], rounds: int) -> Result:
    """Check and time one row. Raises ArithmeticError where ours is less accurate than the rule
    allows.
    """
    torch.manual_seed(0)
    inputs = bench.inputs(dtype)
    error, torch_error = errors(bench, inputs)
    allowed = 2 * torch_error + 4 * torch.finfo(dtype).eps
    if not error <= allowed:
        raise ArithmeticError(
            f"{bench.op} {bench.phase} {name_of(dtype)}: error {error:.1e}, allowed {allowed:.1e}"
        )
    calls = {
        name: phase_call(bench, op, inputs)
        for name, op in {"ours": bench.ours, **bench.baselines}.items()
    }
    first = {}

    def call_first(name):
        first[name] = seconds(calls[name])

    named = "ours", next(iter(bench.baselines))
    peaks = [peak_bytes(lambda name=name: call_first(name)) / 1e6 for name in named]
    times = interleave(calls, rounds, first)
    ours = times.pop("ours")
    ratios = {
        name: statistics.median(t / o for t, o in zip(ts, ours, strict=True))
        for name, ts in times.items()
    }
    kind = f"gemm {name_of(dtype)}" if bench.traffic == "gemm" else bench.traffic
    rates[kind] = max(rates[kind], rate(kind))  # a machine that others use has slower moments
    quartiles = statistics.quantiles(ours, n=4)
    return Result(
        bench.op, bench.phase, bench.shape, name_of(dtype), 1e3 * statistics.median(ours),
        1e-6 * bench.work(dtype.itemsize) / rates[kind], ratios,
        (quartiles[2] - quartiles[0]) / quartiles[1],
        error, torch_error, *peaks, bench.goals,
    )  # fmt: skip


def interleave(
    calls: dict[str, Callable], rounds: int, first: dict[str, float]
) -> dict[str, list[float]]:
    """Seconds of every call in every round; baselines also with a pooled allocator, as "<name>,
    pooled". `first` holds those of the calls that were made before. Of one that is slow it is all
    there is, as page faults are nothing beside it.
    """
    times: dict[str, list[float]] = {}
    default_allocator()
    for name, call in calls.items():
        if name not in first:
            first[name] = seconds(call)  # compiles, and fills the pool
    slow = {name: [first[name]] * rounds for name in calls if first[name] > LONGEST_SECONDS}
    names = [name for name in calls if name not in slow]
    for turn in range(rounds if names else 0):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            clean_caches()
            times.setdefault(name, []).append(seconds(calls[name]))
        with pooled_allocator():
            for name in names:
                if name == "ours":
                    continue
                calls[name]()  # faults the pages in that the timed call then finds
                clean_caches()
                times.setdefault(f"{name}, pooled", []).append(seconds(calls[name]))
    return times | slow
