"""Beam search: the likeliest sequences, not the sequence of likeliest tokens.

Each prompt has `num_beams` open beams. A step looks at the best continuations of all of them,
enough that num_beams stay open even if every end token is among them; those that end compete for
the finished places by their summed log-probability over length ** length_penalty.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import GenerationConfig
from .decoder import Decoder
from .output import Record
from .rows import Rows
from .sampling import Drawer

NEVER = -1e9  # below every score of a sequence


@dataclass
class Beams:
    """P prompts with K sequences each: ids (P, K, columns), scores (P, K), and the beams they took,
    paths (P, K, steps).
    """

    ids: Tensor
    scores: Tensor
    paths: Tensor
    done: Tensor  # (P, K) bool

    def take(self, index: Tensor) -> "Beams":
        """(P, k) of the sequences, chosen per prompt."""
        wide = index[..., None]
        return Beams(
            self.ids.take_along_dim(wide, 1),
            self.scores.take_along_dim(index, 1),
            self.paths.take_along_dim(wide, 1),
            self.done.take_along_dim(index, 1),
        )

    def join(self, other: "Beams") -> "Beams":
        names = ("ids", "scores", "paths", "done")
        return Beams(*(torch.cat([getattr(self, n), getattr(other, n)], 1) for n in names))


class BeamSearch:
    """rows: one for each prompt. process, stop, forbid: as in `generate`."""

    def __init__(
        self,
        rows: Rows,
        config: GenerationConfig,
        process: Callable,
        stop: Callable,
        drawer: Drawer,
        ends: int,
        word_filter=None,
    ):
        self.config, self.process, self.stop, self.drawer = config, process, stop, drawer
        self.word_filter = word_filter
        self.prompts, self.beams = rows.count, config.num_beams
        self.candidates = max(2, 1 + ends) * self.beams
        self.steps = int(rows.limits.max())
        # Not given by the caller as one search: rows of a list have limits of their own.
        every = torch.arange(rows.count, device=rows.ids.device).repeat_interleave(self.beams)
        self.rows, self.every = rows.select(every), every
        shape = (self.prompts, self.beams)
        device = rows.ids.device
        scores = torch.full(shape, NEVER, device=device)
        paths = torch.full((*shape, self.steps), -1, dtype=torch.int64, device=device)
        done = torch.zeros(shape, dtype=torch.bool, device=device)
        ids = self.rows.ids.unflatten(0, shape)
        self.finished = Beams(ids, scores, paths, done)
        # Only the first beam counts at the start: the others are copies of it.
        self.open = Beams(ids, scores.index_fill(1, every.new_zeros(1), 0.0), paths, done)
        self.improvable = done.new_ones(self.prompts, 1)

    def run(self, decoder: Decoder, record: Record) -> None:
        logits = decoder.start(
            self.rows.select(torch.arange(self.prompts, device=self.every.device) * self.beams)
        )
        logits = logits.repeat_interleave(self.beams, 0)
        decoder.select(self.every)
        while self.step(logits[:, -1].float(), record, decoder):
            logits = decoder.step(self.rows)

    def step(self, logits: Tensor, record: Record, decoder: Decoder) -> bool:
        """One token more for every beam; False where nothing is left to be done."""
        scores = self.process(self.rows, logits.log_softmax(-1))
        record.add(logits, scores)
        candidates, source = self._candidates(scores)
        going_on = candidates.scores + candidates.done * NEVER
        best = going_on.topk(self.beams).indices
        self._finish(candidates)
        self.open = candidates.take(best)
        self.open.scores = going_on.take_along_dim(best, 1)
        chosen = source.take_along_dim(best, 1).flatten()
        decoder.select(chosen)
        self.rows = self.rows.select(chosen)
        self.rows.ids = self.open.ids.flatten(0, 1)
        self.rows.made += 1
        self.improvable &= self._can_improve() & ~candidates.done.all(1, keepdim=True)
        full = self.config.early_stopping is True and bool(self.finished.done.all())
        return bool(self.improvable.any()) and not full

    def _candidates(self, scores: Tensor) -> tuple[Beams, Tensor]:
        """The best continuations (P, C), and the row each goes on from."""
        vocab = scores.shape[-1]
        total = scores.unflatten(0, (self.prompts, self.beams)) + self.open.scores[..., None]
        total = total.flatten(1)
        while True:
            if self.config.do_sample:
                index = self.drawer.draw(total, self.candidates)
            else:
                index = total.topk(self.candidates).indices
            beam, token = index // vocab, index % vocab
            source = beam + torch.arange(self.prompts, device=beam.device)[:, None] * self.beams
            banned = self._banned(source, token)
            if not bool(banned.any()):
                break
            total = total.scatter(1, index, total.gather(1, index).masked_fill(banned, -torch.inf))
        found = self.open.take(beam)
        found.scores = total.gather(1, index)
        made = self.rows.made
        found.ids[:, :, self.rows.length] = token
        found.paths[:, :, made] = source
        rows = self.rows.select(source.flatten())
        rows.ids, rows.made = found.ids.flatten(0, 1), made + 1
        found.done = self.stop(rows, scores).unflatten(0, source.shape)
        return found, source

    def _banned(self, source: Tensor, token: Tensor) -> Tensor:
        if self.word_filter is None:
            return torch.zeros_like(token, dtype=torch.bool)
        rows = self.rows.select(source.flatten())
        return self.word_filter.forbids(rows, token.flatten()).unflatten(0, token.shape)

    def _finish(self, candidates: Beams) -> None:
        """Lets those of the first num_beams that ended compete for the finished places."""
        ended = candidates.done.clone()
        ended[:, self.beams :] = False
        scores = candidates.scores / (self.rows.made + 1) ** self.config.length_penalty
        closed = ~self.improvable
        if self.config.early_stopping is True:
            closed = closed | self.finished.done.all(1, keepdim=True)
        scores = scores + closed * NEVER + ~ended * NEVER
        both = self.finished.join(Beams(candidates.ids, scores, candidates.paths, ended))
        self.finished = both.take(both.scores.topk(self.beams).indices)

    def _can_improve(self) -> Tensor:
        """(P, 1): could the best open beam still beat the worst finished one?"""
        length: int | Tensor = self.rows.made
        if self.config.early_stopping == "never" and self.config.length_penalty > 0:
            length = self.rows.limits[:: self.beams, None]
        hope = self.open.scores[:, :1] / length**self.config.length_penalty
        worst = self.finished.scores.amin(1, keepdim=True)
        worst = torch.where(self.finished.done, worst, NEVER)
        return (hope > worst).any(1, keepdim=True)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """(sequences, scores, beam_indices) of num_return_sequences a prompt, best first."""
        count = self.config.num_return_sequences
        best = [
            t[:, :count].flatten(0, 1)
            for t in (self.finished.ids, self.finished.scores, self.finished.paths)
        ]
        ids, scores, paths = best
        made = int((paths >= 0).sum(1).max())
        return ids[:, : self.rows.width + made], scores, paths[:, :made]
