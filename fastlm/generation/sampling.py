"""From the logits of the last position to the next token."""

import torch
from torch import Tensor


def filter_logits(logits: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """logits (B, V), scaled, with -inf where a token may not be drawn.

    In transformers' order: temperature, then the top_k largest, then the smallest set of tokens
    that holds top_p of the probability (Holtzman et al., 2020, "The Curious Case of Neural Text
    Degeneration"). top_k None or 0 and top_p 1.0 leave all.
    """
    logits = logits / temperature
    if top_k:
        kth_largest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth_largest, -torch.inf)
    if top_p < 1.0:
        ascending, order = logits.sort(dim=-1)
        below = ascending.softmax(-1).cumsum(-1)
        drop = below <= 1 - top_p
        drop[..., -1] = False  # the likeliest token stays, however small top_p is
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return logits


def draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """(B,) token ids drawn from softmax(logits)."""
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
