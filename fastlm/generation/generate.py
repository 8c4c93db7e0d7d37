"""The generation loop, with the names and defaults of transformers' `generate`."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fastlm.generation.cache import KVCache
from fastlm.generation.sampling import draw, filter_logits
from fastlm.generation.streamers import Streamer


@dataclass
class Options:
    """How to continue a prompt. `max_length` counts the prompt, `max_new_tokens` does not and wins.

    Greedy unless do_sample. seed makes the draws repeatable without touching torch's own generator.
    A row stops after one of eos_token_id, but not before min_new_tokens; -1 is no such token.
    """

    max_length: int = 20
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float = 1.0
    num_return_sequences: int = 1
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    seed: int | None = None

    def __post_init__(self):
        bounds = {
            "max_length": self.max_length >= 1,
            "max_new_tokens": self.max_new_tokens is None or self.max_new_tokens >= 1,
            "min_new_tokens": self.min_new_tokens >= 0,
            "temperature": self.temperature > 0,
            "top_k": self.top_k is None or self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "num_return_sequences": self.num_return_sequences >= 1,
        }
        accepted = {
            "top_p": "0 < top_p <= 1",
            "temperature": "> 0 (for greedy: do_sample=False)",
            "min_new_tokens": ">= 0",
            "top_k": ">= 0 or None",
        }
        for name, holds in bounds.items():
            if not holds:
                raise ValueError(
                    f"generate: {name}: got {getattr(self, name)}, accepted is "
                    f"{accepted.get(name, '>= 1')}"
                )
        if self.num_return_sequences > 1 and not self.do_sample:
            raise ValueError(
                f"generate: num_return_sequences: got {self.num_return_sequences} "
                "with do_sample=False, whose continuations are all the same; accepted "
                "is 1, or do_sample=True"
            )


@torch.no_grad()
def generate(
    model,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    streamer: Streamer | None = None,
    **options,
) -> Tensor:
    """Prompt and continuation, (B * num_return_sequences, T) int64; finished rows end in padding.

    model: a GPT2LMHeadModel, run in eval mode. input_ids: (B, P) int64, at least one real token a
    row. attention_mask: (B, P), 0 for padding, which may stand on either side; by default what
    equals pad_token_id is padding, unless that is an end token too. options: those of `Options`;
    eos_token_id and pad_token_id default to the config's, pad_token_id then to the end token.
    Raises ValueError for an unknown or impossible option and for more tokens than n_positions.
    """
    settings = _settings(model.config, options)
    stop = _stop_ids(settings, input_ids.device)
    mask = _prompt_mask(input_ids, attention_mask, settings, stop)
    new_tokens = _room(model.config, settings, input_ids, mask)
    was_training = model.training
    model.eval()
    try:
        return _continue(model, input_ids, mask, new_tokens, settings, stop, streamer)
    finally:
        model.train(was_training)


def _continue(model, input_ids, mask, new_tokens, settings, stop, streamer):
    width, repeats = input_ids.shape[1], settings.num_return_sequences
    cache = KVCache.for_model(model, input_ids.shape[0], width + new_tokens)
    logits = _prefill(model, input_ids, mask, cache).repeat_interleave(repeats, 0)
    cache = cache.repeat_interleave(repeats) if repeats > 1 else cache
    rows = logits.shape[0]
    generator = _generator(settings.seed, input_ids.device)
    sequences = input_ids.new_full((rows, width + new_tokens), settings.pad_token_id or 0)
    sequences[:, :width] = input_ids.repeat_interleave(repeats, 0)
    finished = torch.zeros(rows, dtype=torch.bool, device=input_ids.device)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    for end in range(width, width + new_tokens):
        token = _next_token(logits, end - width, settings, stop, generator)
        if stop is not None:
            token = token.masked_fill(finished, settings.pad_token_id)
            finished |= torch.isin(token, stop)
        sequences[:, end] = token
        if streamer is not None:
            streamer.put(token.cpu())
        if end + 1 == width + new_tokens or (stop is not None and bool(finished.all())):
            break
        logits = model(token[:, None], past_key_values=cache).logits[:, -1]
    if streamer is not None:
        streamer.end()
    return sequences[:, : end + 1]


def _prefill(model, input_ids, mask, cache):
    """Logits (B, V) at each row's last real token; the rows' keys and values go to `cache`."""
    hidden = model.transformer(
        input_ids, past_key_values=cache, attention_mask=mask
    ).last_hidden_state
    if mask is None:
        return model.lm_head(hidden[:, -1])
    place = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, place, 0).amax(1)
    return model.lm_head(hidden[torch.arange(mask.shape[0], device=mask.device), last])


def _next_token(logits, made, settings, stop, generator):
    logits = logits.float()
    if stop is not None and made < settings.min_new_tokens:
        logits = logits.index_fill(-1, stop[(stop >= 0) & (stop < logits.shape[-1])], -torch.inf)
    if not settings.do_sample:
        return logits.argmax(-1)
    return draw(
        filter_logits(logits, settings.temperature, settings.top_k, settings.top_p), generator
    )


def _settings(config, options):
    unknown = sorted(set(options) - {field.name for field in fields(Options)})
    if unknown:
        raise ValueError(
            f"generate: got unknown options {unknown}, accepted are "
            f"{', '.join(field.name for field in fields(Options))}"
        )
    settings = Options(**options)
    if settings.eos_token_id is None:
        settings.eos_token_id = config.eos_token_id
    if settings.pad_token_id is None:
        settings.pad_token_id = config.pad_token_id
    return settings


def _stop_ids(settings, device):
    """The end tokens (n,), or None; gives pad_token_id its default."""
    if settings.eos_token_id is None:
        return None
    stop = torch.tensor(settings.eos_token_id, device=device).reshape(-1)
    if settings.pad_token_id is None:
        settings.pad_token_id = max(int(stop[0]), 0)
    return stop


def _prompt_mask(input_ids, attention_mask, settings, stop):
    """(B, P) bool, or None where every token is real."""
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"generate: input_ids: got shape {tuple(input_ids.shape)}, accepted is "
            "(batch, tokens >= 1)"
        )
    pad = settings.pad_token_id
    if attention_mask is None:
        if pad is None or (stop is not None and bool((stop == pad).any())):
            return None
        attention_mask = input_ids != pad
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"generate: attention_mask: got shape {tuple(attention_mask.shape)}, "
            f"accepted is that of input_ids, {tuple(input_ids.shape)}"
        )
    mask = attention_mask.bool()
    if not bool(mask.any(1).all()):
        raise ValueError(
            "generate: attention_mask: got a row with no real token, accepted is at "
            "least one in every row"
        )
    return None if bool(mask.all()) else mask


def _room(config, settings, input_ids, mask):
    """How many tokens to make, having checked that they fit."""
    width = input_ids.shape[1]
    new_tokens = settings.max_new_tokens or settings.max_length - width
    if new_tokens < 1:
        raise ValueError(
            f"generate: max_length: got {settings.max_length} for a prompt of {width} "
            "tokens, accepted is more than the prompt (or set max_new_tokens)"
        )
    longest = width if mask is None else int(mask.sum(1).max())
    if longest + new_tokens > config.n_positions:
        raise ValueError(
            f"generate: got a prompt of {longest} and {new_tokens} new tokens, "
            f"accepted are at most n_positions = {config.n_positions} in all"
        )
    return new_tokens


def _generator(seed, device):
    return None if seed is None else torch.Generator(device).manual_seed(seed)
