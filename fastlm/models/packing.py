"""A padded batch without its padding: the real tokens of all rows, one row after the other.

Padding then costs nothing and is seen by nobody, on whichever side it is, and attention needs no
mask: it is told where each sequence begins.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Packing:
    """Where the N real tokens of a (B, T) batch stand, and how long each row's sequence is."""

    mask: Tensor  # (B, T) bool, True for real tokens
    order: Tensor  # (N,) int64 places in the flattened batch
    lengths: Tensor  # (B,) int64
    cu_seqlens: Tensor  # int32 offsets of the sequences
    longest: int

    def __post_init__(self):
        # Of the keys, which are the same: torch.compile does not take one tensor twice.
        self.cu_seqlens_k = self.cu_seqlens.clone()

    @classmethod
    def of(cls, mask: Tensor) -> "Packing":
        """The packing of mask (B, T), bool.

        Under torch.compile shapes cannot depend on values: there the padding is kept, as one more
        sequence after the others.
        """
        lengths = mask.sum(1)
        if torch.compiler.is_compiling():
            order = mask.flatten().logical_not().to(torch.uint8).argsort(stable=True)
            padding = mask.numel() - lengths.sum(0, keepdim=True)
            cu_seqlens = offsets(torch.cat([lengths, padding]))
            return cls(mask, order, lengths, cu_seqlens, mask.numel())
        order = mask.flatten().nonzero().squeeze(1)
        return cls(mask, order, lengths, offsets(lengths), int(lengths.max()))

    def pack(self, x: Tensor) -> Tensor:
        """(1, N, ...) of x (B, T, ...)."""
        return x.flatten(0, 1)[self.order][None]

    def unpack(self, x: Tensor) -> Tensor:
        """(B, T, ...) of x (1, N, ...), with zeros for padding."""
        flat = x.new_zeros(self.mask.numel(), *x.shape[2:])
        return flat.index_copy(0, self.order, x[0]).unflatten(0, self.mask.shape)

    def slots(self, cached: Tensor) -> tuple[Tensor, Tensor]:
        """(row, slot) of each real token in a cache whose rows hold `cached` (B,) tokens."""
        row = self.order // self.mask.shape[1]
        place = self.mask.cumsum(1).flatten()[self.order] - 1
        return row, cached[row] + place


def offsets(lengths: Tensor) -> Tensor:
    """int32 (B + 1,): where sequences of those lengths begin and end, one after the other."""
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
