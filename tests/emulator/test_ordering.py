"""Locks, flags and barriers between blocks: right ones are silent, wrong ones are races."""

import pytest
import torch

from fastlm import emulator

BLOCKS, THREADS = 4, 64
SCHEDULES = ({}, {"schedule": "reverse"}, {"schedule": "random", "seed": 1})


def ints(n=1):
    return torch.zeros(n, dtype=torch.int32)


def lock(module, kernel):
    total = torch.zeros(1)
    module[kernel][BLOCKS, THREADS](ints(), total)
    return total, [BLOCKS]


def relay(module, kernel):
    total = torch.zeros(1)
    module[kernel][3, THREADS](ints(), total)
    return total, [3]


def many_flags(module, kernel):
    y = torch.zeros(BLOCKS)
    module[kernel][BLOCKS, THREADS](ints(BLOCKS), torch.zeros(1), y)
    return y, [0, 1, 1, 1]


def grid_sync(module, kernel):
    y = torch.zeros(BLOCKS)
    module[kernel][BLOCKS, THREADS](torch.zeros(BLOCKS), y)
    return y, [2, 3, 4, 1]


def last_block(module, kernel):
    total = torch.zeros(THREADS)
    module[kernel][BLOCKS, THREADS](ints(), torch.zeros(BLOCKS * THREADS), total)
    return total, [BLOCKS] * THREADS


def three_blocks(module, kernel):
    module[kernel][3, THREADS](ints(), torch.zeros(THREADS))


def one_block(module, kernel):
    y = torch.zeros(THREADS)
    module[kernel][1, THREADS](y)
    return y, [63 - i for i in range(THREADS)]


def one_warp(module, kernel):
    module[kernel][1, 32](torch.zeros(32))


def volatile_global(module, kernel):
    module[kernel][1, THREADS](torch.zeros(THREADS), torch.zeros(THREADS))


def shared_flag(module, kernel):
    y = torch.zeros(1)
    module[kernel][1, THREADS](y)
    return y, [5]


RIGHT = [
    (lock, "lock"),
    (lock, "lock_of_libcudacxx"),
    (lock, "lock_released_by_volatile_store"),
    (grid_sync, "grid_sync"),
    (relay, "relay_fenced"),
    (relay, "volatile_data_fenced"),
    (many_flags, "many_flags"),
    (last_block, "last_block"),
    (lock, "turns"),
    (last_block, "counted"),
    (one_block, "volatile_shared_and_barrier"),
    (shared_flag, "shared_flag"),
]
WRONG = [
    (lock, "lock_without_release_fence"),
    (lock, "lock_without_acquire_fence"),
    (lock, "lock_with_fences_of_block"),
    (lock, "lock_with_plain_release"),
    (lock, "lock_without_atomic"),
    (lock, "lock_of_libcudacxx_relaxed"),
    (lock, "lock_of_one_block_scope"),
    (grid_sync, "grid_sync_left_out"),
    (relay, "relay_unfenced"),
    (relay, "relay_by_plain_stores"),
    (relay, "volatile_data_unfenced"),
    (last_block, "last_block_unreleased"),
    (last_block, "last_block_unacquired"),
    (three_blocks, "acquired_by_reduction"),
    (three_blocks, "own_race_after_news"),
    (one_block, "volatile_shared"),
    (volatile_global, "volatile_global"),
    (volatile_global, "volatile_after_an_old_fence"),
    (one_warp, "volatile_sum_of_a_warp"),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda o: o.get("schedule", "order"))
@pytest.mark.parametrize("launch, kernel", RIGHT, ids=lambda x: x if isinstance(x, str) else "")
def test_right_synchronisation_is_silent(cuda, launch, kernel, schedule):
    found, expected = launch(cuda("ordering", races=True, **schedule), kernel)
    assert found.tolist() == expected


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda o: o.get("schedule", "order"))
@pytest.mark.parametrize("launch, kernel", WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_synchronisation_is_a_race(cuda, launch, kernel, schedule):
    with pytest.raises(emulator.KernelError, match="data race"):
        launch(cuda("ordering", races=True, spin_limit=100_000, **schedule), kernel)
