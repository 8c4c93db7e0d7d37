"""What `generate` returns with return_dict_in_generate."""

from dataclasses import dataclass

from torch import Tensor

from .cache import KVCache
from .config import GenerationConfig
from .rows import Rows


@dataclass
class GenerateOutput:
    """transformers' names. The tuples have an entry per step; None where not asked for.

    sequences: (R, T), or a list of (T,) where the prompts were a list. scores: (R, V) after the
    processors, in beam search log-probabilities; logits: (R, V) before them. sequences_scores (R,)
    and beam_indices (R, steps), -1 after the end, are beam search's.
    """

    sequences: Tensor | list[Tensor]
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    attentions: tuple | None = None
    hidden_states: tuple | None = None
    past_key_values: KVCache | None = None
    sequences_scores: Tensor | None = None
    beam_indices: Tensor | None = None

    def __getitem__(self, name: str):
        return getattr(self, name)


@dataclass
class Found:
    """sequences (R, T) with what `rows` they are of, made (R,) new tokens; scores and beams'."""

    sequences: Tensor | list[Tensor]
    rows: Rows
    made: Tensor
    scores: Tensor | None = None
    paths: Tensor | None = None

    def unpadded(self) -> list[Tensor]:
        """Each row's prompt and the tokens it made, (T,)."""
        ends = (self.rows.width + self.made).tolist()
        table = zip(self.sequences, self.rows.real, ends, strict=True)
        return [ids[:end][real[:end]] for ids, real, end in table]


class Record:
    """Keeps the scores and logits of each step, where they were asked for."""

    def __init__(self, config: GenerationConfig):
        keep = config.return_dict_in_generate
        self.scores: list[Tensor] | None = [] if keep and config.output_scores else None
        self.logits: list[Tensor] | None = [] if keep and config.output_logits else None

    def add(self, logits: Tensor, scores: Tensor) -> None:
        if self.scores is not None:
            self.scores.append(scores.clone())
        if self.logits is not None:
            self.logits.append(logits.clone())

    def output(self, found: Found, decoder) -> GenerateOutput:
        def of_steps(name: str):
            asked = decoder.shown[f"output_{name}"]
            return tuple(getattr(output, name) for output in decoder.seen) if asked else None

        return GenerateOutput(
            found.sequences,
            None if self.scores is None else tuple(self.scores),
            None if self.logits is None else tuple(self.logits),
            of_steps("attentions"),
            of_steps("hidden_states"),
            decoder.cache,
            None if self.scores is None else found.scores,
            found.paths,
        )
