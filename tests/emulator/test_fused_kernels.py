"""nvcc's PTX of ordinary fused kernels against torch, in every schedule and under the detectors."""

import pytest
import torch

NAN = float("nan")
SCHEDULES = [{"schedule": "order"}, {"schedule": "reverse"}, {"schedule": "random", "seed": 5}]
DETECTORS = {"races": True, "uninitialized": True}


def attention_inputs(heads, length, seed=0):
    """q, k, v in bfloat16 and an output full of NaN, each (heads, length, 64)."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(heads, length, 64, generator=generator).bfloat16() for _ in range(3))
    return q, k, v, torch.full_like(q, NAN)


def run_attention(module, kernel, heads, length):
    """(output, what it should be in float64) of a causal attention kernel."""
    q, k, v, o = attention_inputs(heads, length)
    shared = 5 * 64 * 64 * 2  # one tile of queries, two of keys, two of values
    module[kernel][(-(-length // 64), heads), 128, shared](q, k, v, o, length, 0.125)
    truth = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True
    )
    return o, truth


def run_layer_norm(module, kernel="layer_norm_forward", rows=3, cols=100):
    x, weight, bias = torch.randn(rows, cols), torch.randn(cols), torch.randn(cols)
    y = torch.full_like(x, NAN)
    module[kernel][rows, 128](x, weight, bias, y, cols, 1e-5)
    return y, torch.nn.functional.layer_norm(x, (cols,), weight, bias, 1e-5)


def run_cross_entropy(module, kernel="cross_entropy", rows=2, classes=1001):
    logits = torch.randn(rows, classes).bfloat16()
    target = torch.randint(classes, (rows,), dtype=torch.int32)
    loss, wide = torch.full((rows,), NAN), logits.float().requires_grad_()
    truth = torch.nn.functional.cross_entropy(wide, target.long(), reduction="none")
    truth.sum().backward()
    module[kernel][rows, 256](logits, target, loss, classes, 1.0)
    return (loss, logits.float()), (truth.detach(), wide.grad)


@pytest.mark.parametrize("options", [*SCHEDULES, DETECTORS], ids=str)
def test_layer_norm(cuda, options):
    y, truth = run_layer_norm(cuda("layer_norm", **options))
    torch.testing.assert_close(y, truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, DETECTORS], ids=str)
def test_layer_norm_weight_gradient(cuda, options):
    x, dy = torch.randn(5, 100), torch.randn(5, 100)
    dweight, dbias = torch.zeros(100), torch.zeros(100)
    cuda("layer_norm", **options)["layer_norm_dweight"][5, 128](x, dy, dweight, dbias, 100)
    torch.testing.assert_close(dweight, (x * dy).sum(0))
    torch.testing.assert_close(dbias, dy.sum(0))


@pytest.mark.parametrize("options", [*SCHEDULES, DETECTORS], ids=str)
def test_cross_entropy(cuda, options):
    (loss, grad), (true_loss, true_grad) = run_cross_entropy(cuda("cross_entropy", **options))
    torch.testing.assert_close(loss, true_loss, atol=1e-4, rtol=0)
    # One rounding to bfloat16: half a unit in the last of its 8 bits.
    assert ((grad - true_grad).abs() <= true_grad.abs() * 2**-8 + 1e-7).all()


@pytest.mark.parametrize(
    "arch, options",
    [*((80, options) for options in (*SCHEDULES, DETECTORS, {"late_copies": False})), ("90a", {})],
    ids=str,
)
def test_attention(cuda, arch, options):
    # 200 = four tiles, the last one ragged: both buffers are refilled at least once.
    o, truth = run_attention(cuda("attention", arch=arch, **options), "attention_forward", 1, 200)
    # p and o are rounded to bfloat16 (2^-8 each) and |o| stays below 4.
    assert (o.double() - truth).abs().max() < 4 * 2 * 2**-8


def test_one_row_and_exact_tiles(cuda):
    for length in (1, 64):
        o, truth = run_attention(cuda("attention"), "attention_forward", 2, length)
        assert (o.double() - truth).abs().max() < 4 * 2 * 2**-8


def test_workers_give_the_same_bits(cuda):
    torch.manual_seed(0)
    one, _ = run_layer_norm(cuda("layer_norm"), rows=9)
    torch.manual_seed(0)
    two, _ = run_layer_norm(cuda("layer_norm", workers=2), rows=9)
    assert torch.equal(one, two)
