"""The generation loop."""

import torch
from torch import Tensor

from .cache import KVCache
from .options import Options, prompt_mask
from .sampling import draw, filter_logits
from .streamers import Streamer


@torch.no_grad()
def generate(
    model,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    streamer: Streamer | None = None,
    **options,
) -> Tensor:
    """Prompt and continuation, (B * num_return_sequences, T) int64.

    model: a GPT2LMHeadModel, run in eval mode. input_ids: (B, P) int64. attention_mask: (B, P), 0
    for padding, on either side; see `options.prompt_mask` for the default. options: the fields of
    `Options`. Raises ValueError for an unknown or impossible option and for more tokens than the
    model's n_positions, IndexError for ids outside the vocabulary.
    """
    settings = Options.for_model(model.config, options)
    mask = prompt_mask(input_ids, attention_mask, settings)
    width = input_ids.shape[1]
    longest = width if mask is None else int(mask.sum(1).max())
    new_tokens = settings.new_tokens(width, longest, model.config.n_positions)
    was_training = model.training
    model.eval()
    try:
        return _continue(model, input_ids, mask, new_tokens, settings, streamer)
    finally:
        model.train(was_training)


def _continue(model, input_ids, mask, new_tokens, settings, streamer):
    width, repeats, device = input_ids.shape[1], settings.num_return_sequences, input_ids.device
    cache = KVCache.for_model(model, input_ids.shape[0], width + new_tokens)
    logits = _prefill(model, input_ids, mask, cache).repeat_interleave(repeats, 0)
    if repeats > 1:
        cache = cache.repeat_interleave(repeats)
    # -1, and an end token that this vocabulary lacks, never come.
    known = [token for token in settings.end_tokens if 0 <= token < logits.shape[-1]]
    ends = torch.tensor(known, dtype=torch.int64, device=device)
    generator = None
    if settings.seed is not None:
        generator = torch.Generator(device).manual_seed(settings.seed)
    sequences = input_ids.new_full((logits.shape[0], width + new_tokens), settings.filler)
    sequences[:, :width] = input_ids.repeat_interleave(repeats, 0)
    finished = torch.zeros(logits.shape[0], dtype=torch.bool, device=device)
    _tell(streamer, input_ids)
    for made in range(new_tokens):
        token = _next_token(logits, made, settings, ends, generator)
        token = token.masked_fill(finished, settings.filler)
        finished |= torch.isin(token, ends)
        sequences[:, width + made] = token
        _tell(streamer, token)
        if made + 1 == new_tokens or (len(ends) and bool(finished.all())):
            break
        logits = model(token[:, None], past_key_values=cache).logits[:, -1]
    if streamer is not None:
        streamer.end()
    return sequences[:, : width + made + 1]


def _prefill(model, input_ids, mask, cache):
    """Logits (B, V) at each row's last real token; the rows' keys and values go to `cache`."""
    hidden = model.transformer(input_ids, cache, mask).last_hidden_state
    if mask is None:
        return model.lm_head(hidden[:, -1])
    place = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, place, 0).amax(1)
    return model.lm_head(hidden[torch.arange(mask.shape[0], device=mask.device), last])


def _next_token(logits, made, settings, ends, generator):
    logits = logits.float()
    if made < settings.min_new_tokens:
        logits = logits.index_fill(-1, ends, -torch.inf)
    if not settings.do_sample:
        return logits.argmax(-1)
    logits = filter_logits(logits, settings.temperature, settings.top_k, settings.top_p)
    return draw(logits, generator)


def _tell(streamer: Streamer | None, ids: Tensor) -> None:
    if streamer is not None:
        streamer.put(ids.cpu())
