"""CUDA C++ around the arithmetic: printf, assert, calls, variables, atomics, blocks that wait."""

import struct

import pytest
import torch

from fastlm import emulator


@pytest.fixture
def language(cuda):
    return cuda("language")


def test_printf_writes_to_stdout(language, capsys):
    language["print"][2, 1](7, 2.5)
    assert capsys.readouterr().out == f"n=7 x=2.50 odd {1 << 40} c%\n" * 2


def test_assert_names_the_condition(language):
    language["check"][1, 1](1)
    with pytest.raises(emulator.KernelError, match="n must be positive") as error:
        language["check"][1, 1](0)
    assert "language.cu" in error.value.where


def test_global_and_constant_variables(language):
    language.variable("table")[:] = struct.pack("4f", 0.5, 1.5, 2.5, 3.5)
    language.variable("counter")[:] = struct.pack("i", 100)
    y = torch.zeros(4)
    language["variables"][1, 4](y)
    assert y.tolist() == [100.5, 103.5, 108.5, 115.5]
    assert struct.unpack("i", language.variable("counter")) == (104,)


def test_calls_with_structs_and_recursion(language):
    y = torch.tensor([0.0, 0, 0, 10])
    language["calls"][1, 1](y, struct.pack("ffi", 3, 8, 5), 5)
    assert y.tolist() == [11.5, 4, 126, 10]  # 3/2 + 10, 8/2, (5 + 1) + 5!


@pytest.mark.parametrize("options", [{}, {"races": True, "uninitialized": True}], ids=str)
def test_shared_memory_of_a_function_is_its_own(cuda, options):
    y = torch.zeros(32, dtype=torch.int32)
    cuda("language", **options)["shared_in_a_function"][1, 32](y)
    assert y.tolist() == [(i + 1) % 32 - 100 * (31 - i) for i in range(32)]


@pytest.mark.parametrize("which, expected", [(0, 6.0), (1, 9.0)])
def test_indirect_call(language, which, expected):
    y = torch.tensor([3.0])
    language["indirect"][1, 1](y, which)
    assert y.item() == expected


@pytest.mark.parametrize(
    "kernel, dtype", [("half_pairs", torch.half), ("bfloat_pairs", torch.bfloat16)]
)
def test_packed_arithmetic(language, kernel, dtype):
    a, b = torch.tensor([1.5, -3.25], dtype=dtype), torch.tensor([0.3, 7.0], dtype=dtype)
    y = torch.zeros(8, 2, dtype=dtype)
    language[kernel][1, 1](a, b, y)
    fused = (a.double() * b.double() + a.double()).to(dtype)
    expected = [a + b, a * b, fused, a.maximum(b), a - b, -a, a.minimum(b), (a > b).to(dtype)]
    assert torch.equal(y, torch.stack(expected))


def test_atomics(language):
    i = torch.tensor([0, 0, 99, -99, -1, 0, 0, 0, 0, 0], dtype=torch.int32)
    u = torch.tensor([0, 0, 0], dtype=torch.int32)
    f, d, h = torch.zeros(1), torch.zeros(1, dtype=torch.double), torch.zeros(2).half()
    language["atomics"][1, 32](i, u, f, d, h)
    # 32 threads; inc and dec run modulo 10; each lane sets its own bit; cas counts 0, 1, ... 31.
    assert i.tolist() == [64, -64, -5, 31, 0, -1, -1, 77, 32, 32]
    assert u.tolist() == [32 % 10, -32 % 10, 32]
    assert (f.item(), d.item(), h.tolist()) == (16.0, 8.0, [32.0, 64.0])


def test_shared_atomics(language):
    y = torch.zeros(4, dtype=torch.int32)
    language["shared_atomics"][1, 64](y)
    assert y.tolist() == [sum(range(first, 64, 4)) for first in range(4)]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("schedule", ["order", "reverse", "random"])
def test_blocks_that_wait_for_each_other_are_resident(cuda, schedule, workers):
    blocks = 12
    arrived, places, y = (torch.zeros(n, dtype=torch.int32) for n in (1, blocks, blocks))
    module = cuda("language", schedule=schedule, workers=workers)
    module["grid_barrier"][blocks, 64](arrived, places, y)
    assert y.tolist() == [(i + 1) % blocks * 10 for i in range(blocks)]


@pytest.mark.parametrize("options", [{}, {"schedule": "random"}, {"races": True}], ids=str)
def test_cooperative_groups_synchronise_the_grid(cuda, options):
    places, y = (torch.zeros(5, dtype=torch.int32) for _ in range(2))
    cuda("language", **options)["cooperative"][5, 64](places, y)
    assert y.tolist() == [10, 20, 30, 40, 0]


@pytest.mark.parametrize("options", [{}, {"races": True}], ids=str)
def test_a_thousand_blocks_synchronise(cuda, options):
    places, y = (torch.zeros(1000, dtype=torch.int32) for _ in range(2))
    cuda("language", **options)["cooperative"][1000, 32](places, y)
    assert torch.equal(y, (torch.arange(1000, dtype=torch.int32) + 1) % 1000 * 10)


def test_a_cooperative_grid_that_no_gpu_holds_is_refused(cuda):
    places, y = (torch.zeros(5000, dtype=torch.int32) for _ in range(2))
    kernel = cuda("language")["cooperative"]
    # An H100's 132 multiprocessors hold 32 blocks each, or two blocks of 1024 threads.
    with pytest.raises(emulator.KernelError, match=r"5000 blocks .* at most 4224 are"):
        kernel[5000, 32](places, y)
    with pytest.raises(emulator.KernelError, match=r"at most 264 are; .*CooperativeLaunchTooLarge"):
        kernel[265, 1024](places, y)


def test_blocks_beyond_the_resident_ones_never_start(cuda):
    arrived, places, y = (torch.zeros(8, dtype=torch.int32) for _ in range(3))
    module = cuda("language", resident=4, spin_limit=10_000)
    with pytest.raises(emulator.KernelError, match=r"livelock.*; 4 blocks have not started"):
        module["grid_barrier"][8, 32](arrived, places, y)


def test_a_loop_that_waits_for_time_to_pass_ends(language):
    y = torch.zeros(1, dtype=torch.int32)
    language["wait_for_time"][1, 32](y)
    assert y.item() == 1


def test_votes_reductions_and_counting_barriers(language):
    y = torch.zeros(7, dtype=torch.int32)
    language["votes"][1, 32](y)
    odd = sum(1 << lane for lane in range(1, 32, 2)) - (1 << 32)
    assert y.tolist() == [odd, sum(range(32)), 31 - 40, 8, 5 + 100 + 1000, 0, 1]
