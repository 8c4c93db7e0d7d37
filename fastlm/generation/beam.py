"""Beam search: the likeliest sequences, not the sequence of likeliest tokens.

Each prompt has `num_beams` open beams. A step looks at the best continuations of all of them,
enough that num_beams stay open even if every end token is among them; those that end compete for
the finished places by their summed log-probability over length ** length_penalty.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .decoder import Decoder
from .output import Found, Record
from .rows import Rows
from .rules import Rules

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
    """rows: one for each prompt; ends: how many tokens end a row."""

    def __init__(self, rows: Rows, rules: Rules, ends: int):
        self.rules, self.config, self.beams = rules, rules.config, rules.config.num_beams
        self.prompts, self.start = rows.count, rows
        self.candidates = max(2, 1 + ends) * self.beams
        self.rows = rows.select(rows.repeated(self.beams))
        shape, device = (self.prompts, self.beams), rows.ids.device
        steps = int(rows.limits.max())
        self.finished = Beams(
            self.rows.ids.unflatten(0, shape),
            torch.full(shape, NEVER, device=device),
            torch.full((*shape, steps), -1, dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=torch.bool, device=device),
        )
        # Only the first beam counts at the start: the others are copies of it.
        first = self.finished.scores.clone()
        first[:, 0] = 0.0
        self.open = replace(self.finished, scores=first)
        self.improvable = torch.ones(self.prompts, 1, dtype=torch.bool, device=device)

    def run(self, decoder: Decoder, record: Record) -> Found:
        """The num_return_sequences best of each prompt, best first."""
        every = self.start.repeated(self.beams)
        logits = decoder.start(self.start)[every]
        decoder.select(every)
        while self.step(logits[:, -1].float(), record, decoder):
            logits = decoder.step(self.rows)
        return self._found()

    def step(self, logits: Tensor, record: Record, decoder: Decoder) -> bool:
        """One token more for every beam; False where nothing is left to be done."""
        scores = self.rules.process(self.rows, logits.log_softmax(-1))
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
        # Where all candidates are done, what stays open has NEVER, and cannot improve anything.
        self.improvable &= self._can_improve()
        full = self.config.early_stopping is True and bool(self.finished.done.all())
        return bool(self.improvable.any()) and not full

    def _candidates(self, scores: Tensor) -> tuple[Beams, Tensor]:
        """The best continuations (P, C), and the row each goes on from."""
        vocab = scores.shape[-1]
        total = scores.unflatten(0, (self.prompts, self.beams)) + self.open.scores[..., None]
        total = total.flatten(1)
        while True:
            if self.config.do_sample:
                index = self.rules.drawer.draw(total, self.candidates)
                best_first = total.gather(1, index).argsort(1, descending=True)
                index = index.gather(1, best_first)
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
        found.done = self.rules.stop(rows, scores).unflatten(0, source.shape)
        return found, source

    def _banned(self, source: Tensor, token: Tensor) -> Tensor:
        if self.rules.word_filter is None:
            return torch.zeros_like(token, dtype=torch.bool)
        rows = self.rows.select(source.flatten())
        return self.rules.word_filter.forbids(rows, token.flatten()).unflatten(0, token.shape)

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

    def _found(self) -> Found:
        count = self.config.num_return_sequences
        done = self.finished
        ids, scores, paths = (
            t[:, :count].flatten(0, 1) for t in (done.ids, done.scores, done.paths)
        )
        made = (paths >= 0).sum(1)
        longest = int(made.max())
        rows = self.start.select(self.start.repeated(count))
        return Found(ids[:, : rows.width + longest], rows, made, scores, paths[:, :longest])
