"""Tokens in a memory-mapped file, made once for each text and tokenizer, and batches of them."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..files import replacing_folder, write_text
from ..text import TextError, documents, split
from ..tokenizer import GPT2Tokenizer

DOCUMENTS_AT_ONCE = 64  # tokenised in parallel


@dataclass
class TokenData:
    """Training and validation tokens, uint16 or uint32, memory-mapped.

    text: differs where the texts, the tokenizer or the split do; empty if that is not known.
    """

    train: np.ndarray
    validation: np.ndarray
    text: str = ""


def training_texts(files: list[Path], validation: float) -> Iterator[str]:
    """The texts that a new tokenizer may learn from: those not held out."""
    return (text for text, held_out in split(documents(files), validation) if not held_out)


def tokenize(
    files: list[Path], tokenizer: GPT2Tokenizer, cache_dir: Path, validation: float
) -> TokenData:
    """The tokens of `files`, from `cache_dir` where these texts were tokenised before.

    Every document is followed by the end-of-text token. The cache is keyed by the files' content,
    the tokenizer and the split. Raises TextError, or OSError where the disk is full; a cache entry
    appears only when it is whole.
    """
    folder = cache_dir / _fingerprint(files, tokenizer, validation)
    if not folder.is_dir():
        _write_tokens(files, tokenizer, folder, validation)
    description = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    train, held_out = (
        _map(folder / f"{part}.bin", description["dtype"]) for part in ("train", "validation")
    )
    return TokenData(train, held_out, text=folder.name)


def _map(path: Path, dtype: str) -> np.ndarray:
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def _fingerprint(files: list[Path], tokenizer: GPT2Tokenizer, validation: float) -> str:
    digest = hashlib.sha256(tokenizer.backend.to_str().encode())
    digest.update(f"{tokenizer.eos_token} {validation}".encode())
    for file in files:
        digest.update(f"\0{file.stat().st_size}\0".encode())
        with open(file, "rb") as opened:
            while chunk := opened.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def _write_tokens(files, tokenizer, folder: Path, validation: float) -> None:
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    # Another run that shares the cache may prepare the same text: the first to finish wins.
    with (
        replacing_folder(folder, keep_existing=True) as temporary,
        open(temporary / "train.bin", "wb") as train,
        open(temporary / "validation.bin", "wb") as held_out,
    ):
        for tokens, is_validation in _encode(files, tokenizer, validation):
            (held_out if is_validation else train).write(np.array(tokens, dtype).tobytes())
        write_text(temporary / "tokens.json", json.dumps({"dtype": np.dtype(dtype).name}))


def _encode(files, tokenizer, validation: float) -> Iterator[tuple[list[int], bool]]:
    total = sum(file.stat().st_size for file in files)
    pairs = split(documents(files), validation)
    with tqdm(total=total, desc="tokenising", unit="B", unit_scale=True) as bar:
        while batch := list(islice(pairs, DOCUMENTS_AT_ONCE)):
            texts = [text for text, _ in batch]
            for encoding, (text, is_validation) in zip(
                tokenizer.backend.encode_batch_fast(texts), batch, strict=True
            ):
                bar.update(len(text.encode()))
                yield [*encoding.ids, tokenizer.eos_token_id], is_validation


class Windows:
    """Sequences of seq_len tokens, each once an epoch, in an order that the seed alone decides.

    `batch(position, size)` depends on nothing else, so a run resumes where it was by knowing how
    many windows it has taken. Each epoch starts at another offset, so that windows differ.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, seed: int):
        # One token more than a window, for its last target; seq_len - 1 more, for the offset.
        self.count = (len(tokens) - 1) // seq_len - 1
        if self.count < 1:
            raise TextError(
                f"train: got {len(tokens)} training tokens, accepted are at least "
                f"{2 * seq_len + 1} for seq_len = {seq_len}: give more text or a "
                "smaller seq_len"
            )
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self._epoch, self._offset, self._order = -1, 0, np.empty(0, np.int64)

    def batch(self, position: int, size: int) -> tuple[Tensor, Tensor]:
        """(inputs, targets), int64 (size, seq_len): windows position to position + size - 1."""
        starts = [self._start(position + i) for i in range(size)]
        return stack_windows(self.tokens, starts, self.seq_len)

    def _start(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            random = np.random.default_rng([self.seed, epoch])
            self._epoch, self._offset = epoch, int(random.integers(self.seq_len))
            self._order = random.permutation(self.count)
        return self._offset + int(self._order[place]) * self.seq_len


def stack_windows(tokens: np.ndarray, starts: Iterable[int], seq_len: int) -> tuple[Tensor, Tensor]:
    """(inputs, targets), int64 (len(starts), seq_len); targets are one token further on."""
    rows = np.stack([tokens[start : start + seq_len + 1] for start in starts]).astype(np.int64)
    both = torch.from_numpy(rows)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def validation_batches(
    tokens: np.ndarray, seq_len: int, batch_size: int, batches: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, targets) over all of `tokens`, or `batches` batches spread evenly over it.

    Always the same ones, so that losses of different steps can be compared.
    """
    starts = np.arange(0, len(tokens) - seq_len, seq_len)
    wanted = len(starts) if batches is None else min(len(starts), batches * batch_size)
    chosen = starts[np.linspace(0, len(starts), wanted, endpoint=False).astype(np.int64)]
    for first in range(0, wanted, batch_size):
        yield stack_windows(tokens, chosen[first : first + batch_size], seq_len)
