"""Drafts of the next tokens, which the model then checks all at once.

A draft is accepted where it is the token that would have been chosen anyway, greedily or drawn, so
the result is that of generating without drafts; only the number of passes changes (Leviathan et
al., 2022, "Fast Inference from Transformers via Speculative Decoding").
"""

import torch
from torch import Tensor

from .config import GenerationConfig
from .decoder import Decoder
from .rows import Rows


def drafter(config: GenerationConfig, assistant, model, prompts: int):
    """A function of (rows, most) to drafts (1, n <= most), or None where nothing is asked for."""
    count = prompts * config.num_return_sequences
    if (assistant is not None or config.prompt_lookup_num_tokens) and count > 1:
        raise ValueError(
            f"generate: assistant_model or prompt_lookup_num_tokens: got {count} rows, accepted is "
            "one"
        )
    if assistant is not None:
        if assistant.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"generate: assistant_model: got a vocabulary of {assistant.config.vocab_size}, "
                f"accepted is the model's, {model.config.vocab_size}"
            )
        return Assistant(assistant, config).draft
    if config.prompt_lookup_num_tokens:
        return PromptLookup(config.prompt_lookup_num_tokens, config.max_matching_ngram_size).draft
    return None


class PromptLookup:
    """Drafts what followed when the newest tokens stood in the text before.

    Saxena, 2023, "Prompt Lookup Decoding". ngram: tokens that must agree, at most; fewer are tried
    after that. Of several places the last that is followed by enough tokens counts.
    """

    def __init__(self, count: int, ngram: int):
        self.count, self.ngram = count, ngram

    def draft(self, rows: Rows, most: int) -> Tensor:
        tokens = rows.tokens(0)
        for n in range(min(self.ngram, len(tokens) - 1), 0, -1):
            earlier = tokens[:-1].unfold(0, n, 1)
            after = (earlier == tokens[-n:]).all(1).nonzero().squeeze(1) + n
            if len(after):
                count = min(self.count, most)
                followed = after[after + count <= len(tokens)]
                first = int(followed[-1] if len(followed) else after[0])
                return tokens[None, first : first + count]
        return tokens[None, :0]


class Assistant:
    """Drafts what a smaller model would say, greedily."""

    def __init__(self, model, config: GenerationConfig):
        self.model, self.count = model.eval(), config.num_assistant_tokens
        self.decoder = Decoder(model, GenerationConfig())

    def draft(self, rows: Rows, most: int) -> Tensor:
        tokens = rows.tokens(0)
        count = min(self.count, most, self.model.config.n_positions - len(tokens))
        if count < 1:
            return tokens[None, :0]
        if self.decoder.cache is None:
            logits = self.decoder.start(rows)
        else:
            # What it drafted and the model refused is forgotten; the newest token it never saw.
            self.decoder.forget_drafts(rows)
            logits = self._read(tokens[None, self.decoder.cache.longest :])
        drafts = logits[:, -1].argmax(-1)[:, None]
        while drafts.shape[1] < count:
            logits = self._read(drafts[:, -1:])
            drafts = torch.cat([drafts, logits[:, -1].argmax(-1)[:, None]], 1)
        return drafts

    def _read(self, ids: Tensor) -> Tensor:
        return self.model(ids, past_key_values=self.decoder.cache).logits
