"""The recycling pool: what it holds, gives back and never exceeds."""

import gc
import threading

import pytest
import torch

from fastlm import memory, ops

MB = 1 << 20


@pytest.fixture(autouse=True)
def empty_pool():
    limit = memory.stats()["limit"]
    memory.empty_cache()
    yield
    memory.set_limit(limit)
    memory.empty_cache()


def large(rows=1024, dtype=torch.float32):
    return memory.empty((rows, 1024), dtype, torch.device("cpu"))  # rows * 4 KB


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_result_is_an_ordinary_tensor(dtype):
    t = large(1024, dtype)
    assert (t.shape, t.dtype, t.stride()) == ((1024, 1024), dtype, (1024, 1))
    assert torch.equal(t.fill_(3).sum(dtype=torch.float64), torch.tensor(3.0 * MB).double())


def test_freed_memory_is_used_again():
    first = large()
    address = first.data_ptr()
    del first
    assert memory.stats()["held"] >= 4 * MB
    assert large().data_ptr() == address


def test_memory_in_use_is_not_given_twice():
    first, second = large().fill_(1), large().fill_(2)
    view = first[:10]
    del first  # the view keeps the block
    third = large().fill_(3)
    assert len({t.data_ptr() for t in (view, second, third)}) == 3
    assert view.unique().item() == 1


def test_numbers_add_up():
    before = memory.stats()["in_use"]
    t = large()
    assert memory.stats()["in_use"] - before == 4 * MB
    del t
    assert memory.stats()["in_use"] == before
    assert memory.stats()["held"] == 4 * MB
    memory.empty_cache()
    assert memory.stats()["held"] == 0


def test_no_more_is_held_than_the_limit():
    memory.set_limit(9 * MB)
    tensors = [large() for _ in range(4)]
    del tensors
    assert memory.stats()["held"] == 8 * MB
    memory.set_limit(0)
    assert memory.stats()["held"] == 0
    del_me = large()
    del del_me
    assert memory.stats()["held"] == 0


def test_negative_limit():
    with pytest.raises(ValueError, match="num_bytes: expected 0 or more, got -1"):
        memory.set_limit(-1)


def test_small_tensors_are_torchs_own():
    before = memory.stats()["in_use"]
    t = memory.empty((10, 10), torch.float32, torch.device("cpu"))
    assert memory.stats()["in_use"] == before and t.shape == (10, 10)


def test_threads_share_the_pool():
    errors = []

    def work(value):
        for _ in range(50):
            t = large(300).fill_(value)
            if not (t == value).all():
                errors.append(value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def step(logits, target, **options):
    logits.grad = None
    ops.cross_entropy(logits, target, **options).backward()


def test_repeated_steps_do_not_grow(threads):
    threads(1)  # of several, one may or may not have given its scratch back before another asks
    logits, target = torch.randn(64, 50257, requires_grad=True), torch.randint(50257, (64,))
    step(logits, target)
    first = memory.stats()
    for _ in range(5):
        step(logits, target)
    assert memory.stats() == first


def torchs_peak(function) -> int:
    """Bytes beyond the start, from the profiler's record of torch's own allocations."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        function()
    total = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total)
    return most


@pytest.mark.parametrize("options", [{}, {"inplace_backward": True}], ids=["fused", "in-place"])
def test_cross_entropy_needs_one_gradient_at_most(options):
    leaf, target = torch.randn(64, 50257, requires_grad=True), torch.randint(50257, (64,))
    gradient_bytes = leaf.numel() * 4
    gc.collect()
    memory.empty_cache()
    before = memory.stats()["in_use"]

    peak = torchs_peak(lambda: step(leaf, target, **options))
    pooled = memory.stats()["in_use"] - before + memory.stats()["held"]
    slack = 4 * MB  # the pool's rounding, the scratch rows of the threads and statistics
    assert peak + pooled <= gradient_bytes + slack
    if options:
        assert pooled <= slack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_cross_entropy_needs_a_twentieth_of_the_logits(dtype, threads):
    threads(2)  # each has a block of its own
    rows, features, classes = 1024, 768, 50257  # GPT-2's: what every call holds weighs least there
    x, weight = torch.randn(rows, features).to(dtype), torch.randn(classes, features).to(dtype)
    leaves = x.requires_grad_(), weight.requires_grad_()
    target = torch.randint(classes, (rows,))
    gc.collect()
    memory.empty_cache()
    before = memory.stats()["in_use"]

    peak = torchs_peak(lambda: ops.linear_cross_entropy(*leaves, target).backward())
    pooled = memory.stats()["in_use"] - before + memory.stats()["held"]
    gradients, logits = x.nbytes + weight.nbytes, rows * classes * dtype.itemsize
    assert peak + pooled <= gradients + logits / 20
