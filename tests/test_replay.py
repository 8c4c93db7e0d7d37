"""Recorded steps: the same results on new values, and what cannot be recorded."""

import pytest
import torch
from cases import BF16, F32

from fastlm import _cpu, ops
from fastlm.replay import NotReplayable, Replay


def step(x, residual, weight, cache, lengths):
    """A small layer, with every op that decoding uses and a few of torch's."""
    normed, residual = ops.add_layer_norm(x, residual, weight[0], weight[0] + 1)
    q, k, v = ops.linear(normed, torch.cat([weight] * 3)).view(2, 1, 3, 2, 8).unbind(2)
    y = ops.attention_with_kvcache(q, *cache, k, v, lengths)
    hidden = ops.gelu(ops.linear(y.reshape(2, 1, 16), weight.t()), "tanh", bias=weight[1])
    lengths += 1
    return ops.rms_norm(ops.layer_norm(hidden, 16), 16), residual * 2


def tensors(dtype):
    torch.manual_seed(0)
    x, residual, weight = (torch.randn(*s).to(dtype) for s in ((2, 1, 16), (2, 1, 16), (16, 16)))
    cache = [torch.zeros(2, 9, 2, 8, dtype=dtype) for _ in range(2)]
    return x, residual, weight, cache, torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_replays_equal_plain_runs(dtype, cpp):
    plain, recorded = tensors(dtype), tensors(dtype)
    with torch.no_grad():
        wanted = step(*plain)
        replay = Replay(step, *recorded)
        for _ in range(6):
            for found, want in zip(replay.result, wanted, strict=True):
                assert torch.equal(found, want)
            assert torch.equal(recorded[-1], plain[-1])
            new = torch.randn_like(plain[0])
            plain[0].copy_(new)
            recorded[0].copy_(new)
            garbage = [torch.full((2, 1, 48), torch.nan, dtype=dtype) for _ in range(50)]
            wanted = step(*plain)
            replay.run()
            del garbage


REFUSED = {
    "a value read back": lambda x: x * float(x.sum().item()),
    "shapes that depend on values": lambda x: x[x > 0],
    "an op that does more than call kernels": lambda x: ops.linear_cross_entropy(
        x, x, torch.zeros(4, dtype=torch.int64)
    ),
}


@pytest.mark.parametrize("function", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_recorded(function):
    with pytest.raises(NotReplayable):
        Replay(function, torch.randn(4, 4))


def test_the_reference_cannot_be_recorded():
    with pytest.raises(NotReplayable, match="gelu_forward on torch"):
        Replay(ops.gelu, torch.randn(4).half())


def test_recording_ends_and_calls_the_kernels_themselves():
    x = torch.randn(3, 8)
    replay = Replay(ops.gelu, x)
    assert [function for function, _ in replay._steps] == [_cpu.gelu_forward]
    ops.gelu(x)
    assert len(replay._steps) == 1
