"""Counters of kernels whose traffic is known by hand."""

import pytest
import torch

from fastlm.emulator import tensor_map


@pytest.fixture
def counted(cuda):
    return cuda("language", counters=True)


def aligned_floats(n):
    """n zeros that start at a multiple of 128 bytes, as cudaMalloc's memory does."""
    memory = torch.zeros(n + 32)
    start = -memory.data_ptr() % 128 // 4
    return memory[start : start + n]


def test_coalesced_copy_moves_whole_sectors(counted):
    kernel = counted["copy_rows"]
    kernel[1, 32](aligned_floats(32), aligned_floats(32))
    c = kernel.counters
    # 32 lanes * 4 bytes = 128 bytes = 4 sectors of 32, read once and written once.
    assert (c.global_read, c.global_written) == (128, 128)
    assert (c.global_requests, c.global_sectors, c.global_sectors_least) == (2, 8, 8)
    assert c.sectors_per_request == 4


def test_uncoalesced_copy_touches_a_sector_for_each_lane(counted):
    kernel = counted["copy_columns"]
    kernel[1, 32](aligned_floats(1024), aligned_floats(1024))
    c = kernel.counters
    assert (c.global_requests, c.global_sectors, c.global_sectors_least) == (2, 64, 8)
    assert c.sectors_per_request == 32


@pytest.mark.parametrize(
    "kernel, conflicts", [("matrix_no_conflicts", 0), ("matrix_conflicts", 28)]
)
def test_ldmatrix_bank_conflicts(counted, kernel, conflicts):
    """Rows 128 bytes apart share their four banks: each of 4 matrices takes 8 wavefronts, not 1."""
    run = counted[kernel]
    run[1, 32](torch.zeros(32, dtype=torch.int32))
    assert run.counters.matrix_requests == 1
    assert run.counters.matrix_wavefronts_least == 4
    assert run.counters.matrix_conflicts == conflicts


def test_shared_stores_in_order_have_no_conflicts(counted):
    run = counted["matrix_no_conflicts"]
    run[1, 32](torch.zeros(32, dtype=torch.int32))
    # 8 rows of 36 words, 32 lanes side by side: 9 stores of 128 bytes.
    c = run.counters
    assert (c.shared_written, c.shared_requests, c.shared_conflicts) == (8 * 36 * 4, 9, 0)


def test_tensor_operations_of_attention_and_wgmma(cuda):
    q, k, v, o = (torch.zeros(1, 64, 64).bfloat16() for _ in range(4))
    attention = cuda("attention", counters=True)["attention_forward"]
    attention[(1, 1), 128, 5 * 64 * 64 * 2](q, k, v, o, 64, 0.125)
    # One tile: q @ k^T and p @ v, 64 x 64 x 64 each, a multiplication and an addition a time.
    assert attention.counters.tensor_operations == 2 * 2 * 64**3
    assert attention.counters.matrix_conflicts == 0  # its swizzle is there for that

    a, b, c = (torch.zeros(64, 64).bfloat16() for _ in range(3))
    gemm = cuda("hopper", arch="90a", counters=True, memory=(a, b, c))["hopper_gemm"]
    gemm[1, 128, 5 * 64 * 64 * 2](*(tensor_map(x, (64, 64)) for x in (a, b, c)), 64)
    assert gemm.counters.tensor_operations == 2 * 64**3


def test_instructions_are_counted_by_class(cuda):
    x, weight, bias, y = (aligned_floats(128) for _ in range(4))
    kernel = cuda("layer_norm", counters=True)["layer_norm_forward"]
    kernel[1, 128](x, weight, bias, y, 128, 1e-5)
    classes = kernel.counters.instructions
    # Two block sums of five shuffles and two barriers by 128 threads; one rsqrt by each.
    assert classes["sync"] == 128 * 2 * (5 + 2)
    assert classes["special"] == 128
    assert classes["float"] > 128 * 2 * 5 and classes["tensor"] == 0


def test_counters_are_printed_as_counts(counted):
    kernel = counted["copy_rows"]
    assert kernel.counters is None
    kernel[1, 32](aligned_floats(32), aligned_floats(32))
    assert str(kernel.counters).startswith("counts, not times:")
    assert "8 sectors in 2 requests, 8 at best" in str(kernel.counters)
