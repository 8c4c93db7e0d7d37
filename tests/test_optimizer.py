"""The optimiser's groups and schedule, and the memory it runs in."""

import resource

import pytest
import torch

from fastlm.models import GPT2Config, GPT2LMHeadModel
from fastlm.training import TrainingConfig
from fastlm.training.memory import keep_freed_memory
from fastlm.training.optimizer import learning_rate, make_optimizer


def test_decay_groups():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=4, n_embd=4, n_layer=1, n_head=1))
    decayed, rest = make_optimizer(model, TrainingConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("bias" in names[id(p)] or "ln_" in names[id(p)] for p in rest["params"])
    assert len(decayed["params"]) == 2 + 4 and len(rest["params"]) == 4 + 3 * 2


def test_learning_rate_schedule():
    config = TrainingConfig(steps=21, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1)
    rates = [learning_rate(step, config) for step in range(21)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(1.0) and rates[20] == pytest.approx(0.1)
    assert rates[15] == pytest.approx(0.55), "half way down the cosine"


def test_freed_memory_is_kept():
    """Once a few 64 MB tensors have found their place, the next ones cost no page faults."""
    if not keep_freed_memory():
        pytest.skip("this C library has no mallopt")
    faults = []
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(1 << 24)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    pages = (1 << 26) // resource.getpagesize()
    assert max(faults[5:]) < pages / 100, f"{faults} faults for {pages} pages each"
