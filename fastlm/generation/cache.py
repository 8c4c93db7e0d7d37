"""The keys and values of past tokens, in memory that is allocated ahead of them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class KVCache:
    """Per layer keys and values (B, capacity, heads, head_dim); row b holds `lengths[b]` tokens.

    Rows hold real tokens only and start at slot 0, so prompts of different lengths need no mask:
    what lies past a row's length is never read, and the next token overwrites it. A cache that is
    full grows; one made with room for all tokens stays where it is, as torch.compile wants it.
    """

    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor  # (B,) int32, on the device
    longest: int = 0  # an upper bound of lengths, known without asking the device

    @classmethod
    def for_model(cls, model, batch: int, capacity: int) -> "KVCache":
        """An empty cache for `model`, in the dtype in which its attention runs."""
        config, weight = model.config, next(model.parameters())
        dtype, device = weight.dtype, weight.device
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        shape = (batch, capacity, config.n_head, config.n_embd // config.n_head)
        keys, values = (
            [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
            for _ in range(2)
        )
        return cls(keys, values, torch.zeros(batch, dtype=torch.int32, device=device))

    @classmethod
    def from_legacy_cache(cls, layers) -> "KVCache":
        """Of a tuple with a pair (keys, values) per layer, each (B, heads, tokens, head_dim)."""
        pairs = zip(*layers, strict=True)
        keys, values = ([t.transpose(1, 2).contiguous() for t in each] for each in pairs)
        batch, length = keys[0].shape[:2]
        lengths = torch.full((batch,), length, dtype=torch.int32, device=keys[0].device)
        return cls(keys, values, lengths, length)

    def to_legacy_cache(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """What `from_legacy_cache` takes; the rows must be equally long."""
        n = self.longest
        return tuple(
            (k[:, :n].transpose(1, 2), v[:, :n].transpose(1, 2))
            for k, v in zip(self.keys, self.values, strict=True)
        )

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[1]

    def get_seq_length(self) -> int:
        """Tokens in the longest row (the name transformers' caches have for it)."""
        return self.longest

    def make_room(self, length: int) -> None:
        """Grows, by half or more, where `length` more tokens would not fit."""
        if self.longest + length <= self.capacity:
            return
        room = max(self.longest + length, self.capacity * 3 // 2) - self.capacity
        self.keys, self.values = (
            [F.pad(t, (0, 0, 0, 0, 0, room)) for t in tensors]
            for tensors in (self.keys, self.values)
        )

    def write(self, layer: int, k: Tensor, v: Tensor, packing=None) -> None:
        """Stores k, v (B, T, heads, head_dim), or packed (1, N, ...), behind what each row holds.

        Without a packing the cache is empty.
        """
        if packing is None:
            place: tuple = (slice(None), slice(k.shape[1]))
        else:
            place, k, v = packing.slots(self.lengths), k[0], v[0]
        self.keys[layer][place] = k.detach().to(self.keys[layer].dtype)
        self.values[layer][place] = v.detach().to(self.values[layer].dtype)

    def packed(self, layer: int, packing) -> tuple[Tensor, Tensor, Tensor]:
        """All rows' keys and values, (tokens, heads, head_dim), and where each row begins.

        The tokens of `packing` have been written, and not yet counted.
        """
        totals = self.lengths + packing.lengths
        used = torch.arange(self.capacity, device=totals.device) < totals[:, None]
        cu_seqlens = F.pad(totals.cumsum(0), (1, 0)).to(torch.int32)
        return self.keys[layer][used], self.values[layer][used], cu_seqlens

    def with_new_keys(self, layer: int, k: Tensor, packing=None) -> Tensor:
        """(B, longest + T, heads, head_dim): the layer's keys and behind them k, not yet stored."""
        batch, length = k.shape[:2]
        keys = F.pad(self.keys[layer][:, : self.longest], (0, 0, 0, 0, 0, length))
        mask = k.new_ones(batch, length, dtype=torch.bool) if packing is None else packing.mask
        slot = (self.lengths[:, None] + mask.cumsum(1) - 1).clamp_min(0)
        row = torch.arange(batch, device=k.device)[:, None].expand_as(slot)
        return keys.index_put((row[mask], slot[mask]), k[mask].to(keys.dtype))

    def advance(self, length: int, packing=None) -> None:
        """Counts the `length` tokens just written to every row, or those of the packing."""
        if packing is None:
            self.lengths += length
            self.longest += length
        else:
            self.lengths += packing.lengths.to(torch.int32)
            compiling = torch.compiler.is_compiling()
            self.longest = self.longest + length if compiling else int(self.lengths.max())

    def crop(self, length: int) -> None:
        """Forgets all but the first `length` tokens of every row."""
        self.lengths.clamp_(max=length)
        self.longest = min(self.longest, length)

    def select(self, rows: Tensor) -> "KVCache":
        """A cache of copies of those rows, in that order: for beams and several continuations."""
        keys, values = (
            [t.index_select(0, rows) for t in tensors] for tensors in (self.keys, self.values)
        )
        return KVCache(keys, values, self.lengths[rows], self.longest)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was, in place."""
        n = self.longest
        for tensors in (self.keys, self.values):
            for t in tensors:
                t[:, :n] = t[:, :n].index_select(0, beam_idx)
        self.lengths.copy_(self.lengths[beam_idx])


class _RefuseBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, q):
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        raise RuntimeError(
            "GPT2Model: past_key_values: got backward through a filled cache, accepted is forward "
            "only: the gradient of the cached tokens is not kept (call it without a cache to train)"
        )


def refuse_backward(y: Tensor, q: Tensor) -> Tensor:
    """y, which has no gradient; where q has one, asking for it is an error and not a silent 0."""
    return _RefuseBackward.apply(y, q) if torch.is_grad_enabled() and q.requires_grad else y
