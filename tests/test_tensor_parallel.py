"""DTensor: ops on tensors that are split over a mesh give what they give on whole ones."""

import torch
import torch.distributed as dist
from cases import randn
from torch.distributed.tensor import DeviceMesh, DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from fastlm import ops

WORLD = 2


def attention(q, k, v, **options):
    return ops.attention(q, k, v, causal=True, **options)


@torch.no_grad()
def linear(x, weight, bias=None):
    """Its kernel has no gradient, and float32 alone."""
    return ops.linear(x[:1].float(), weight.float(), None if bias is None else bias.float())


def masked(q, k, v, attn_mask):
    return ops.attention(q, k, v, attn_mask=attn_mask)


def biased(q, k, v, alibi_slopes):
    return ops.attention(q, k, v, alibi_slopes=alibi_slopes, return_lse=True)


def seeded(x):
    """Generators differ, as those of processes do; the first process's seed holds for all."""
    torch.manual_seed(dist.get_rank() if isinstance(x, DTensor) else 0)
    return ops.dropout(x, 0.5)


X, ROW = (4, 6, 8), (8,)
Q, KV, GROUPED = (2, 5, 4, 8), (2, 5, 4, 8), (2, 5, 2, 8)
BATCH, HEADS, ALL = Shard(0), Shard(2), Replicate()
# (the call, shapes of its inputs, where each lies): nothing has to be moved.
CALLS = {
    "layer_norm rows": (lambda x, w, b: ops.layer_norm(x, 8, w, b), (X, ROW, ROW),
                        (Shard(1), ALL, ALL)),
    "layer_norm plain": (lambda x: ops.layer_norm(x, 8), (X,), (Shard(0),)),
    "add_layer_norm": (ops.add_layer_norm, (X, X, ROW, ROW), (Shard(1), Shard(1), ALL, ALL)),
    "rms_norm": (lambda x, w: ops.rms_norm(x, 8, w), (X, ROW), (Shard(1), ALL)),
    "gelu columns": (lambda x, b: ops.gelu(x, "tanh", bias=b), (X, ROW), (HEADS, BATCH)),
    "gelu rows": (lambda x, b: ops.gelu(x, bias=b), (X, ROW), (BATCH, ALL)),
    "gelu plain": (ops.gelu, (X,), (HEADS,)),
    "linear columns": (linear, (X, (6, 8), (6,)), (ALL, BATCH, BATCH)),
    "linear rows": (linear, (X, (6, 8)), (HEADS, Shard(1))),
    "attention batch": (attention, (Q, KV, KV), (BATCH,) * 3),
    "attention heads": (attention, (Q, KV, KV), (HEADS,) * 3),
    "attention groups": (attention, (Q, GROUPED, GROUPED), (HEADS,) * 3),
    "attention mask": (masked, (Q, KV, KV, (2, 4, 5, 5)), (HEADS,) * 3 + (Shard(1),)),
    "attention bias": (biased, (Q, KV, KV, (4,)), (HEADS,) * 3 + (BATCH,)),
}  # fmt: skip
# What cannot stay as it is split is moved by DTensor.
MOVED = {
    "layer_norm columns": (lambda x, w: ops.layer_norm(x, 8, w), (X, ROW), (HEADS, ALL)),
    "attention one group": (attention, (Q, (2, 5, 1, 8), (2, 5, 1, 8)), (HEADS, ALL, ALL)),
    "attention keys": (attention, (Q, KV, KV), (BATCH, Shard(1), Shard(1))),
    "dropout": (seeded, (X,), (BATCH,)),
    "attention dropout": (
        lambda q, k, v: ops.attention(q, k, v, dropout_p=0.5, seed=torch.tensor(3)),
        (Q, KV, KV), (HEADS,) * 3,
    ),
    "add_layer_norm dropout": (
        lambda x, y: ops.add_layer_norm(x, y, dropout_p=0.5, seed=torch.tensor(3)),
        (X, X), (BATCH, BATCH),
    ),
}  # fmt: skip


def values_and_gradients(function, inputs):
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((whole(o) * torch.arange(o.shape[-1])).sum() for o in outputs)
    if not total.requires_grad:
        return outputs
    return *outputs, *torch.autograd.grad(total, [t for t in inputs if t.requires_grad])


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def compare(name, mesh, function, shapes, places):
    needs_gradient = {"attention mask": 3, "attention bias": 3}.get(name, len(shapes))
    inputs = [randn(*s).requires_grad_(i < needs_gradient) for i, s in enumerate(shapes)]
    split = [
        distribute_tensor(t.detach(), mesh, [place]).requires_grad_(t.requires_grad)
        for t, place in zip(inputs, places, strict=True)
    ]
    with CommDebugMode() as communication:
        function(*split)
    if name in CALLS:
        assert communication.get_total_counts() == 0, name
    wanted = values_and_gradients(function, inputs)
    found = values_and_gradients(function, split)
    for ours, truth in zip(found, wanted, strict=True):
        torch.testing.assert_close(whole(ours), truth, msg=lambda m: f"{name}: {m}")


def one_process(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    try:
        mesh = DeviceMesh("cpu", list(range(WORLD)))
        for name, call in (CALLS | MOVED).items():
            torch.manual_seed(0)
            compare(name, mesh, *call)
    finally:
        dist.destroy_process_group()


def test_split_tensors_give_what_whole_ones_give(tmp_path):
    torch.multiprocessing.spawn(one_process, (tmp_path / "meeting",), nprocs=WORLD)
