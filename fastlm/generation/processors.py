"""What changes the scores of the next token before one is chosen.

A processor is a function of (rows, scores) to scores, both (R, V); transformers' processors, of
(input_ids, scores), are wrapped. The order is transformers'. Padding is not part of a row's history
here, so that a row gets what it would get alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .config import GenerationConfig, as_list
from .rows import Rows
from .sampling import filter_logits

Processor = Callable[[Rows, Tensor], Tensor]


def processors(
    config: GenerationConfig, ends: Tensor, custom=None, prefix_allowed_tokens_fn=None
) -> Callable[[Rows, Tensor], Tensor]:
    """All that `config` asks for, one after the other; ends: the end tokens, int64."""
    chain = [*_of_content(config, ends, prefix_allowed_tokens_fn), *_of_place(config, ends)]
    chain += [_of_input_ids(each) for each in custom or ()]
    if config.do_sample:
        chain.append(_narrow(config, len(ends)))
    if config.renormalize_logits:
        chain.append(lambda rows, scores: scores.log_softmax(-1))

    def run(rows: Rows, scores: Tensor) -> Tensor:
        for each in chain:
            scores = each(rows, scores)
        return scores

    return run


def _of_content(config, ends, prefix_allowed_tokens_fn) -> list[Processor]:
    """By what stands in the row."""
    chain: list[Processor] = []
    if config.sequence_bias:
        chain.append(bias_sequences(config.sequence_bias))
    if config.repetition_penalty != 1.0:
        chain.append(penalise_repetition(config.repetition_penalty))
    if config.no_repeat_ngram_size > 0:
        chain.append(forbid_repeated_ngrams(config.no_repeat_ngram_size))
    if config.bad_words_ids:
        ended = [[token] for token in ends.tolist()]
        banned = [words for words in config.bad_words_ids if list(words) not in ended]
        chain.append(bias_sequences({tuple(words): -torch.inf for words in banned}))
    if config.min_length > 0:
        chain.append(_no_end_while(ends, lambda rows: rows.base + rows.made < config.min_length))
    if config.min_new_tokens:
        few = config.min_new_tokens
        chain.append(_no_end_while(ends, lambda rows: torch.full_like(rows.base, rows.made) < few))
    if prefix_allowed_tokens_fn is not None:
        chain.append(allow_only(prefix_allowed_tokens_fn, config.num_beams))
    return chain


def _of_place(config, ends) -> list[Processor]:
    """By how far the row has come, or always."""
    chain: list[Processor] = []
    if config.forced_bos_token_id is not None:
        bos = [config.forced_bos_token_id]
        chain.append(_force(bos, lambda rows: rows.base + rows.made == 1))
    if config.forced_eos_token_id is not None:
        eos = as_list(config.forced_eos_token_id)
        chain.append(_force(eos, lambda rows: rows.limits == rows.made + 1))
    if config.remove_invalid_values:
        chain.append(_make_finite)
    if config.suppress_tokens:
        chain.append(_suppress(config.suppress_tokens, lambda rows: True))
    if config.begin_suppress_tokens:
        # A forced first token after a prompt of one does not count as the beginning.
        late = config.forced_bos_token_id is not None
        chain.append(
            _suppress(
                config.begin_suppress_tokens,
                lambda rows: rows.made == (1 if late and rows.width == 1 else 0),
            )
        )
    return chain


def bias_sequences(biases) -> Processor:
    """Adds a bias to the token that would complete a sequence: {(token, ...): bias}, or pairs."""
    pairs = biases.items() if isinstance(biases, dict) else biases
    table = [(tuple(tokens), float(bias)) for tokens, bias in pairs]
    if any(not tokens or min(tokens) < 0 for tokens, _ in table):
        raise ValueError(
            f"generate: sequence_bias or bad_words_ids: got {biases}, accepted are sequences of at "
            "least one token >= 0"
        )

    def run(rows: Rows, scores: Tensor) -> Tensor:
        known = max(tokens[-1] for tokens, _ in table) if table else 0
        if known >= scores.shape[-1]:
            raise ValueError(
                f"generate: sequence_bias or bad_words_ids: got token {known}, accepted are 0 to "
                f"{scores.shape[-1] - 1}"
            )
        bias = torch.zeros_like(scores)
        histories = [rows.tokens(row).tolist() for row in range(rows.count)]
        for tokens, amount in table:
            prefix = list(tokens[:-1])
            hit = [row for row, h in enumerate(histories) if h[len(h) - len(prefix) :] == prefix]
            bias[hit, tokens[-1]] += amount
        return scores + bias

    return run


def penalise_repetition(penalty: float) -> Processor:
    """Scores of tokens that the row has are divided by penalty, or multiplied where negative.

    Keskar et al., 2019, "CTRL: A Conditional Transformer Language Model".
    """

    def run(rows: Rows, scores: Tensor) -> Tensor:
        vocab = scores.shape[-1]
        seen = torch.zeros(rows.count, vocab + 1, dtype=torch.bool, device=scores.device)
        seen.scatter_(1, rows.history.masked_fill(~rows.real[:, : rows.length], vocab), True)
        penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
        return torch.where(seen[:, :vocab], penalised, scores)

    return run


def forbid_repeated_ngrams(n: int) -> Processor:
    """No n tokens come twice (Paulus et al., 2017, "A Deep Reinforced Model for Abstractive
    Summarization").
    """

    def run(rows: Rows, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for row in range(rows.count):
            tokens = rows.tokens(row)
            if len(tokens) >= n:
                windows = tokens.unfold(0, n, 1)
                again = (windows[:, :-1] == tokens[len(tokens) - n + 1 :]).all(1)
                scores[row, windows[again, -1]] = -torch.inf
        return scores

    return run


def allow_only(allowed: Callable, beams: int) -> Processor:
    """prefix_allowed_tokens_fn(prompt's number, the row's ids) lists the tokens that may follow."""

    def run(rows: Rows, scores: Tensor) -> Tensor:
        mask = torch.full_like(scores, -torch.inf)
        for row, ids in enumerate(rows.history):
            tokens = allowed(row // beams, ids)
            if len(tokens) == 0:
                raise ValueError(
                    f"generate: prefix_allowed_tokens_fn: got no token for row {row}, accepted is "
                    "at least one"
                )
            mask[row, tokens] = 0
        return scores + mask

    return run


def _no_end_while(ends: Tensor, short: Callable[[Rows], Tensor]) -> Processor:
    def run(rows: Rows, scores: Tensor) -> Tensor:
        ended = scores.index_fill(-1, ends, -torch.inf)
        return torch.where(short(rows)[:, None], ended, scores)

    return run


def _force(tokens: list[int], when: Callable[[Rows], Tensor]) -> Processor:
    def run(rows: Rows, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, tokens] = 0
        return torch.where(when(rows)[:, None], forced, scores)

    return run


def _suppress(tokens: list[int], when: Callable[[Rows], bool]) -> Processor:
    def run(rows: Rows, scores: Tensor) -> Tensor:
        index = torch.tensor(tokens, device=scores.device)
        return scores.index_fill(-1, index, -torch.inf) if when(rows) else scores

    return run


def _make_finite(rows: Rows, scores: Tensor) -> Tensor:
    return scores.nan_to_num(0.0)


def _narrow(config: GenerationConfig, ends: int) -> Processor:
    # A beam needs a candidate that goes on beside those that end.
    keep = 1 if config.num_beams == 1 else ends + 1

    def run(rows: Rows, scores: Tensor) -> Tensor:
        return filter_logits(
            scores, config.temperature, config.top_k, config.top_p or 1.0,
            min_p=config.min_p or 0.0, typical_p=config.typical_p or 1.0, keep=keep,
        )  # fmt: skip

    return run


def _of_input_ids(processor: Callable) -> Processor:
    return lambda rows, scores: processor(rows.history, scores)
