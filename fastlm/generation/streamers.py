"""What is told of every token while it is generated: anything with put(ids) and end()."""

import sys
from collections.abc import Iterator
from queue import Queue
from typing import Protocol, TextIO

from torch import Tensor


class Streamer(Protocol):
    def put(self, ids: Tensor) -> None:
        """First the prompt (B, T), then each step's tokens (B,), all on the CPU."""

    def end(self) -> None:
        """No more tokens follow."""


class TextStreamer:
    """Writes the text of one sequence as it comes, to the terminal unless told otherwise.

    A character of several bytes may be split over tokens; text is held back until it is whole.
    Raises ValueError for a batch of more than one.
    """

    def __init__(
        self, tokenizer, skip_prompt: bool = False, file: TextIO | None = None, **decode_options
    ):
        self.tokenizer = tokenizer
        self.skip_next = skip_prompt
        self.file = sys.stdout if file is None else file
        self.decode_options = decode_options
        self.pending: list[int] = []

    def put(self, ids: Tensor) -> None:
        if ids.ndim > 1 and ids.shape[0] != 1:
            raise ValueError(
                f"TextStreamer: got a batch of {ids.shape[0]}, accepted is one sequence"
            )
        if self.skip_next:
            self.skip_next = False
            return
        self.pending += ids.flatten().tolist()
        text = self.tokenizer.decode(self.pending, **self.decode_options)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._write(text)

    def end(self) -> None:
        self._write(self.tokenizer.decode(self.pending, **self.decode_options) + "\n")

    def _write(self, text: str) -> None:
        self.pending.clear()
        print(text, end="", file=self.file, flush=True)


class TextIteratorStreamer(TextStreamer):
    """Gives the text of one sequence piece by piece to whoever iterates, in another thread.

    timeout: seconds to wait for a piece before queue.Empty is raised; None waits for ever.
    """

    def __init__(
        self, tokenizer, skip_prompt: bool = False, timeout: float | None = None, **decode_options
    ):
        super().__init__(tokenizer, skip_prompt, **decode_options)
        self.pieces: Queue[str | None] = Queue()
        self.timeout = timeout

    def end(self) -> None:
        self._write(self.tokenizer.decode(self.pending, **self.decode_options))
        self.pieces.put(None)

    def _write(self, text: str) -> None:
        self.pending.clear()
        if text:
            self.pieces.put(text)

    def __iter__(self) -> Iterator[str]:
        while (piece := self.pieces.get(timeout=self.timeout)) is not None:
            yield piece
