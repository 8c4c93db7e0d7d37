"""From the scores of the next token to the token."""

import torch
from torch import Tensor

from .config import GenerationConfig


def filter_logits(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float,
    *,
    min_p: float = 0.0,
    typical_p: float = 1.0,
    keep: int = 1,
) -> Tensor:
    """logits (B, V), scaled, with -inf where a token may not be drawn; `keep` may always be.

    In transformers' order: temperature; the top_k largest; the smallest set of tokens that holds
    top_p of the probability (Holtzman et al., 2020, "The Curious Case of Neural Text
    Degeneration"); those with min_p times the likeliest's probability (Nguyen et al., 2024,
    "Turning Up the Heat"); those whose surprise is closest to the expected one and that hold
    typical_p (Meister et al., 2023, "Locally Typical Sampling"). top_k None or 0, top_p 1.0, min_p
    0.0 and typical_p 1.0 leave all.
    """
    logits = logits / temperature
    if top_k:
        count = min(max(top_k, keep), logits.shape[-1])
        kth_largest = logits.topk(count, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth_largest, -torch.inf)
    if top_p < 1.0:
        ascending, order = logits.sort(dim=-1)
        below = ascending.softmax(-1).cumsum(-1)
        drop = below <= 1 - top_p
        drop[..., -keep:] = False  # the likeliest stay, however small top_p is
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    if min_p > 0.0:
        p = logits.softmax(-1)
        drop = p < min_p * p.amax(-1, keepdim=True)
        drop.scatter_(-1, p.topk(min(keep, p.shape[-1]), dim=-1).indices, False)
        logits = logits.masked_fill(drop, -torch.inf)
    if typical_p < 1.0:
        logits = _typical(logits, typical_p, keep)
    return logits


def _typical(logits: Tensor, mass: float, keep: int) -> Tensor:
    log_p = logits.log_softmax(-1)
    entropy = -(log_p * log_p.exp()).nansum(-1, keepdim=True)  # 0 * -inf counts as 0
    distance, order = (-log_p - entropy).abs().sort(dim=-1)
    reached = logits.gather(-1, order).softmax(-1).cumsum(-1)
    last = (reached < mass).sum(-1, keepdim=True).clamp_max(logits.shape[-1] - 1)
    drop = distance > distance.gather(-1, last)
    drop[..., :keep] = False
    return logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)


class Drawer:
    """Draws tokens, from torch's generator, from one of its own, or from one for each row.

    config.seed: an int for one generator, a list for one per row. generator: the same as objects;
    not both (ValueError). With one per row a row's draws do not depend on the rest of the batch.
    prompts: their number; each is drawn for num_return_sequences times, but once with beams.
    """

    def __init__(self, prompts: int, config: GenerationConfig, device, generator=None):
        seed, rows = config.seed, prompts
        if config.num_beams == 1:
            rows *= config.num_return_sequences
        if seed is not None and generator is not None:
            raise ValueError("generate: got both seed and generator, accepted is one of them")
        if isinstance(seed, list | tuple):
            generator = [torch.Generator(device).manual_seed(each) for each in seed]
        elif seed is not None:
            generator = torch.Generator(device).manual_seed(seed)
        if isinstance(generator, list | tuple) and len(generator) != rows:
            raise ValueError(
                f"generate: seed or generator: got {len(generator)}, accepted is one, or one for "
                f"each of the {rows} rows (num_return_sequences counts)"
            )
        self.generator = generator

    def draw(self, scores: Tensor, count: int = 1) -> Tensor:
        """(R, count) different tokens drawn from softmax(scores), scores (R, V)."""
        p = scores.softmax(-1)
        if not isinstance(self.generator, list | tuple):
            return torch.multinomial(p, count, generator=self.generator)
        pairs = zip(p, self.generator, strict=True)
        return torch.stack([torch.multinomial(row, count, generator=g) for row, g in pairs])
