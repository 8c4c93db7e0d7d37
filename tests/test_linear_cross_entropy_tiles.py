"""linear_cross_entropy on the CPU: the edges of its tiles, and who computes them."""

import os
import subprocess
import sys

import pytest
import torch
from accuracy import assert_as_accurate_as_torch
from cases import BF16, F32, F64
from torch.nn import functional as F

from fastlm import ops

SHAPES = {  # rows, classes, features
    "several slabs of features": (3, 130, 1100),
    "several slabs of rows, of which most are not kept": (1100, 70, 9),
    "whole blocks of rows and whole tiles": (128, 128, 64),
    "one more than that": (129, 129, 65),
    "several tiles a sum": (3, 1700, 5),
    "one column of panels": (97, 3, 1),
    "one row": (1, 200, 31),
    "one class": (49, 1, 33),
}


def inputs(rows, classes, features):
    x, weight = torch.randn(rows, features), torch.randn(classes, features) / features**0.5
    return x, weight, torch.randint(classes, (rows,)), torch.randn(classes)


def ours(x, weight, target, bias):
    return ops.linear_cross_entropy(x, weight, target, linear_bias=bias, reduction="sum")


def theirs(x, weight, target, bias):
    logits = F.linear(x, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, F32))  # as transformers does
    return F.cross_entropy(logits, target, reduction="sum")


def results(op, x, weight, target, bias, dtype):
    """The loss and its gradients."""
    leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
    loss = op(*leaves[:2], target, leaves[2])
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_loss_and_gradients(shape, dtype, cpp):
    x, weight, target, bias = inputs(*shape)
    rounded = [t.to(dtype).double() for t in (x, weight)]
    truth = results(theirs, *rounded, target, bias.to(dtype).double(), F64)
    found = results(ours, x, weight, target, bias, dtype)
    torchs = results(theirs, x, weight, target, bias, dtype)
    if dtype == F64:  # of which torch's is no better
        torch.testing.assert_close(found, torchs)
        return
    for name, *three in zip(("loss", "x", "weight", "bias"), found, torchs, truth, strict=True):
        # One class has a gradient of zero, from probabilities that are 1.
        assert_as_accurate_as_torch(*three, name, least_scale=1.0)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_same_bits_with_any_number_of_threads(dtype, reduction, cpp, threads):
    """Five share the columns of a tile too. With "none" backward makes the logits again."""
    x, weight, target, bias = inputs(301, 700, 200)
    found = []
    for count in (1, 2, 5):
        threads(count)
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        loss = ops.linear_cross_entropy(
            *leaves[:2], target, linear_bias=leaves[2], reduction=reduction
        )
        found.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaves)])
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            assert torch.equal(a, b)


def test_a_team_that_is_smaller_than_asked_for():
    """OpenMP may give fewer threads than there are."""
    script = """
import torch
from fastlm import ops
found = []
x, weight, target = torch.randn(301, 200), torch.randn(700, 200), torch.randint(700, (301,))
for threads in (1, 6):
    torch.set_num_threads(threads)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = ops.linear_cross_entropy(*leaves, target)
    found.append([loss, *torch.autograd.grad(loss, leaves)])
assert all(torch.equal(a, b) for a, b in zip(*found))
"""
    limited = {**os.environ, "OMP_THREAD_LIMIT": "2"}
    subprocess.run([sys.executable, "-c", script], env=limited, check=True)


def test_no_rows(cpp):
    leaves = [t.requires_grad_() for t in (torch.empty(0, 4), torch.randn(300, 4))]
    bias, none = torch.randn(300).requires_grad_(), torch.empty(0, dtype=torch.int64)
    ours(*leaves, none, bias).backward()
    assert torch.equal(leaves[1].grad, torch.zeros(300, 4))
    assert torch.equal(bias.grad, torch.zeros(300))
