"""attention in Gluon for GPUs of compute capability 9.0: csrc/attention.h says what is computed.
Here is the launch; the kernel is in attention_hopper_forward.py. Backward is that of attention.py,
which takes any forward's residuals.
"""

import math

import torch
from torch import Tensor

try:
    from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .attention_hopper_forward import BLOCK_M, attention_hopper_forward_kernel
except (ImportError, AttributeError) as missing:
    raise ImportError(f"needs triton 3.6 or later, with Gluon for Hopper ({missing})") from missing
from .attention import LOG2E, UNBOUNDED, AttentionOptions, attention_backward, headroom_of
from .launch import launch
from .tuning import tuned

__all__ = ["AttentionOptions", "attention_backward", "attention_forward"]

_ROWS = 64  # of a box of q and o: the queries of one warpgroup
# Of the L2 cache, for keys and values that are read again by other tiles; an H100 has 50 MB.
_L2_BYTES = 36 << 20
_EMULATED_MULTIPROCESSORS = 4


def blocks_of(dtype: torch.dtype, block_d: int) -> dict[str, int]:
    """Tiles of keys, and how many of those and of queries are in flight.

    128 keys, because each tile costs a warpgroup two waits and one scaling of o; 64 would waste
    less of a causal triangle (0.94 useful at 1024 and not 0.89). Three stages, or what 227 KB of
    shared memory hold with heads of 128. 240 registers for each of two warpgroups and 24 for the
    loading one are all there are.
    """
    wide = block_d > 64
    sizes = {"BLOCK_N": 128, "STAGES": 2 if wide else 3, "Q_STAGES": 1 if wide else 2}
    sizes = tuned("attention_hopper forward", sizes, dtype=dtype, head_dim=block_d)
    return {**sizes, "CONSUMER_REGISTERS": 240, "num_warps": 4}


def together_of(keys_bytes: int, group: int, programs: int) -> int:
    """Pairs of batch and head that are gone through together: as many as leave their keys and
    values, which `group` heads share, in the L2 cache; and a multiple of the programs or a whole
    part of them, so that the rows of one length make up whole rounds. With 32 x 12 heads and 1024
    queries the last of 132 programs has 0.5 % more to do than the mean; 3 % if 128 pairs, which
    just fit, went together and every round ran forwards.
    """
    fit = max(1, _L2_BYTES // keys_bytes) * group
    if fit >= programs:
        return fit // programs * programs
    return max(1, programs // -(-programs // fit))


def _described(t: Tensor, rows: int, block_d: int) -> TensorDescriptor:
    """(batch, sequence, heads, head_dim) in boxes of `rows` of one head. The stride of a dimension
    of one is never used, and may be anything where TMA wants multiples of 16 bytes.
    """
    strides = list(t.stride())
    for i in reversed(range(3)):
        if t.shape[i] == 1:
            strides[i] = t.shape[i + 1] * strides[i + 1]
    box = [1, rows, 1, block_d]
    layout = NVMMASharedLayout.get_default_for(box, bfloat16)  # float16 has its size
    return TensorDescriptor(t, list(t.shape), strides, box, layout)


def _multiprocessors(device: torch.device) -> int:
    """As many programs as there are: none has room for two."""
    if device.type != "cuda":
        return _EMULATED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def attention_forward(o, lse, q, k, v, options: AttentionOptions, where) -> None:
    """o like q; lse float64 (batch, heads, queries). A query that sees no key gives 0 and -inf.

    Raises ValueError for an address that TMA does not take.
    """
    (batch, queries, heads, head_dim), (keys, kv_heads) = q.shape, k.shape[1:3]
    if 0 in (batch, queries, keys):
        o.zero_(), lse.fill_(-math.inf)
        return
    for name, t in (("q", q), ("k", k), ("v", v), ("o", o)):
        if t.data_ptr() % 16:
            raise ValueError(
                f"attention: {name}: on gluon expected memory that begins at a multiple of 16, "
                f"got {t.data_ptr():#x}"
            )
    block_d = 64 if head_dim <= 64 else 128
    blocks = blocks_of(q.dtype, block_d)
    programs, keys_bytes = _multiprocessors(q.device), 2 * keys * head_dim * q.element_size()
    together = together_of(keys_bytes, heads // kv_heads, programs)
    windows = [UNBOUNDED if w < 0 else w for w in (options.window_left, options.window_right)]
    tiles = -(-queries // BLOCK_M.value) * batch * heads
    launch(
        attention_hopper_forward_kernel,
        (min(tiles, programs),),
        _described(q, _ROWS, block_d), _described(k, blocks["BLOCK_N"], block_d),
        _described(v, blocks["BLOCK_N"], block_d), _described(o, _ROWS, block_d), lse,
        options.softmax_scale * LOG2E, headroom_of(q.dtype, keys), queries, keys, batch * heads,
        heads, heads // kv_heads, together, *windows, **blocks,
    )  # fmt: skip
