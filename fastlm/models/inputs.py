"""What a caller hands to a model: checks that speak to the user, and where its tokens stand."""

import torch
from torch import Tensor

from ..generation.cache import KVCache


def check_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None, config) -> None:
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(
            "GPT2Model: got both or neither of input_ids and inputs_embeds, accepted is one of them"
        )
    if inputs_embeds is None:
        check_token_ids("input_ids", input_ids, config.vocab_size)
    elif inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != config.n_embd:
        raise ValueError(
            f"GPT2Model: inputs_embeds: got shape {tuple(inputs_embeds.shape)}, accepted is "
            f"(batch, tokens, {config.n_embd})"
        )


def check_token_ids(name: str, ids, vocab_size: int) -> None:
    """On the CPU only: elsewhere reading the ids back would wait for the device."""
    if ids.ndim != 2 or ids.is_floating_point():
        raise ValueError(
            f"GPT2Model: {name}: got {ids.dtype} of shape {tuple(ids.shape)}, "
            "accepted is int64 of shape (batch, tokens)"
        )
    if ids.device.type != "cpu" or ids.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise IndexError(
            f"GPT2Model: {name}: got {low if low < 0 else high}, accepted are 0 to {vocab_size - 1}"
        )


def check_length(length: int, cache: KVCache | None, n_positions: int) -> None:
    total = length + (0 if cache is None else cache.longest)
    if length == 0 or total > n_positions:
        raise ValueError(
            f"GPT2Model: got {length} tokens after {total - length} cached ones, accepted are at "
            f"least one and in all at most n_positions = {n_positions}"
        )


def check_labels(labels: Tensor, hidden: Tensor) -> None:
    if labels.shape != hidden.shape[:2]:
        raise ValueError(
            f"GPT2LMHeadModel: labels: got shape {tuple(labels.shape)}, accepted is "
            f"that of the tokens, {tuple(hidden.shape[:2])}"
        )


def check_cache(past_key_values) -> KVCache | None:
    """A KVCache, also of a tuple with a pair (keys, values) per layer; TypeError for another."""
    if past_key_values is None or isinstance(past_key_values, KVCache):
        return past_key_values
    if isinstance(past_key_values, tuple | list):
        return KVCache.from_legacy_cache(past_key_values)
    raise TypeError(
        f"GPT2Model: past_key_values: got {type(past_key_values).__name__}, accepted are "
        "fastlm.generation.KVCache (as an earlier call returned it) and a tuple with a pair "
        "(keys, values) per layer"
    )


def check_mask(attention_mask: Tensor | None, batch: int, length: int, cached: bool):
    """The (B, T) bool mask of this call's tokens, or None where every one of them is real.

    With a cache the mask may cover the cached tokens too, as (B, past + T); those are known. Raises
    ValueError for another shape.
    """
    if attention_mask is None:
        return None
    if (
        attention_mask.ndim != 2
        or attention_mask.shape[0] != batch
        or attention_mask.shape[1] < length
    ):
        raise ValueError(
            f"GPT2Model: attention_mask: got shape {tuple(attention_mask.shape)}, "
            f"accepted is (batch, tokens) = ({batch}, {length})"
        )
    mask = attention_mask[:, -length:].bool()
    if not torch.compiler.is_compiling():
        return None if bool(mask.all()) else mask
    if cached:
        raise ValueError(
            "GPT2Model: attention_mask: got one with a cache under torch.compile, accepted is "
            "none: a cache knows its real tokens"
        )
    return mask


def positions(mask: Tensor | None, length: int, cache: KVCache | None, device) -> Tensor:
    """(B or 1, T) positions: how many real tokens are to the left, cached ones included."""
    if mask is None:
        counted = torch.arange(length, device=device)[None]
    else:
        counted = (mask.long().cumsum(1) - 1).clamp_min(0)
    return counted if cache is None else counted + cache.lengths[:, None]
