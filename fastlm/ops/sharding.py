"""How DTensor may split the ops over a mesh of devices: rules for tensor and sequence parallelism.

A rule lists, for one dimension of a mesh, where the outputs and the inputs of a registered op may
lie; DTensor takes the cheapest and moves what lies elsewhere. Norms and gelu keep any split that
leaves their rows whole, attention one by sequences or heads. Dropout's mask follows an element's
place in the whole tensor, which a part does not know: with dropout the inputs are gathered.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

fastlm = torch.ops.fastlm


def _register(op, rule: Callable) -> None:
    """`rule(*arguments)` gives lists of the placements of all outputs and of all tensors that are
    inputs, of absent ones too; the arguments that are no tensors are filled in here.
    """
    schema = op.default._schema
    outputs = len(schema.returns)
    is_tensor = ["Tensor" in str(a.type) for a in schema.arguments]

    def placements(*arguments):
        found = []
        for way in [[Replicate()] * (outputs + sum(is_tensor)), *rule(*arguments)]:
            inputs = iter(way[outputs:])
            placed = [next(inputs) if tensor else None for tensor in is_tensor]
            present = zip(placed, arguments, strict=True)
            found.append((way[:outputs], [None if a is None else p for p, a in present]))
        return found

    register_sharding(op.default)(placements)


def _leading(x) -> list[Shard]:
    """By each dimension but the last."""
    return [Shard(dim) for dim in range(x.ndim - 1)]


_all = Replicate()


def _layer_norm(x, *_):
    return [[s, s, s, s, _all, _all] for s in _leading(x)]


def _layer_norm_backward(dy, *_):
    sums = Partial(), Partial()
    return [[s, *sums, s, s, _all, _all, s, s] for s in _leading(dy)]


def _add_layer_norm(x, residual, weight, bias, seed, *_):
    return [[s, s, s, s, s, s, _all, _all, _all] for s in _leading(x) if seed is None]


def _add_layer_norm_backward(dy, dresidual_out, residual_out, weight, bias, mean, rstd, seed, *_):
    # Without dropout dx is empty: it equals dresidual.
    sums = Partial(), Partial()
    return [[_all, s, *sums, s, s, s, _all, _all, s, s, _all] for s in _leading(dy) if seed is None]


def _rms_norm(x, *_):
    return [[s, s, s, _all] for s in _leading(x)]


def _rms_norm_backward(dy, *_):
    return [[s, Partial(), s, s, _all, s] for s in _leading(dy)]


def _gelu(x, *_):
    columns = Shard(x.ndim - 1)
    return [*([s, s, _all] for s in _leading(x)), [columns, columns, Shard(0)]]


def _gelu_backward(dy, x, bias, *_):
    columns = Shard(dy.ndim - 1)
    of_columns = _all if bias is None else Shard(0)  # without a bias its gradient is empty
    return [
        *([s, Partial(), s, s, _all] for s in _leading(dy)),
        [columns, of_columns, columns, columns, Shard(0)],
    ]


def _linear(x, weight, bias, *_):
    columns = Shard(x.ndim - 1)
    ways = [[s, s, _all, _all] for s in _leading(x)] + [[columns, _all, Shard(0), Shard(0)]]
    return ways if bias is not None else [*ways, [Partial(), columns, Shard(1), _all]]


def _attention_splits(q, k, cu_seqlens, mask, slopes, seed):
    """(of q, k, v and o; of lse; of a length for each sequence; of the mask; of the slopes)."""
    if seed is not None:
        return
    packed = cu_seqlens is not None
    per_sequence = slopes is not None and slopes.ndim == 2
    if not packed:
        yield Shard(0), Shard(0), Shard(0), Shard(0), Shard(0) if per_sequence else _all
    # Heads that share keys must stay beside them.
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if heads == kv_heads or kv_heads % math.prod(q.mesh.shape) == 0:
        yield (
            Shard(q.ndim - 2), Shard(0 if packed else 1), _all, Shard(1),
            Shard(1 if per_sequence else 0),
        )  # fmt: skip


def _attention(q, k, v, cu_q, cu_k, seqlens_k, mask, slopes, seed, *_):
    splits = _attention_splits(q, k, cu_q, mask, slopes, seed)
    return [[x, lse, x, x, x, _all, _all, n, m, s, _all] for x, lse, n, m, s in splits]


def _attention_backward(dout, dlse, q, k, v, o, lse, cu_q, cu_k, mask, slopes, seed, *_):
    return [
        [x, x, x, x, lse, x, x, x, x, lse, _all, _all, m, s, _all]
        for x, lse, _, m, s in _attention_splits(q, k, cu_q, mask, slopes, seed)
    ]


def _no_split(*_):
    return []


@functools.cache
def register() -> None:
    """Tell DTensor the rules, once."""
    _register(fastlm.layer_norm_forward, _layer_norm)
    _register(fastlm.layer_norm_backward, _layer_norm_backward)
    _register(fastlm.add_layer_norm_forward, _add_layer_norm)
    _register(fastlm.add_layer_norm_backward, _add_layer_norm_backward)
    _register(fastlm.rms_norm_forward, _rms_norm)
    _register(fastlm.rms_norm_backward, _rms_norm_backward)
    _register(fastlm.gelu_forward, _gelu)
    _register(fastlm.gelu_backward, _gelu_backward)
    _register(fastlm.linear_forward, _linear)
    _register(fastlm.dropout, _no_split)
    _register(fastlm.attention_forward, _attention)
    _register(fastlm.attention_backward, _attention_backward)


def seed_for(x: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """`seed`, and for a DTensor the first device's on every device of its mesh."""
    if not isinstance(x, DTensor):
        return seed
    everywhere = [Replicate()] * x.device_mesh.ndim
    return DTensor.from_local(seed, x.device_mesh, everywhere, run_check=True)
