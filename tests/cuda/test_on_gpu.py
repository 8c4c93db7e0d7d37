"""What only a GPU can show: graphs, streams, devices, and the same bits at every run."""

import pytest
import torch

import fastlm
from fastlm import ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


def step(x, weight, bias, target):
    """Every kind of launch: workspaces, persistent grids, attention, the loss in one sweep."""
    normed = ops.layer_norm(x, (x.shape[-1],), weight, bias)
    heads = normed.view(2, 96, 4, 64)
    o = ops.attention(heads, heads, heads, causal=True).reshape(-1, 256)
    loss = ops.cross_entropy(ops.gelu(o, approximate="tanh"), target, reduction="none").sum()
    return (loss, *torch.autograd.grad(loss, (x, weight, bias)))


@pytest.fixture
def inputs():
    with torch.device("cuda"):
        x = torch.randn(192, 256, dtype=torch.bfloat16, requires_grad=True)
        weight, bias = (torch.randn(256).bfloat16().requires_grad_() for _ in range(2))
        return x, weight, bias, torch.randint(256, (192,))


@pytest.fixture(autouse=True)
def cuda_kernels():
    with fastlm.use("cuda"):
        yield


def same_bits(found, wanted):
    return all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


def test_same_bits_at_every_run(inputs):
    first = step(*inputs)
    assert all(same_bits(step(*inputs), first) for _ in range(5))


def test_graph_replays_on_new_values(inputs):
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*inputs)
    with torch.no_grad():
        inputs[0].copy_(torch.randn_like(inputs[0]))
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(captured, step(*inputs))


def test_launches_go_to_the_current_stream(inputs):
    """Work of a slow stream is waited for by what comes after it there, and by nothing else."""
    wanted = step(*inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late = inputs[0].detach().clone().requires_grad_()
        found = step(late, *inputs[1:])
    side.synchronize()
    assert same_bits(found, wanted)


def test_second_device(inputs):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    moved = [t.detach().to("cuda:1").requires_grad_(t.requires_grad) for t in inputs]
    found = step(*moved)  # while cuda:0 is the current device
    assert same_bits([t.to("cuda:0") for t in found], step(*inputs))
