"""The sequences of a generation while they grow."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .config import DEFAULT_NEW_TOKENS, GenerationConfig


@dataclass
class Rows:
    """R sequences of `width` prompt columns and `made` new ones, in memory for all of them."""

    ids: Tensor  # (R, columns) int64
    real: Tensor  # (R, columns) bool; False is padding of the prompt
    base: Tensor  # (R,) the prompt's length, from which max_length and min_length count
    limits: Tensor  # (R,) new tokens at most
    width: int
    listed: bool  # the prompts came as a list, of different lengths
    made: int = 0

    @property
    def length(self) -> int:
        return self.width + self.made

    @property
    def count(self) -> int:
        return self.ids.shape[0]

    @property
    def history(self) -> Tensor:
        """(R, length): what transformers calls input_ids."""
        return self.ids[:, : self.length]

    @property
    def last(self) -> Tensor:
        """(R,): the newest tokens."""
        return self.ids[:, self.length - 1]

    def tokens(self, row: int) -> Tensor:
        """The real tokens of one row, (n,)."""
        return self.history[row][self.real[row, : self.length]]

    def repeated(self, times: int) -> Tensor:
        """(R * times,): the number of each row, so many times, for `select`."""
        return torch.arange(self.count, device=self.ids.device).repeat_interleave(times)

    def append(self, tokens: Tensor) -> None:
        self.ids[:, self.length] = tokens
        self.made += 1

    def select(self, index: Tensor) -> "Rows":
        """Copies of those rows, in that order."""
        names = ("ids", "real", "base", "limits")
        return replace(self, **{name: getattr(self, name)[index] for name in names})


def read_prompts(inputs, attention_mask: Tensor | None, config: GenerationConfig, model) -> Rows:
    """Rows of a (B, P) tensor with padding on either side, or of a list of prompts, each 1-D.

    Without a mask, tokens equal to pad_token_id are padding unless that ends texts too, as in
    transformers. None is the start of a text. Raises ValueError for shapes that do not fit, for a
    row with no real token, and for more tokens than the model's n_positions.
    """
    device = model.device
    if inputs is None:
        if config.bos_token_id is None:
            raise ValueError(
                "generate: inputs: got None and no bos_token_id, accepted are input_ids"
            )
        inputs = torch.tensor([[config.bos_token_id]], device=device)
    listed = not isinstance(inputs, Tensor)
    if listed:
        prompts = [torch.as_tensor(p, dtype=torch.int64, device=device) for p in inputs]
        _check_list(prompts, attention_mask)
        ids, mask = left_padded(prompts, config.filler)
        base = mask.sum(1)
    else:
        ids, mask = inputs.to(torch.int64), _mask(inputs, attention_mask, config)
        base = torch.full_like(mask[:, 0], ids.shape[1], dtype=torch.int64)
    limits = new_tokens(config, base, mask.sum(1), model.config.n_positions)
    room = int(limits.max()) if len(limits) else 0
    filler = ids.new_full((ids.shape[0], room), config.filler)
    real = torch.cat([mask, torch.ones_like(filler, dtype=torch.bool)], 1)
    return Rows(torch.cat([ids, filler], 1), real, base, limits, ids.shape[1], listed)


def left_padded(prompts: list[Tensor], filler: int) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (B, longest)."""
    widest = max(len(p) for p in prompts)
    ids = prompts[0].new_full((len(prompts), widest), filler)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, widest - len(prompt) :] = prompt
        mask[row, widest - len(prompt) :] = True
    return ids, mask


def _check_list(prompts: list[Tensor], attention_mask: Tensor | None) -> None:
    wrong = [tuple(p.shape) for p in prompts if p.ndim != 1 or len(p) == 0]
    if wrong or not prompts or attention_mask is not None:
        got = "an attention_mask" if attention_mask is not None else f"shapes {wrong}"
        raise ValueError(
            f"generate: inputs: got {got} with a list of {len(prompts)} prompts, accepted are "
            "prompts of at least one token, (tokens,) each, and no mask"
        )


def _mask(input_ids: Tensor, attention_mask: Tensor | None, config: GenerationConfig) -> Tensor:
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(
            f"generate: input_ids: got shape {tuple(input_ids.shape)}, accepted is "
            "(batch >= 1, tokens >= 1)"
        )
    if attention_mask is None:
        pad = config.pad_token_id
        if pad is None or pad in config.end_tokens:
            return torch.ones_like(input_ids, dtype=torch.bool)
        attention_mask = input_ids != pad
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"generate: attention_mask: got shape {tuple(attention_mask.shape)}, accepted is that "
            f"of input_ids, {tuple(input_ids.shape)}"
        )
    mask = attention_mask.bool()
    if not bool(mask.any(1).all()):
        raise ValueError(
            "generate: attention_mask: got a row with no real token, accepted is at least one in "
            "every row"
        )
    return mask


def new_tokens(config: GenerationConfig, base: Tensor, real: Tensor, n_positions: int) -> Tensor:
    """(B,): how many tokens each row may get; base (B,) is its prompt's length, real its tokens.

    A batch with padding counts columns, as in transformers; rows of a list count for themselves.
    """
    if config.max_new_tokens is not None:
        wanted = torch.full_like(base, config.max_new_tokens)
    elif config.max_length is not None:
        wanted = config.max_length - base
    else:
        wanted = torch.full_like(base, DEFAULT_NEW_TOKENS)
        if config.context == "error":
            wanted = torch.minimum(wanted, n_positions - real)
    fewest, longest = int(wanted.min()), int((real + wanted).max())
    if fewest < 1 and config.max_length is not None:
        raise ValueError(
            f"generate: max_length: got {config.max_length} for a prompt of {int(base.max())} "
            "tokens, accepted is more than the prompt (or set max_new_tokens)"
        )
    if config.context == "error" and (fewest < 1 or longest > n_positions):
        raise ValueError(
            f"generate: max_new_tokens: expected at most n_positions = {n_positions} in all, "
            f"got a prompt of {int(real.max())} and {int(wanted.max())} new tokens "
            "(context='slide', --context slide, forgets the oldest)"
        )
    return wanted
