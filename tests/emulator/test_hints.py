"""Where an error says to look: by the kind of what went wrong."""

import pytest
import torch

from fastlm import emulator

from . import test_ordering
from .fault_cases import FAULTS, RACES

FAULTS_BY_NAME = {fault.name: fault for fault in FAULTS}
HINTS = {
    "barrier in a branch of one warp": "early returns and branches before the barrier",
    "lanes exit before a shuffle": "early returns before the warp operation",
    "shuffle in a divergent branch": "branches around the warp operation, and its mask",
    "misaligned float4": "vector accesses need their own size as alignment",
    "shared array one warp too small": "the size of the array, the index",
    "local overrun": "the index into the local array",
    "global read past the last row": "the mask of the last row",
    "read of unwritten shared memory": "should have filled this part of the array",
    "read of an unwritten result": "who should have filled the tensor",
    "stack overflow": "the depth of the recursion",
    "no barrier after a shared write": r"the barrier that should stand .* __syncthreads\(\)",
    "lanes without __syncwarp": r"the barrier that should stand .* __syncwarp\(\)",
    "+= between blocks": r"what orders blocks: .* grid\.sync\(\)",
    "hand-over without __threadfence": "volatile, which orders nothing",
    "cp.async without its wait": r"how many groups cp\.async\.wait_group lets be in flight",
    "wait_group with the wrong constant": r"how many groups cp\.async\.wait_group",
    "mbarrier waited on with the wrong parity": "the parity that the mbarrier is waited on with",
    "no fence.proxy.async": r"a fence\.proxy\.async must follow it",
    "bulk store not waited for": r"cp\.async\.bulk\.commit_group",
    "wgmma not waited for": r"the wgmma\.wait_group after",
    "endless loop": "the condition of the loop",
    "wait for a flag that nobody sets": "who sets the flag that the loop reads",
    "lock that nobody releases": "the lock: every path must release it",
}


@pytest.mark.parametrize("name", HINTS)
def test_hint_of_a_fault(cuda, name):
    fault = FAULTS_BY_NAME[name]
    with pytest.raises(emulator.KernelError, match=rf"look at: [^\n]*{HINTS[name]}"):
        fault.launch(cuda, **fault.options)


@pytest.mark.parametrize(
    "launch, kernel, hint",
    [
        (test_ordering.lock, "lock_with_plain_release", "the access that is not atomic"),
        (test_ordering.lock, "lock_of_one_block_scope", "the scope of the accesses"),
        (test_ordering.lock, "lock_without_release_fence", r"what orders blocks: .*__threadfence"),
        (test_ordering.one_block, "volatile_shared", "volatile, which orders nothing"),
        (test_ordering.one_warp, "volatile_sum_of_a_warp", "volatile, which orders nothing"),
    ],
)
def test_hint_of_a_race(cuda, launch, kernel, hint):
    with pytest.raises(emulator.KernelError, match=rf"look at: [^\n]*{hint}"):
        launch(cuda("ordering", **RACES), kernel)


def test_a_read_of_what_a_copy_is_still_to_fill_names_the_copy(cuda):
    with pytest.raises(emulator.KernelError, match="still to fill") as error:
        cuda("faults", **RACES)["async_copy_not_waited"][1, 32](torch.zeros(32))
    assert "and " in error.value.where and "cp.async" in error.value.where
    assert "wait" not in error.value.where


def test_blocks_that_have_not_started(cuda):
    arrived, places, y = (test_ordering.ints(8) for _ in range(3))
    module = cuda("language", resident=4, spin_limit=10_000)
    with pytest.raises(emulator.KernelError, match=r"look at: .* the option `resident`"):
        module["grid_barrier"][8, 32](arrived, places, y)


def test_a_warp_that_does_not_wait_for_a_bulk_copy():
    pytest.importorskip("triton", reason="Triton is not installed")
    from .test_triton_launcher import described, gluon_kernel

    x = torch.randn(64, 64).bfloat16()
    launcher = emulator.triton_launcher(gluon_kernel(), uninitialized=True)
    with pytest.raises(emulator.KernelError, match=r"look at: the parity .* bytes that it expects"):
        launcher[(1,)](described(x, 16), described(x.clone(), 16), 4, False, num_warps=4)
