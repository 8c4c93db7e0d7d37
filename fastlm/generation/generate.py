"""`generate`: what its arguments mean, and who does the work."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .beam import BeamSearch
from .config import GenerationConfig
from .decoder import Decoder
from .loop import Loop
from .output import GenerateOutput, Record
from .processors import processors
from .rows import read_prompts
from .rules import Rules
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
    config = settled(generation_config or model.generation_config, options, model.config)
    config.check(model.config.vocab_size)
    inputs = _one_of(inputs, input_ids, synced_gpus)
    rows = read_prompts(inputs, attention_mask, config, model)
    ends = known_ends(config, model)
    rules = Rules(
        config,
        processors(config, ends, logits_processor, prefix_allowed_tokens_fn),
        stop_rule(config, ends, stopping_criteria, tokenizer),
        Drawer(rows.count, config, rows.ids.device, generator),
        word_filter,
    )
    decoder, record = Decoder(model, config, past_key_values), Record(config)
    with in_eval_mode(model):
        if config.num_beams > 1:
            _refuse("num_beams > 1", streamer=streamer, assistant_model=assistant_model)
            found = BeamSearch(rows, rules, len(ends)).run(decoder, record)
        else:
            draft = drafter(config, assistant_model, model, rows.count)
            found = Loop(rules, streamer, draft).run(decoder, rows, record)
    if rows.listed:
        found.sequences = found.unpadded()
    return record.output(found, decoder) if config.return_dict_in_generate else found.sequences


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


def settled(given, options: dict, of_model) -> GenerationConfig:
    """The config of a call: `given`, also transformers', under the call's options.

    Special tokens that are None are those of the model's config.
    """
    if not isinstance(given, GenerationConfig):
        given = GenerationConfig().updated(given.to_dict(), known_only=True)
    config = given.updated(options)
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


def known_ends(config: GenerationConfig, model) -> Tensor:
    """The end tokens: -1, and one that this vocabulary lacks, never come."""
    known = [token for token in config.end_tokens if 0 <= token < model.config.vocab_size]
    return torch.tensor(known, dtype=torch.int64, device=model.device)
