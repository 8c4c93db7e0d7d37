"""A model and what it remembers of the rows: gives the logits that follow their newest tokens."""

from typing import Any

import torch
from torch import Tensor

from .cache import KVCache
from .config import GenerationConfig
from .rows import Rows, left_padded
from .steps import Steps


class Decoder:
    """Reads prompts once, then one token at a time.

    No padding is computed: rows of different length are packed when they are read together, and
    the cache holds their real tokens only. With context="slide" the older half of a row's window is
    forgotten when the window is full, and the rest is read anew: positions are learnt, so tokens
    cannot keep their keys and values when they move. use_cache=False reads all of it every time.
    """

    def __init__(self, model, config: GenerationConfig, cache: KVCache | None = None):
        self.model, self.cache, self.use_cache = model, cache, config.use_cache
        self.limit = model.config.n_positions
        self.starts: list[int] = []  # of each row, the first token of its window
        self.steps: Steps | None = None
        self.seen: list[Any] = []  # the outputs whose states or attentions were asked for
        self.shown = {
            name: getattr(config, name) or None
            for name in ("output_hidden_states", "output_attentions")
        }

    def start(self, rows: Rows) -> Tensor:
        """Logits (R, 1, V) after the prompts, of which a cache that was given holds the first."""
        self.starts = [0] * rows.count
        if self.cache is not None and self.cache.longest > 0:
            held = self.cache.lengths.tolist()
            rest = [rows.tokens(row)[n:] for row, n in enumerate(held)]
            if any(len(tokens) == 0 for tokens in rest):
                raise ValueError(
                    f"generate: past_key_values: got {held} cached tokens for prompts of as many, "
                    "accepted are prompts with at least one token more"
                )
            return self._read(rest, self.cache)
        return self._read_windows(rows)

    def step(self, rows: Rows, drafts: Tensor | None = None) -> Tensor:
        """Logits (R, 1 + n, V) after the newest tokens and each of the drafts (R, n)."""
        tokens = rows.last[:, None]
        if drafts is not None and drafts.shape[1]:
            tokens = torch.cat([tokens, drafts], 1)
        if self.cache is None or self.cache.longest + tokens.shape[1] > self.limit:
            return self._read_windows(rows)
        if tokens.shape[1] > 1 or any(self.shown.values()):
            return self._run(self.model, tokens, self.cache).logits
        if self.steps is None or not self.steps.fits(self.cache):
            self.steps = Steps(self.model, self.cache)
        return self.steps.logits(tokens)

    def drafts_fit(self) -> int:
        """How many drafts `step` can take beside the newest token."""
        return 0 if self.cache is None else max(0, self.limit - self.cache.longest - 1)

    def forget_drafts(self, rows: Rows) -> None:
        """Leaves in the cache of the one row what stands before its newest token."""
        if self.cache is not None:
            self.cache.crop(len(rows.tokens(0)) - 1 - self.starts[0])

    def select(self, index: Tensor) -> None:
        """Row i becomes what row index[i] was; there may be more rows than before."""
        if self.cache is None:
            pass
        elif len(index) == len(self.cache.lengths):
            self.cache.reorder_cache(index)
        else:
            self.cache = self.cache.select(index)
        self.starts = [self.starts[i] for i in index.tolist()]

    def _read_windows(self, rows: Rows) -> Tensor:
        windows = []
        for row in range(rows.count):
            tokens = rows.tokens(row)
            if len(tokens) - self.starts[row] > self.limit:
                self.starts[row] = len(tokens) - max(1, self.limit // 2)
            windows.append(tokens[self.starts[row] :])
        if not self.use_cache:
            return self._read(windows, None)
        room = max(map(len, windows)) + int((rows.limits - rows.made).max())
        self.cache = KVCache.for_model(self.model, rows.count, min(room, self.limit))
        return self._read(windows, self.cache)

    def _read(self, windows: list[Tensor], cache: KVCache | None) -> Tensor:
        ids, mask = left_padded(windows, 0)
        trunk = self._run(self.model.transformer, ids, cache, attention_mask=mask)
        return self.model.lm_head(trunk.last_hidden_state[:, -1:])

    def _run(self, module, ids: Tensor, cache: KVCache | None, **options):
        # Without a cache none is to be started either.
        if cache is None:
            options["use_cache"] = False
        output = module(ids, past_key_values=cache, return_dict=True, **options, **self.shown)
        if any(self.shown.values()):
            self.seen.append(output)
        return output
