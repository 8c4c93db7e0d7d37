"""Planted faults, what must be said about each, and by which detector."""

from dataclasses import dataclass, field

import torch

from fastlm import emulator

from .test_fused_kernels import run_attention, run_cross_entropy, run_layer_norm
from .test_hopper import run_gemm

RACES, UNINITIALIZED = {"races": True}, {"uninitialized": True}


@dataclass
class Fault:
    """`launch(cuda, **options)` runs a kernel that has the fault.

    found: a pattern that the KernelError must match under `options`; None where the kernel is
        correct and must pass
    """

    name: str
    launch: object
    found: str | None
    options: dict = field(default_factory=dict)


def _floats(n):
    return torch.arange(n, dtype=torch.float32)


def _small(kernel, launch, *arguments):
    """A kernel of faults.cu; arguments are made anew for each run."""
    return lambda cuda, **options: cuda("faults", **options)[kernel][launch](
        *(a() if callable(a) else a for a in arguments)
    )


def _ints(n=1):
    return lambda: torch.zeros(n, dtype=torch.int32)


def _layer_norm(kernel):
    return lambda cuda, **options: run_layer_norm(cuda("layer_norm", **options), kernel)


def _weight_gradient(kernel):
    def launch(cuda, **options):
        x, sums = torch.ones(3, 100), [torch.zeros(100) for _ in range(2)]
        cuda("layer_norm", **options)[kernel][3, 128](x, x.clone(), *sums, 100)

    return launch


def _cross_entropy(kernel):
    return lambda cuda, **options: run_cross_entropy(cuda("cross_entropy", **options), kernel)


def _attention(kernel):
    return lambda cuda, **options: run_attention(cuda("attention", **options), kernel, 1, 200)


def _gemm(kernel):
    return lambda cuda, **options: run_gemm(cuda, kernel, **options)


def _x(n):
    return lambda: _floats(n)


def _unwritten(n):
    return lambda: emulator.unwritten(torch.empty(n))


FAULTS = [
    # barriers and collectives
    Fault(
        "barrier in a branch of one warp",
        _small("divergent_barrier", (1, 64), _x(64)),
        "not every thread",
    ),
    Fault(
        "barrier that one warp skips",
        _small("barrier_not_reached", (1, 64), _x(64)),
        "not every thread",
    ),
    Fault(
        "lanes exit before a shuffle",
        _small("early_exit", (1, 32), _x(32), 20),
        "have exited|exits while",
    ),
    Fault(
        "shuffle in a divergent branch",
        _small("divergent_shuffle", (1, 32), _x(32)),
        "diverged warp",
    ),
    # memory
    Fault("misaligned float4", _small("misaligned", (1, 1), _x(8)), "misaligned access: 16 bytes"),
    Fault(
        "dynamic shared array overrun",
        _small("dynamic_overrun", (1, 32, 400), _x(32), 100),
        "offset 400",
    ),
    Fault(
        "static array overrun into a gap",
        _small("static_overrun", (1, 32), _x(32), 9),
        "shared memory write out",
        RACES,
    ),
    Fault(
        "static array, exact",
        _small("static_overrun", (1, 32), _x(32), 8),
        None,
        RACES | UNINITIALIZED,
    ),
    Fault(
        "shared array one warp too small",
        _layer_norm("layer_norm_shared_overrun"),
        "shared memory write out",
    ),
    Fault(
        "global read past the last row",
        _layer_norm("layer_norm_global_overrun"),
        r"global memory read .* byte 1200 of argument 0 \(\w+\), which has 1200",
    ),
    Fault(
        "read of unwritten shared memory",
        _small("uninitialized", (1, 64), _x(64)),
        "nobody has written",
        UNINITIALIZED,
    ),
    *(
        Fault(name, _small(kernel, (1, 1), _x(8), n), found)
        for kernel in ("local_overrun", "local_overrun_in_a_function")
        for name, n, found in (
            (kernel.replace("_", " "), 9, "local memory read out of bounds: .* byte 32 "),
            (kernel.replace("_", " ") + ", exact", 8, None),
        )
    ),
    Fault(
        "read of an unwritten result",
        _small("adds_to", (1, 8), _unwritten(8), _x(8)),
        r"global memory that nobody has written: 4 bytes at byte 0 of argument 0 \(p\)",
        UNINITIALIZED,
    ),
    Fault(
        "store to an unwritten result",
        _small("stores_to", (1, 8), _unwritten(8), _x(8)),
        None,
        RACES | UNINITIALIZED,
    ),
    Fault("stack overflow", _small("endless_recursion", (1, 1), _ints()), "stack overflow"),
    Fault(
        "wild pointer",
        _small("wild_pointer", (1, 1), lambda: torch.tensor([8])),
        "global memory write",
    ),
    # races inside a block
    Fault(
        "no barrier after a shared write",
        _layer_norm("layer_norm_no_barrier"),
        "race on shared",
        RACES,
    ),
    Fault(
        "no barrier before an overwrite",
        _cross_entropy("cross_entropy_no_barrier"),
        "race on global",
        RACES,
    ),
    Fault(
        "double buffer refilled too early",
        _attention("attention_no_barrier"),
        "race on shared",
        RACES,
    ),
    Fault(
        "lanes without __syncwarp",
        _small("lanes_unsynchronized", (1, 32), _x(32)),
        "race on shared",
        RACES,
    ),
    Fault(
        "lanes with __syncwarp",
        _small("lanes_synchronized", (1, 32), _x(32)),
        None,
        RACES | UNINITIALIZED,
    ),
    Fault(
        "++ on a shared counter",
        _small("counter_not_atomic", (1, 32), _ints()),
        "race on global",
        RACES,
    ),
    Fault("atomicAdd on a counter", _small("counter_atomic", (3, 32), _ints()), None, RACES),
    # races between blocks
    Fault(
        "+= between blocks",
        _weight_gradient("layer_norm_dweight_no_atomic"),
        "of block number",
        RACES,
    ),
    Fault(
        "blocks write one place",
        _small("blocks_write_one_place", (3, 32), _x(4)),
        "of block number",
        RACES,
    ),
    Fault(
        "hand-over without __threadfence",
        _small("hand_over_unfenced", (2, 32), _ints(), _ints(), _ints()),
        "race on global",
        RACES,
    ),
    Fault(
        "hand-over with __threadfence",
        _small("hand_over_fenced", (2, 32), _ints(), _ints(), _ints()),
        None,
        RACES,
    ),
    # asynchronous copies
    Fault(
        "cp.async without its wait",
        _small("async_copy_not_waited", (1, 32), _x(32)),
        "asynchronous copy is still to fill",
        RACES,
    ),
    Fault(
        "cp.async waited for",
        _small("async_copy_waited", (1, 32), _x(32)),
        None,
        RACES | UNINITIALIZED,
    ),
    Fault(
        "wait_group with the wrong constant",
        _attention("attention_wait_group"),
        "asynchronous copy is still to fill",
        RACES,
    ),
    Fault(
        "mbarrier waited on with the wrong parity",
        _gemm("hopper_parity"),
        "livelock|race|more arrivals",
        {"spin_limit": 100_000},
    ),
    Fault("no fence.proxy.async", _gemm("hopper_no_proxy_fence"), r"no fence\.proxy\.async"),
    Fault(
        "bulk store not waited for",
        _gemm("hopper_no_bulk_wait"),
        "cp.async.bulk.wait_group is missing",
    ),
    Fault(
        "wgmma not waited for",
        _gemm("hopper_no_wgmma_wait"),
        "wgmma.wait_group is missing",
        {"late_wgmma": True},
    ),
    # threads that never end
    Fault("endless loop", _small("never_ends", (1, 1), _x(1)), "livelock: one thread"),
    Fault(
        "wait for a flag that nobody sets",
        _small("waits_for_nobody", (1, 32), _ints()),
        "livelock",
        {"spin_limit": 100_000},
    ),
    Fault(
        "lock that nobody releases",
        _small("lock_never_released", (1, 32), _ints()),
        "livelock",
        {"spin_limit": 100_000},
    ),
]

# Faults that no detector names but that spoil the numbers: (name, run, options that show it).
WRONG_NUMBERS = [
    ("ldmatrix without .trans", "attention_not_transposed", {}),
    ("wait_group with the wrong constant", "attention_wait_group", {}),
]
