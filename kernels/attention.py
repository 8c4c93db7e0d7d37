"""attention, its backward, and the cache of decoding, in Triton: csrc/attention.h says what is
computed and saved. Here are the launches; the kernels are in the files beside this one.
"""

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .attention_backward import attention_backward_dkv_kernel, attention_backward_dq_kernel
from .attention_forward import attention_combine_kernel, attention_forward_kernel
from .cache_append import cache_append
from .launch import divisor, launch
from .philox import dropout_rule
from .tuning import tuned

__all__ = ["AttentionOptions", "attention_backward", "attention_forward", "cache_append"]

LOG2E = math.log2(math.e)
UNBOUNDED = 2**30  # a window wider than any sequence, to which a position can still be added
_FEW = 16  # queries, up to which the keys are cut into parts, at most _MAX_SPLITS
_MAX_SPLITS = 32


@dataclass(frozen=True)
class AttentionOptions:
    """Everything of a call that is not q, k or v; the arguments of csrc/bindings.h."""

    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    seqlens_k: Tensor | None
    attn_mask: Tensor | None
    alibi_slopes: Tensor | None
    seed: Tensor | None
    max_queries: int
    max_keys: int
    softmax_scale: float
    softcap: float
    window_left: int
    window_right: int
    dropout_p: float


# (queries, keys, warps, pipeline stages) of a tile, by head_dim up to; the second column is for
# calls with softcap, bias or dropout, whose arithmetic takes registers of its own.
#
# 16-bit tiles go to tensor cores, 64 rows at a time on sm_90: as large as fit in registers, of
# which tests/triton_kernels/resources.csv has the count, and longer on the side that stays in them.
_BLOCKS = {
    "forward": {64: ((128, 64, 8, 3), (128, 32, 8, 2)), 128: ((128, 64, 8, 2), (64, 32, 8, 2)),
                256: ((64, 32, 8, 2), (64, 32, 8, 2))},
    "dq": {64: ((64, 64, 8, 2), (32, 64, 8, 2)), 128: ((64, 64, 8, 2), (32, 32, 8, 1)),
           256: ((32, 32, 8, 1), (16, 32, 8, 1))},
    "dkv": {64: ((32, 64, 4, 2), (32, 32, 8, 2)), 128: ((32, 64, 8, 2), (16, 32, 8, 1)),
            256: ((32, 32, 8, 1), (16, 32, 8, 1))},
}  # fmt: skip


def blocks_of(
    kernel: str, q: Tensor, head_dim: int, queries: int, special: bool, biased: bool = False
) -> dict[str, int]:
    """Tile, warps and stages of a kernel ("forward", "dq", "dkv") for a head_dim, the larger one of
    keys and values, up to 256.

    float32 is multiplied element by element from registers, by unrolled code: small tiles. Few
    queries, as in decoding, need no more than the 16 rows of one tensor-core instruction.
    """
    block_d = max(32, triton.next_power_of_2(head_dim))
    few = kernel == "forward" and queries <= _FEW
    special = special or biased
    m, n, warps, stages = _BLOCKS[kernel][max(block_d, 64)][special]
    # A mask's tile and its addresses take registers of their own.
    m = max(m // 2, _FEW) if biased else m
    if q.dtype == torch.float32:
        m, n, warps, stages = (32, 32, 4, 1) if block_d <= 64 else (16, 16, 8, 1)
    elif few:
        m, warps = _FEW, 4
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    facts = {
        "dtype": q.dtype,
        "head_dim": block_d,
        "few_queries": few,
        "special": special,
        "biased": biased,
    }
    return {"BLOCK_D": block_d, **tuned(f"attention {kernel}", sizes, **facts)}


def splits_of(batch: int, queries: int, heads: int, keys: int) -> int:
    """Parts that the keys are cut into where there are few queries: as many as give each of about
    132 multiprocessors two programs, of at least 128 keys. Sizes alone decide, so that the same
    call always adds in the same order.
    """
    if queries > _FEW:
        return 1
    wanted = triton.cdiv(264, max(batch * heads, 1))
    return max(1, min(wanted, triton.cdiv(keys, 128), _MAX_SPLITS))


def headroom_of(dtype: torch.dtype, keys: int) -> float:
    """By how much, in base 2, exponentials are made smaller, so that their sum with large values
    overflows nowhere before it is divided. Values below 2^-90 are rounded more for it. float16's
    are too small to overflow, and its exponentials must not become smaller.
    """
    return 0.0 if dtype == torch.float16 else float(max(keys, 1).bit_length())


def _strides(t: Tensor) -> tuple[int, int, int]:
    """Those of batch, row and head; packed tensors have no batch."""
    return (t.stride(0) if t.dim() == 4 else 0, t.stride(-3), t.stride(-2))


class _Call:
    """What the kernels take besides tensors: strides, sizes and options."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, options: AttentionOptions):
        self.packed, o = q.dim() == 3, options
        self.batch = o.cu_seqlens_q.numel() - 1 if self.packed else q.shape[0]
        self.queries, self.keys = (
            (o.max_queries, o.max_keys) if self.packed else (q.shape[1], k.shape[1])
        )
        self.heads, self.kv_heads = q.shape[-2], k.shape[-2]
        self.head_dim, self.value_head_dim = q.shape[-1], v.shape[-1]
        self.lse_strides = (0 if self.packed else q.shape[-2] * q.shape[-3], q.shape[-3])
        self.biased = o.attn_mask is not None or o.alibi_slopes is not None
        self.options = o.softcap > 0 or o.seed is not None
        self.scale = (o.softmax_scale * LOG2E, o.softcap * LOG2E)
        self.window = [UNBOUNDED if w < 0 else w for w in (o.window_left, o.window_right)]
        self.dropout = (o.seed is not None, *dropout_rule(o.dropout_p))
        unused = lse.view(torch.int32)  # stands for absent offsets; it is not read
        self.offsets = [unused if t is None else t for t in (o.cu_seqlens_q, o.cu_seqlens_k)]
        self.lengths = unused if o.seqlens_k is None else o.seqlens_k
        self.has_lengths = o.seqlens_k is not None
        # Where the kernel has a place for dropout but there is none: any int64.
        self.seed = o.seed
        if self.options and o.seed is None:
            self.seed = torch.zeros(1, dtype=torch.int64, device=q.device)
        self.bias = self._bias(q, o)

    def _bias(self, q: Tensor, o: AttentionOptions) -> tuple:
        """Of the kernels' parameters those about the mask and ALiBi. A tensor that is not there is
        None only where the kernel has no place for it.
        """
        mask, slopes = o.attn_mask, o.alibi_slopes
        mask_strides = (0,) * 4 if mask is None else mask.stride()
        slope_stride = self.heads if slopes is not None and slopes.dim() == 2 else 0
        has_mask, has_slopes = mask is not None, slopes is not None
        if self.biased:
            mask = q if mask is None else mask
            slopes = q.new_empty(1, dtype=torch.float32) if slopes is None else slopes
        return mask, slopes, *mask_strides, slope_stride, has_mask, has_slopes

    def constants(self, strides: list[int], blocks: dict[str, int]) -> dict[str, int]:
        return {
            "OPTIONS": self.options,
            "BIAS": self.biased,
            "DIVISOR": divisor(*strides, self.head_dim, self.value_head_dim, of=8),
            **blocks,
        }

    def blocks(self, kernel: str, q: Tensor) -> dict[str, int]:
        widest = max(self.head_dim, self.value_head_dim)
        return blocks_of(kernel, q, widest, self.queries, self.options, self.biased)


def attention_forward(o, lse, q, k, v, options: AttentionOptions, where) -> None:
    """o of q's shape with v's head_dim; lse float64 (batch, heads, queries) or (heads, tokens). A
    query that sees no key gives 0 and -inf.
    """
    call = _Call(q, k, v, lse, options)
    blocks = call.blocks("forward", q)
    splits = 1 if call.packed else splits_of(call.batch, call.queries, call.heads, call.keys)
    part_o, part_lse = o, lse
    if splits > 1:
        part_o = torch.empty(
            (call.batch * splits, *o.shape[1:]), dtype=torch.float32, device=q.device
        )
        part_lse = torch.empty(
            (call.batch * splits, *lse.shape[1:]), dtype=lse.dtype, device=q.device
        )
    strides = [s for t in (part_o, q, k, v) for s in _strides(t)]
    launch(
        attention_forward_kernel,
        (triton.cdiv(call.queries, blocks["BLOCK_M"]), call.heads, call.batch * splits),
        part_o, part_lse, q, k, v, *strides, splits, *call.offsets, call.lengths, call.seed,
        *call.bias, *call.lse_strides, call.queries, call.keys, call.heads,
        call.heads // call.kv_heads, call.head_dim, call.value_head_dim, call.packed,
        call.has_lengths, *call.scale, headroom_of(q.dtype, call.keys), *call.window, *call.dropout,
        **call.constants(strides, blocks),
    )  # fmt: skip
    if splits > 1:
        launch(
            attention_combine_kernel, (call.queries, call.heads, call.batch), o, lse, part_o,
            part_lse, *_strides(o), splits, call.queries, call.heads, call.value_head_dim,
            SPLITS=_MAX_SPLITS, BLOCK_D=blocks["BLOCK_D"], num_warps=4,
        )  # fmt: skip


def attention_backward(
    dq, dk, dv, dout, dlse, q, k, v, o, lse, options: AttentionOptions, where
) -> None:
    """dq, dk, dv; no order of additions depends on the device or on luck. dlse is like lse, or
    None.
    """
    call = _Call(q, k, v, lse, options)
    blocks = call.blocks("dq", q)
    delta = torch.empty_like(lse, dtype=torch.float32)
    shared = (
        *call.offsets, call.seed, *call.bias, *call.lse_strides, call.queries, call.keys,
        call.heads // call.kv_heads, call.head_dim, call.value_head_dim, call.packed, *call.scale,
        *call.window, *call.dropout,
    )  # fmt: skip
    strides = [s for t in (dq, dout, q, k, v, o) for s in _strides(t)]
    launch(
        attention_backward_dq_kernel,
        (triton.cdiv(call.queries, blocks["BLOCK_M"]), call.heads, call.batch),
        dq, delta, dout, lse if dlse is None else dlse, dlse is not None, q, k, v, o, lse,
        *strides, *shared, **call.constants(strides, blocks),
    )  # fmt: skip
    blocks = call.blocks("dkv", q)
    strides = [s for t in (dk, dv, dout, q, k, v) for s in _strides(t)]
    launch(
        attention_backward_dkv_kernel,
        (triton.cdiv(call.keys, blocks["BLOCK_N"]), call.kv_heads, call.batch),
        dk, dv, delta, dout, q, k, v, lse, *strides, *shared, **call.constants(strides, blocks),
    )  # fmt: skip
