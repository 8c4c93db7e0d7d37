"""An interpolated bigram model: the baseline that a trained GPT must beat.

p(b | a) = w2 * count(a, b) / count(a) + w1 * count(b) / total + w0 / vocab_size, with the weights
found by expectation maximisation on tokens that were not counted (Jelinek & Mercer, 1980).
"""

import numpy as np

TUNING_SHARE = 0.05  # of the training tokens, at their end
EM_ROUNDS = 50  # the weights have settled to four digits long before


class Bigram:
    """Counts of `tokens` (N,), integers below vocab_size, with weights tuned on their last part."""

    def __init__(self, tokens: np.ndarray, vocab_size: int):
        self.vocab_size = vocab_size
        cut = int(len(tokens) * (1 - TUNING_SHARE))
        self._count(tokens[:cut])
        self.weights = self._tune(tokens[cut:])
        self._count(tokens)  # the weights are known: what tuned them may now be counted too

    def loss(self, tokens: np.ndarray) -> float:
        """Mean negative log-likelihood, in nats, of each token after the first given the last."""
        return float(-np.log(self._probabilities(tokens) @ self.weights).mean())

    def _count(self, tokens: np.ndarray) -> None:
        self.unigrams = np.bincount(tokens, minlength=self.vocab_size)
        self.followed = np.bincount(tokens[:-1], minlength=self.vocab_size)
        self.pairs, self.pair_counts = np.unique(self._pairs_of(tokens), return_counts=True)

    def _pairs_of(self, tokens: np.ndarray) -> np.ndarray:
        wide = tokens.astype(np.int64)
        return wide[:-1] * self.vocab_size + wide[1:]

    def _probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """(N - 1, 3): what bigram, unigram and uniform model each say of every next token."""
        pairs = self._pairs_of(tokens)
        place = np.searchsorted(self.pairs, pairs).clip(max=len(self.pairs) - 1)
        counts = np.where(self.pairs[place] == pairs, self.pair_counts[place], 0)
        bigram = counts / np.maximum(self.followed[tokens[:-1]], 1)
        unigram = self.unigrams[tokens[1:]] / self.unigrams.sum()
        return np.stack([bigram, unigram, np.full(len(pairs), 1 / self.vocab_size)], axis=1)

    def _tune(self, tokens: np.ndarray) -> np.ndarray:
        probabilities = self._probabilities(tokens)
        weights = np.full(3, 1 / 3)
        for _ in range(EM_ROUNDS):
            shares = probabilities * weights
            weights = (shares / shares.sum(1, keepdims=True)).mean(0)
        return weights
