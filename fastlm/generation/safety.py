"""Keeping listed words and patterns out of what is generated."""

import os
import re
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from .rows import Rows

# How letters are written otherwise, and which letter a listed word means by such a sign.
LOOKALIKES = {
    "a": "@4",
    "b": "8",
    "e": "3",
    "g": "9",
    "i": "1!|",
    "l": "1|",
    "o": "0",
    "s": "$5",
    "t": "7+",
    "z": "2",
}
MEANT = str.maketrans("@431!0$57", "aaeiiosst")
SEPARATOR = r"[._\-*]?"  # b.a.d
EDGE_BEFORE, EDGE_AFTER = r"(?<![^\W_])", r"(?![^\W_])"  # no letter or digit there
WINDOW = 64  # tokens in which a word or a pattern is looked for


class WordFilter:
    """`generate(..., word_filter=WordFilter(tokenizer, words))`: the words do not appear.

    words: None is the list of the package better-profanity (`pip install fastlm[safety]`); they are
    found whole ("class" holds none), in any case, spelt with look-alikes (b4d, B@D, b.a.d) or with
    letters repeated, and over token boundaries. A token that makes a word whole is refused even if
    more letters could follow. allow: words of the list that may appear. patterns: regular
    expressions, case ignored, searched within the last 64 tokens.

    A token that would complete one is taken away when it comes up, and another is chosen; what a
    prompt holds is left alone. `refused` counts what was kept out, str() sums it up. It looks at
    words, not at meaning: it is no judge of what a text says.
    """

    def __init__(
        self,
        tokenizer,
        words: Iterable[str] | None = None,
        *,
        patterns: Iterable[str] = (),
        allow: Iterable[str] = (),
    ):
        self.tokenizer = tokenizer
        listed = default_words() if words is None else list(words)
        kept = {_meant(word) for word in listed} - {_meant(word) for word in allow}
        self.patterns = [re.compile(pattern, re.IGNORECASE) for pattern in patterns]
        if kept - {""}:
            self.patterns.append(words_pattern(kept - {""}))
        self.refused: Counter[str] = Counter()

    def forbids(self, rows: Rows, tokens: Tensor, finished: Tensor | None = None) -> Tensor:
        """(R,) bool: would tokens (R,), as each row's next, complete a word or a pattern?

        Rows that are finished are not looked at.
        """
        skip = [False] * rows.count if finished is None else finished.tolist()
        found = [
            not skip[row] and self._found(rows.tokens(row)[-WINDOW:].tolist(), token)
            for row, token in enumerate(tokens.tolist())
        ]
        return torch.tensor(found, device=tokens.device)

    def _found(self, before: list[int], token: int) -> bool:
        decode = self.tokenizer.decode
        old, text = (decode(ids, skip_special_tokens=True) for ids in (before, [*before, token]))
        # Not len(old): bytes of a character may be decoded otherwise once it is whole.
        new = next((i for i, (a, b) in enumerate(zip(old, text)) if a != b), len(old))  # noqa: B905
        for pattern in self.patterns:
            match = pattern.search(text)
            while match is not None:
                if match.end() > new:
                    self.refused[match.group().lower()] += 1
                    return True
                match = pattern.search(text, match.start() + 1)
        return False

    def __str__(self) -> str:
        if not self.refused:
            return "word filter: nothing was kept out"
        most = ", ".join(f"{word} ({count})" for word, count in self.refused.most_common(5))
        return f"word filter: {self.refused.total()} kept out: {most}"


def default_words() -> list[str]:
    """The word list of better-profanity; ImportError says how to get it."""
    from importlib import util

    found = util.find_spec("better_profanity")
    if found is None or not found.submodule_search_locations:
        raise ImportError(
            "WordFilter: words: got None without the package better-profanity, accepted is a list "
            "of words, or: pip install fastlm[safety]"
        )
    path = os.path.join(found.submodule_search_locations[0], "profanity_wordlist.txt")
    with open(path, encoding="utf-8") as file:
        return [line.strip() for line in file if line.strip()]


def words_pattern(words: Iterable[str]) -> re.Pattern[str]:
    """One expression for all words, letter by letter along their common beginnings."""
    tree: dict = {}
    for word in words:
        node = tree
        for letter in word:
            node = node.setdefault(letter, {})
        node[""] = {}
    return re.compile(EDGE_BEFORE + _branches(tree), re.IGNORECASE)


def _branches(node: dict) -> str:
    # The longer words first: a word may begin with another.
    ways = [_sign(letter) + _branches(rest) for letter, rest in sorted(node.items()) if letter]
    ways += [EDGE_AFTER] if "" in node else []
    return ways[0] if len(ways) == 1 else f"(?:{'|'.join(ways)})"


def _sign(letter: str) -> str:
    if letter.isspace():
        return r"[\s_\-]+"
    signs = re.escape(letter + LOOKALIKES.get(letter, ""))
    return f"[{signs}]+{SEPARATOR}"


def _meant(word: str) -> str:
    """A listed word in plain letters: lists hold some words spelt with look-alikes already."""
    return " ".join(word.lower().translate(MEANT).split())
