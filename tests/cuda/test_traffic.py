"""What a launch moves and computes, counted by the emulator, held to what each kernel's header
promises. All tensors are bfloat16, statistics float32, lse float64."""

import pytest
import torch

import fastlm
from fastlm import backend, emulator, ops

from . import resources

pytestmark = pytest.mark.skipif(resources.toolkit() is None, reason="nvcc is not on the PATH")
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def kernels():
    return backend.load("emulated:cuda", "layer_norm")


def counted(kernels, call):
    """{kernel: Counters} of a call of an op, forward alone."""
    with fastlm.use("emulated:cuda"), emulator.defaults(counters=True):
        call()
    return {resources.readable(launch.kernel): launch.counters for launch in kernels.launches}


def randn(*shape):
    return torch.randn(shape).to(BF16)


def test_layer_norm_moves_each_element_once(kernels):
    rows, cols = 24, 768
    x, weight, bias = randn(rows, cols), randn(cols), randn(cols)
    (c,) = counted(kernels, lambda: ops.layer_norm(x, (cols,), weight, bias)).values()
    parameters = 2 * 2 * rows * cols  # each row asks for them; they come from L2
    assert c.global_read == 2 * rows * cols + parameters
    assert c.global_written == 2 * rows * cols + 2 * 4 * rows
    statistics = 2 * rows  # stores of one float
    assert c.global_sectors <= c.global_sectors_least + statistics
    assert (c.shared_conflicts, c.local_read, c.local_written) == (0, 0, 0)


def test_layer_norm_backward_reads_and_writes_once(kernels):
    rows, cols = 24, 768
    x, weight, bias = (t.requires_grad_() for t in (randn(rows, cols), randn(cols), randn(cols)))
    with fastlm.use("emulated:cuda"):
        y = ops.layer_norm(x, (cols,), weight, bias)
    found = counted(kernels, lambda: y.backward(randn(rows, cols)))
    c = found["layer_norm_backward_kernel<bfloat16>"]
    blocks = next(s.grid[0] for s in kernels.launches if "backward" in s.kernel)
    assert c.global_read >= (2 + 1) * 2 * rows * cols  # dy and x; the weight, from L2
    assert c.global_read <= (2 + 1) * 2 * rows * cols + 2 * 4 * rows * 64  # statistics, per thread
    assert c.global_written == 2 * rows * cols + 2 * 4 * blocks * cols
    assert found["column_sums_kernel"].global_read == 2 * 4 * blocks * cols


def test_long_layer_norm_moves_each_element_once(kernels):
    """Shared memory holds the row; only backward reads what it needs a second time."""
    rows, cols = 5, 16384
    x, weight, bias = (t.requires_grad_() for t in (randn(rows, cols), randn(cols), randn(cols)))
    y = []
    (c,) = counted(kernels, lambda: y.append(ops.layer_norm(x, (cols,), weight, bias))).values()
    assert c.global_read == (1 + 2) * 2 * rows * cols
    assert c.global_written == 2 * rows * cols + 2 * 4 * rows
    assert c.global_sectors <= c.global_sectors_least + 2 * rows
    assert (c.shared_conflicts, c.local_read, c.local_written) == (0, 0, 0)
    found = counted(kernels, lambda: y[0].backward(randn(rows, cols)))
    # mean and rstd by every thread of a row, and of its two parts the row's two sums as well
    statistics = {"layer_norm_row_sums": 2, "layer_norm_backward": 2 * 4}
    for name, floats in statistics.items():
        c = found[f"{name}_kernel<bfloat16>"]
        assert c.global_read == (2 + 1) * 2 * rows * cols + 4 * floats * 512 * rows, name


@pytest.mark.parametrize("gradient", [False, True])
def test_cross_entropy_reads_the_logits_once(kernels, gradient):
    """GPT-2's vocabulary: a row begins at any multiple of 2 bytes, and fits in shared memory."""
    rows, classes = 3, 50257
    logits, target = randn(rows, classes).requires_grad_(gradient), torch.randint(classes, (rows,))
    (c,) = counted(kernels, lambda: ops.cross_entropy(logits, target)).values()
    ends = rows * 2 * 14 * 2  # up to 14 elements at a row's ends are read by both sweeps
    scalars = rows * 512 * (8 + 2 + 2)  # target and its logit, by every thread
    assert 0 <= c.global_read - 2 * rows * classes <= ends + scalars
    written = 2 * rows * classes if gradient else 0
    assert c.global_written == written + rows * (4 + 8)
    assert c.shared_conflicts <= 0.01 * c.shared_wavefronts


def test_gelu_moves_each_element_once(kernels):
    x = randn(16, 3072)
    (c,) = counted(kernels, lambda: ops.gelu(x)).values()
    assert (c.global_read, c.global_written) == (2 * x.numel(), 2 * x.numel())
    assert c.global_sectors == c.global_sectors_least


def test_attention_reads_keys_once_per_block_of_queries(kernels):
    q, k, v = (randn(1, 256, 1, 64) for _ in range(3))
    (c,) = counted(kernels, lambda: ops.attention(q, k, v, causal=True)).values()
    tiles = 1 + 2 + 3 + 4
    assert c.global_read == 2 * 64 * (256 + 2 * 64 * tiles)
    assert c.global_written == 2 * 64 * 256 + 8 * 256
    assert c.global_sectors <= c.global_sectors_least + 256  # lse: one double per quad
    assert c.matrix_conflicts == 0


def test_causal_attention_computes_little_that_is_masked(kernels):
    """At GPT-2's length nine tenths of what the tensor cores do is not masked out."""
    length, width = 1024, 64
    q, k, v = (randn(1, length, 1, width) for _ in range(3))
    (c,) = counted(kernels, lambda: ops.attention(q, k, v, causal=True)).values()
    useful = 2 * 2 * width * length * (length + 1) // 2
    assert useful / c.tensor_operations >= 0.9


def test_decoding_reads_the_cache_once(kernels):
    q, k, v = randn(1, 1, 4, 64), randn(1, 512, 4, 64), randn(1, 512, 4, 64)
    found = counted(
        kernels, lambda: ops.attention_with_kvcache(q, k, v, cache_seqlens=512, causal=True)
    )
    c = found["attention_decode_kernel<bfloat16, 8>"]
    blocks = 4 * next(s.grid[0] for s in kernels.launches if "decode" in s.kernel)
    rows = 2 * 64 * blocks * 16  # the row of q, by every group of lanes of every block
    lengths = blocks * 128 * 4
    assert c.global_read == 2 * 2 * 512 * 4 * 64 + rows + lengths
