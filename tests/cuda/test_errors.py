"""What is refused, and how: in the words of the user, never with a wrong answer."""

import pytest
import torch

import fastlm
from fastlm import backend, ops

from . import resources

pytestmark = pytest.mark.skipif(resources.toolkit() is None, reason="nvcc is not on the PATH")


@pytest.fixture(scope="module")
def kernels():
    return backend.load("emulated:cuda", "layer_norm")


def test_cpu_tensor():
    if backend.not_installed("fastlm._cuda"):
        pytest.skip("fastlm._cuda is not built here")
    from fastlm import _cuda

    x, s = torch.zeros(2, 8), torch.zeros(2)
    with pytest.raises(ValueError, match=r"a tensor on this module's device, got .* float32 cpu"):
        _cuda.layer_norm_forward(x, s, s, x, None, None, 1e-5, 0)


def test_cuda_is_asked_for_on_a_cpu_tensor():
    with (
        fastlm.use("cuda"),
        pytest.raises(fastlm.BackendUnavailable, match="runs on cuda tensors, not on cpu"),
    ):
        ops.gelu(torch.zeros(3))


def test_dtype_that_no_kernel_takes(kernels):
    x = torch.zeros(2, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"gelu: the CUDA kernels take float32, .* got float64"):
        kernels.gelu_forward(x, x, None, False, 0)


def test_row_that_is_too_long(kernels):
    x, s = torch.zeros(2, 65537), torch.zeros(2)
    with pytest.raises(ValueError, match="at most 65536 elements, got 65537"):
        kernels.layer_norm_forward(x, s, s, x, None, None, 1e-5, 0)


@pytest.mark.parametrize("queries", [3, 70], ids=["decoding", "blocks"])
def test_head_dim_that_is_too_wide(kernels, queries):
    q, k = torch.zeros(1, queries, 1, 264), torch.zeros(1, 70, 1, 264)
    options = kernels.AttentionOptions(*[None] * 6, 0, 0, 1.0, 0.0, -1, -1, 0.0)
    lse = torch.zeros(1, 1, queries, dtype=torch.float64)
    with pytest.raises(ValueError, match="head_dim: expected at most 256 for CUDA, got 264"):
        kernels.attention_forward(q, lse, q, k, k, options, 0)


def test_target_that_is_no_class_gives_nan():
    """To raise, the host would have to wait for the device."""
    logits, target = torch.randn(3, 9, requires_grad=True), torch.tensor([1, 9, -5])
    with fastlm.use("emulated:cuda"):
        loss = ops.cross_entropy(logits, target, reduction="none")
        loss.nan_to_num().sum().backward()
    assert loss.isnan().tolist() == [False, True, True]
    assert logits.grad.isnan().all(1).tolist() == [False, True, True]


def test_cache_that_is_full_gives_nan():
    """Nothing is written past it, and the result cannot pass for one."""
    cache = torch.randn(2, 2, 8, 1, 16)
    new, lengths = torch.randn(2, 1, 1, 16), torch.tensor([7, 8], dtype=torch.int32)
    with fastlm.use("emulated:cuda"):
        o = ops.attention_with_kvcache(new, cache[0], cache[1], new, new, lengths)
    assert o.isnan().flatten(1).all(1).tolist() == [False, True]
