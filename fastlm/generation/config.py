"""How to continue a prompt: transformers' names and defaults, checked."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..files import write_text
from ..hub import Source

FILE = "generation_config.json"
DEFAULT_NEW_TOKENS = 20


@dataclass
class GenerationConfig:
    """Greedy unless do_sample or num_beams > 1.

    max_length counts the prompt's tokens; max_new_tokens does not, and wins. With neither, 20 new
    ones. A row stops after a token of eos_token_id (-1 is none) and is filled up with pad_token_id.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int = 0
    min_new_tokens: int | None = None
    max_time: float | None = None  # seconds
    stop_strings: str | list[str] | None = None
    do_sample: bool = False
    num_beams: int = 1
    num_return_sequences: int = 1
    early_stopping: bool | str = False
    length_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float | None = 1.0
    min_p: float | None = None
    typical_p: float | None = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: list[list[int]] | None = None
    sequence_bias: Any = None  # {(token, ...): bias} or [[[token, ...], bias], ...]
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | list[int] | None = None
    remove_invalid_values: bool = False
    renormalize_logits: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True
    cache_implementation: str | None = None  # ours is allocated once, whatever it is called
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int = 2
    num_assistant_tokens: int = 5
    return_dict_in_generate: bool = False
    output_scores: bool = False
    output_logits: bool = False
    output_attentions: bool = False
    output_hidden_states: bool = False
    # Beyond transformers: repeatable draws, and what to do past the model's n_positions.
    seed: int | list[int] | None = None
    context: str = "error"

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in fields(cls)]

    @classmethod
    def of_model(cls, config) -> "GenerationConfig":
        """The defaults of a model that has no file of its own for them."""
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
        return cls(**{name: getattr(config, name) for name in tokens})

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **options) -> "GenerationConfig":
        """The generation_config.json of a folder or of a name on the hub; None is a default."""
        return cls.from_source(Source(name_or_path, **options))

    @classmethod
    def from_source(cls, source: Source) -> "GenerationConfig":
        path = source.require(FILE)
        return cls().updated(json.loads(path.read_text(encoding="utf-8")), known_only=True)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes what differs from the defaults, as transformers does."""
        default = asdict(GenerationConfig())
        kept = {name: value for name, value in asdict(self).items() if value != default[name]}
        write_text(Path(folder) / FILE, json.dumps(kept, indent=2) + "\n")

    def updated(self, given: dict[str, Any], *, known_only: bool = False) -> "GenerationConfig":
        """A copy with those settings; ValueError names unknown ones, or known_only skips them."""
        names = self.names()
        unknown = sorted(set(given) - set(names))
        if unknown and not known_only:
            raise ValueError(f"generate: got unknown options {unknown}, accepted are {names}")
        changes = {name: value for name, value in given.items() if name in names}
        if known_only:
            changes = {name: value for name, value in changes.items() if value is not None}
        return GenerationConfig(**{**asdict_shallow(self), **changes})

    @property
    def end_tokens(self) -> list[int]:
        return as_list(self.eos_token_id)

    @property
    def filler(self) -> int:
        """What stands after a row's end: padding, or the end token again where there is none."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return max([0, *self.end_tokens[:1]])

    def check(self, vocab_size: int) -> None:
        """Raises ValueError for what no model could do."""

        def require(name: str, holds: bool, accepted: str) -> None:
            if not holds:
                raise ValueError(
                    f"generate: {name}: got {getattr(self, name)!r}, accepted is {accepted}"
                )

        for name in ("max_length", "max_new_tokens", "num_return_sequences", "num_beams"):
            require(name, getattr(self, name) is None or getattr(self, name) >= 1, ">= 1")
        require("min_new_tokens", (self.min_new_tokens or 0) >= 0, ">= 0")
        require("temperature", self.temperature > 0, "> 0 (do_sample=False is greedy)")
        require("top_k", (self.top_k or 0) >= 0, ">= 0 or None")
        for name in ("top_p", "typical_p"):
            share = getattr(self, name)
            require(name, share is None or 0 < share <= 1, f"0 < {name} <= 1")
        require("min_p", 0 <= (self.min_p or 0) <= 1, "0 <= min_p <= 1")
        require("repetition_penalty", self.repetition_penalty > 0, "> 0")
        in_vocabulary = self.pad_token_id is None or 0 <= self.pad_token_id < vocab_size
        require("pad_token_id", in_vocabulary, f"0 to {vocab_size - 1}")
        require(
            "early_stopping", self.early_stopping in (True, False, "never"), "a bool or 'never'"
        )
        kinds = (None, "static", "dynamic")
        require("cache_implementation", self.cache_implementation in kinds, f"one of {kinds}")
        require("context", self.context in ("error", "slide"), "'error' or 'slide'")
        require(
            "num_return_sequences",
            self.do_sample or self.num_return_sequences <= self.num_beams,
            "at most num_beams (1: greedy) without do_sample=True, as greedy continuations are all "
            "the same",
        )
        if self.num_beams > 1:
            require(
                "num_return_sequences", self.num_return_sequences <= self.num_beams, "<= num_beams"
            )
            require(
                "prompt_lookup_num_tokens", not self.prompt_lookup_num_tokens, "None with beams"
            )


def asdict_shallow(config: GenerationConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.names()}


def as_list(tokens: int | list[int] | None) -> list[int]:
    """An option that takes one token, several, or none."""
    if tokens is None:
        return []
    return [tokens] if isinstance(tokens, int) else list(tokens)
