"""TMA, mbarrier and wgmma as nvcc emits them for sm_90a."""

import pytest
import torch

from fastlm import emulator

SHARED = 5 * 64 * 64 * 2


def run_gemm(cuda, kernel="hopper_gemm", m=150, n=72, k=328, **options):
    """(c, truth): 328 is six steps of 64, so both stages are refilled; no side is a multiple."""
    a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    c = torch.full((m, n), float("nan")).bfloat16()
    maps = [emulator.tensor_map(x, (64, 64)) for x in (a, b, c)]
    module = cuda("hopper", arch="90a", memory=(a, b, c), **options)
    module[kernel][(-(-m // 64), -(-n // 64)), 128, SHARED](*maps, k)
    return c.double(), a.double() @ b.double().T


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": "reverse"},
        {"schedule": "random", "seed": 2},
        {"late_copies": False},
        {"late_wgmma": True},
        {"races": True, "uninitialized": True},
    ],
    ids=str,
)
def test_gemm(cuda, options):
    c, truth = run_gemm(cuda, **options)
    # Sums of 328 products are exact to float32; one rounding to bfloat16 follows.
    assert ((c - truth).abs() <= truth.abs() * 2**-8 + 1e-3).all()


def test_tensor_map_refuses_what_tma_cannot_do():
    x = torch.zeros(8, 64).bfloat16()
    with pytest.raises(ValueError, match="contiguous"):
        emulator.tensor_map(x.T, (8, 8))
    with pytest.raises(ValueError, match="swizzle 16"):
        emulator.tensor_map(x, (8, 8), swizzle=16)
    with pytest.raises(ValueError, match="box"):
        emulator.tensor_map(x, (8, 300))


def test_odd_stride_is_an_error(cuda):
    with pytest.raises(emulator.KernelError, match="stride 1 is 658 bytes"):
        run_gemm(cuda, k=329)
