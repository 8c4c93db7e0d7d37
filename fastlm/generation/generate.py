"""The generation loop."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .beam import BeamSearch
from .config import GenerationConfig
from .decoder import Decoder
from .output import GenerateOutput, Record
from .processors import processors
from .rows import Rows, read_prompts
from .sampling import Drawer
from .speculation import drafter
from .stopping import stop_rule
from .streamers import Streamer


@torch.no_grad()
def generate(
    model,
    inputs=None,
    generation_config: GenerationConfig | None = None,
    logits_processor=None,
    stopping_criteria=None,
    prefix_allowed_tokens_fn: Callable | None = None,
    synced_gpus: bool | None = None,
    assistant_model=None,
    streamer: Streamer | None = None,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    past_key_values=None,
    tokenizer=None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    word_filter=None,
    **options,
) -> Tensor | list[Tensor] | GenerateOutput:
    """Prompt and continuation: (B * num_return_sequences, T) int64, as transformers' generate.

    model: with a `transformer` and an `lm_head`, run in eval mode. inputs or input_ids: (B, P) with
    attention_mask (B, P), 0 for padding on either side (see `rows.read_prompts` for the default);
    or a list of prompts of different lengths, which gives a list of sequences without padding, each
    what its prompt gives alone. None begins a text.

    options: the fields of `GenerationConfig`, over those of generation_config, or of
    model.generation_config. logits_processor and stopping_criteria: lists of functions of
    (input_ids, scores); prefix_allowed_tokens_fn: of (prompt's number, ids). streamer: anything
    with put(ids) and end(). assistant_model: a smaller model that drafts, for one row, as
    prompt_lookup_num_tokens does with the text itself. tokenizer: for stop_strings.
    past_key_values: the cache of the first tokens of the prompts, written in place.

    Beyond transformers: seed= or generator=, one or one per returned row; context="slide" goes on
    past n_positions; word_filter: a `safety.WordFilter`.

    Raises ValueError for an unknown or impossible option and for more tokens than the model's
    n_positions, IndexError for ids outside the vocabulary.
    """
    config = (generation_config or model.generation_config).updated(options)
    config = with_special_tokens(config, model.config)
    config.check(model.config.vocab_size)
    inputs = _one_of(inputs, input_ids, synced_gpus)
    rows = read_prompts(inputs, attention_mask, config, model)
    # -1, and an end token that this vocabulary lacks, never come.
    known = [token for token in config.end_tokens if 0 <= token < model.config.vocab_size]
    ends = torch.tensor(known, dtype=torch.int64, device=rows.ids.device)
    process = processors(config, ends, logits_processor, prefix_allowed_tokens_fn)
    stop = stop_rule(config, ends, stopping_criteria, tokenizer)
    repeats = 1 if config.num_beams > 1 else config.num_return_sequences
    drawer = Drawer(rows.count * repeats, rows.ids.device, config.seed, generator)
    decoder, record = Decoder(model, config, past_key_values), Record(config)
    beams: dict[str, Any] = {}
    with in_eval_mode(model):
        if config.num_beams > 1:
            _refuse("num_beams > 1", streamer=streamer, assistant_model=assistant_model)
            search = BeamSearch(rows, config, process, stop, drawer, len(ends), word_filter)
            search.run(decoder, record)
            sequences, scores, paths = search.result()
            beams = {"beam_indices": paths}
            if config.output_scores:
                beams["sequences_scores"] = scores
            rows = rows.select(_repeated(rows, config.num_return_sequences))
            new = (paths >= 0).sum(1)
        else:
            draft = drafter(config, assistant_model, model)
            if draft is not None and rows.count * repeats > 1:
                raise ValueError(
                    f"generate: assistant_model or prompt_lookup_num_tokens: got "
                    f"{rows.count * repeats} rows, accepted is one"
                )
            loop = Loop(config, process, stop, drawer, streamer, word_filter)
            rows, new = loop.run(decoder, rows, record, draft, repeats)
            sequences = rows.history
    result = _unpadded(sequences, rows, new) if rows.listed else sequences
    return record.output(result, decoder, **beams) if config.return_dict_in_generate else result


class Loop:
    """Greedy and drawn continuations, with or without drafts."""

    def __init__(self, config, process, stop, drawer, streamer, word_filter):
        self.config, self.process, self.stop, self.drawer = config, process, stop, drawer
        self.streamer, self.word_filter = streamer, word_filter

    def run(self, decoder: Decoder, rows: Rows, record: Record, draft, repeats: int):
        """(rows, new): the finished rows, and how many new tokens each has, (R,)."""
        self._tell(rows.history)
        logits = decoder.start(rows)
        if repeats > 1:
            every = _repeated(rows, repeats)
            rows, logits = rows.select(every), logits[every]
            decoder.select(every)
        finished = torch.zeros(rows.count, dtype=torch.bool, device=rows.ids.device)
        new = torch.zeros_like(rows.base)
        drafts = rows.ids[:, :0]
        while True:
            for place in range(logits.shape[1]):
                token = self._choose(rows, logits[:, place].float(), record)
                token = token.masked_fill(finished, self.config.filler)
                new += ~finished
                rows.append(token)
                self._tell(token)
                finished = finished | self.stop(rows, logits[:, place])
                if bool(finished.all()):
                    if self.streamer is not None:
                        self.streamer.end()
                    if draft is not None:
                        decoder.forget_drafts(rows)
                    return rows, new
                if place < drafts.shape[1] and int(token) != int(drafts[0, place]):
                    break
            if draft is not None:
                decoder.forget_drafts(rows)
                most = min(decoder.drafts_fit(), int(rows.limits[0]) - rows.made - 1)
                drafts = draft(rows, most)
            logits = decoder.step(rows, drafts)

    def _choose(self, rows: Rows, logits: Tensor, record: Record) -> Tensor:
        scores = self.process(rows, logits)
        token = self._pick(scores)
        while self.word_filter is not None:
            banned = self.word_filter.forbids(rows, token)
            if not bool(banned.any()):
                break
            # As if the model had said that it cannot be: top_k and the like see the others.
            logits = logits.clone()
            logits[banned, token[banned]] = -torch.inf
            scores = self.process(rows, logits)
            if bool((scores.amax(-1) == -torch.inf).any()):
                raise ValueError("generate: word_filter: got one that leaves a row no token at all")
            token = self._pick(scores)
        record.add(logits, scores)
        return token

    def _pick(self, scores: Tensor) -> Tensor:
        if self.config.do_sample:
            return self.drawer.draw(scores).squeeze(1)
        return scores.argmax(-1)

    def _tell(self, ids: Tensor) -> None:
        if self.streamer is not None:
            self.streamer.put(ids.cpu())


class GenerationMixin:
    """What a model with a language modelling head can do."""

    generation_config: GenerationConfig

    def generate(self, inputs=None, *args, **options):
        """Prompts and their continuations: see `fastlm.generation.generate`."""
        return generate(self, inputs, *args, **options)

    def load_generation_config(self, source) -> None:
        """Takes up generation_config.json, where `source` has one."""
        if source.find("generation_config.json") is not None:
            self.generation_config = GenerationConfig.from_source(source)


def with_special_tokens(config: GenerationConfig, of_model) -> GenerationConfig:
    """A copy whose special tokens, where they are None, are those of the model's config."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    missing = [name for name in names if getattr(config, name) is None]
    return config.updated({name: getattr(of_model, name) for name in missing})


@contextmanager
def in_eval_mode(model) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _one_of(inputs, input_ids, synced_gpus):
    if synced_gpus:
        raise ValueError("generate: synced_gpus: got True, accepted is None: a model is on one GPU")
    if inputs is not None and input_ids is not None:
        raise ValueError("generate: got both inputs and input_ids, accepted is one of them")
    return input_ids if inputs is None else inputs


def _refuse(reason: str, **given) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"generate: {name}: got one with {reason}, accepted is None")


def _repeated(rows: Rows, repeats: int) -> Tensor:
    return torch.arange(rows.count, device=rows.ids.device).repeat_interleave(repeats)


def _unpadded(sequences: Tensor, rows: Rows, new: Tensor) -> list[Tensor]:
    """Each row's prompt and the tokens it made."""
    ends = (rows.width + new).tolist()
    return [
        ids[:end][real[:end]] for ids, real, end in zip(sequences, rows.real, ends, strict=True)
    ]
