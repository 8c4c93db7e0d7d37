"""Greedy and drawn continuations, one token after the other, with or without drafts."""

import torch
from torch import Tensor

from .decoder import Decoder
from .output import Found, Record
from .rows import Rows
from .rules import Rules
from .streamers import Streamer


class Loop:
    """draft: a function of (rows, most) to tokens (1, n) that may come next, or None."""

    def __init__(self, rules: Rules, streamer: Streamer | None = None, draft=None):
        self.rules, self.streamer, self.draft = rules, streamer, draft
        self.config = rules.config

    def run(self, decoder: Decoder, rows: Rows, record: Record) -> Found:
        """Goes on until every row is finished."""
        self._tell(rows.history)
        logits = decoder.start(rows)
        if self.config.num_return_sequences > 1:
            every = rows.repeated(self.config.num_return_sequences)
            rows, logits = rows.select(every), logits[every]
            decoder.select(every)
        finished = torch.zeros(rows.count, dtype=torch.bool, device=rows.ids.device)
        made = torch.zeros_like(rows.base)
        drafts = rows.ids[:, :0]
        while True:
            for place in range(logits.shape[1]):
                token = self._choose(rows, logits[:, place].float(), finished, record)
                token = token.masked_fill(finished, self.config.filler)
                made += ~finished
                rows.append(token)
                self._tell(token)
                finished = finished | self.rules.stop(rows, logits[:, place])
                if bool(finished.all()):
                    return self._end(decoder, rows, made)
                if place < drafts.shape[1] and int(token) != int(drafts[0, place]):
                    break
            drafts = self._next_drafts(decoder, rows, drafts)
            logits = decoder.step(rows, drafts)

    def _next_drafts(self, decoder: Decoder, rows: Rows, drafts: Tensor) -> Tensor:
        if self.draft is None:
            return drafts
        decoder.forget_drafts(rows)
        most = min(decoder.drafts_fit(), int(rows.limits[0]) - rows.made - 1)
        return self.draft(rows, most)

    def _end(self, decoder: Decoder, rows: Rows, made: Tensor) -> Found:
        if self.streamer is not None:
            self.streamer.end()
        if self.draft is not None:
            decoder.forget_drafts(rows)
        return Found(rows.history, rows, made)

    def _choose(self, rows: Rows, logits: Tensor, finished: Tensor, record: Record) -> Tensor:
        scores = self.rules.process(rows, logits)
        token = self._pick(scores)
        while self.rules.word_filter is not None:
            banned = self.rules.word_filter.forbids(rows, token, finished)
            if not bool(banned.any()):
                break
            # As if the model had said that it cannot be: top_k and the like see the others.
            logits = logits.clone()
            logits[banned, token[banned]] = -torch.inf
            scores = self.rules.process(rows, logits)
            if bool((scores.amax(-1) == -torch.inf).any()):
                raise ValueError("generate: word_filter: got one that leaves a row no token at all")
            token = self._pick(scores)
        record.add(logits, scores)
        return token

    def _pick(self, scores: Tensor) -> Tensor:
        if self.config.do_sample:
            return self.rules.drawer.draw(scores).squeeze(1)
        return scores.argmax(-1)

    def _tell(self, ids: Tensor) -> None:
        if self.streamer is not None:
            self.streamer.put(ids.cpu())
