"""The keys and values of past tokens, in memory allocated once for the whole generation."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class KVCache:
    """Per layer keys and values (B, capacity, heads, head_dim); row b holds `lengths[b]` tokens.

    Rows hold real tokens only and start at slot 0, so prompts of different lengths need no mask:
    what lies past a row's length is never read, and the next token overwrites it.
    `ops.attention_with_kvcache` writes the entries; `advance` counts them once all layers have.
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

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[1]

    def get_seq_length(self) -> int:
        """Tokens in the longest row (the name transformers' caches have for it)."""
        return self.longest

    def advance(self, length: int, mask: Tensor | None) -> None:
        """Counts the `length` tokens just written to every row, or those real in mask (B, T)."""
        if mask is None:
            self.lengths += length
            self.longest += length
        else:
            self.lengths += mask.sum(1).to(torch.int32)
            self.longest = int(self.lengths.max())

    def repeat_interleave(self, repeats: int) -> "KVCache":
        """Each row `repeats` times, for several continuations of one prompt."""
        keys, values = (
            [t.repeat_interleave(repeats, 0) for t in tensors]
            for tensors in (self.keys, self.values)
        )
        return KVCache(keys, values, self.lengths.repeat_interleave(repeats), self.longest)
