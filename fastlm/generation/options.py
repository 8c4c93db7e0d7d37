"""How to continue a prompt: transformers' names and defaults, checked."""

from dataclasses import dataclass, fields

from torch import Tensor

DEFAULT_NEW_TOKENS = 20


@dataclass
class Options:
    """Greedy unless do_sample; then temperature, top_k and top_p narrow what is drawn from.

    max_length counts the prompt's tokens; max_new_tokens does not, and wins. With neither, 20 new
    ones. A row stops after a token of eos_token_id (-1 is none), but not within its first
    min_new_tokens, and is filled up with pad_token_id. seed makes the draws repeatable and leaves
    torch's own generator alone.
    """

    max_length: int | None = None
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

    @classmethod
    def for_model(cls, config, given: dict) -> "Options":
        """The options of a call, with end and padding tokens from the model's config by default.

        Raises ValueError for an unknown name and for what no model could do.
        """
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise ValueError(f"generate: got unknown options {unknown}, accepted are {names}")
        options = cls(**given)
        if options.eos_token_id is None:
            options.eos_token_id = config.eos_token_id
        if options.pad_token_id is None:
            options.pad_token_id = config.pad_token_id
        options._check(config.vocab_size)
        return options

    def _check(self, vocab_size: int) -> None:
        def require(name: str, holds: bool, accepted: str) -> None:
            if not holds:
                raise ValueError(
                    f"generate: {name}: got {getattr(self, name)}, accepted is {accepted}"
                )

        for name in ("max_length", "max_new_tokens", "num_return_sequences"):
            require(name, getattr(self, name) is None or getattr(self, name) >= 1, ">= 1")
        require("min_new_tokens", self.min_new_tokens >= 0, ">= 0")
        require("temperature", self.temperature > 0, "> 0 (do_sample=False is greedy)")
        require("top_k", self.top_k is None or self.top_k >= 0, ">= 0 or None")
        require("top_p", 0 < self.top_p <= 1, "0 < top_p <= 1")
        in_vocabulary = self.pad_token_id is None or 0 <= self.pad_token_id < vocab_size
        require("pad_token_id", in_vocabulary, f"0 to {vocab_size - 1}")
        require(
            "num_return_sequences",
            self.do_sample or self.num_return_sequences == 1,
            "1 without do_sample=True: greedy continuations are all the same",
        )

    @property
    def end_tokens(self) -> list[int]:
        if self.eos_token_id is None:
            return []
        return self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]

    @property
    def filler(self) -> int:
        """What stands after a row's end: padding, or the end token again where there is none."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return max([0, *self.end_tokens[:1]])

    def new_tokens(self, width: int, longest: int, n_positions: int) -> int:
        """How many tokens to make after a prompt of `width`, at most `longest` of them real."""
        if self.max_new_tokens is not None:
            wanted = self.max_new_tokens
        elif self.max_length is not None:
            wanted = self.max_length - width
        else:
            wanted = min(DEFAULT_NEW_TOKENS, n_positions - longest)
        if wanted < 1 and self.max_length is not None:
            raise ValueError(
                f"generate: max_length: got {self.max_length} for a prompt of {width} tokens, "
                "accepted is more than the prompt (or set max_new_tokens)"
            )
        if wanted < 1 or longest + wanted > n_positions:
            raise ValueError(
                f"generate: got a prompt of {longest} and {wanted} new tokens, accepted are at "
                f"most n_positions = {n_positions} in all"
            )
        return wanted


def prompt_mask(input_ids: Tensor, attention_mask: Tensor | None, options: Options):
    """(B, P) bool, or None where every token is real; by default padding is what looks like it.

    As in transformers, tokens equal to pad_token_id are padding unless that ends texts too. Raises
    ValueError for shapes that do not fit and for a row with no real token.
    """
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"generate: input_ids: got shape {tuple(input_ids.shape)}, accepted is "
            "(batch, tokens >= 1)"
        )
    if attention_mask is None:
        pad = options.pad_token_id
        if pad is None or pad in options.end_tokens:
            return None
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
    return None if bool(mask.all()) else mask
