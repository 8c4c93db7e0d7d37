"""GPT-2's byte-level BPE tokenizer, over the `tokenizers` library, with transformers' names.

Byte-pair encoding: Sennrich et al., 2016, "Neural Machine Translation of Rare Words with Subword
Units"; over bytes: Radford et al., 2019.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, trainers

from .files import write_text
from .hub import Source
from .text import read_text
from .vocabulary import (
    END_OF_TEXT,
    FILE,
    MERGES,
    VOCAB,
    byte_level,
    bytes_in_order,
    gpt2_json,
    load,
)

SETTINGS = "tokenizer_config.json"


class BatchEncoding(dict):
    """input_ids and attention_mask, as items or as attributes; `**encoding` feeds a model."""

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"BatchEncoding has no {name!r}") from None

    def to(self, device) -> "BatchEncoding":
        """The same on `device`; for tensors, not lists."""
        return BatchEncoding({name: tensor.to(device) for name, tensor in self.items()})


class GPT2Tokenizer:
    """Text to token ids and back, without loss. `GPT2Tokenizer()` is GPT-2's own, offline.

    pad_token is None until set, as in transformers; padding_side is "right" or "left". Text that
    spells a special token, such as <|endoftext|>, is encoded as that token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None = None,
        *,
        eos_token: str = END_OF_TEXT,
        pad_token: str | None = None,
        padding_side: str = "right",
        model_max_length: int | None = None,
    ):
        self.backend = Tokenizer.from_str(gpt2_json()) if tokenizer is None else tokenizer
        self.model_max_length = model_max_length or (1024 if tokenizer is None else None)
        self.eos_token = eos_token
        self.pad_token = pad_token
        self.padding_side = padding_side

    @classmethod
    def gpt2(cls) -> "GPT2Tokenizer":
        """GPT-2's own vocabulary of 50257 tokens, from the file in this package."""
        return cls()

    @classmethod
    def train(
        cls, texts: Iterable[str] | Iterable[Path], vocab_size: int, *, show_progress: bool = True
    ) -> "GPT2Tokenizer":
        """A new vocabulary learnt from `texts`: strings are text, Path objects are UTF-8 files.

        vocab_size counts the 256 bytes and <|endoftext|>, so at least 257 (ValueError). Raises
        TextError for a file that is not UTF-8.
        """
        if vocab_size < 257:
            raise ValueError(
                f"GPT2Tokenizer.train: vocab_size: got {vocab_size}, accepted is "
                ">= 257 (256 bytes and the end of text)"
            )
        tokenizer = byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=bytes_in_order(),
            show_progress=show_progress,
        )
        tokenizer.train_from_iterator(map(_read, texts), trainer)
        return cls(tokenizer)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **options) -> "GPT2Tokenizer":
        """Reads tokenizer.json, or vocab.json and merges.txt, of a folder or of a name on the hub.

        options: hub.Source's. FileNotFoundError without files, ValueError where they are no such.
        """
        folder, settings = Source(name_or_path, **options).folder(SETTINGS, FILE, VOCAB, MERGES), {}
        try:
            if (folder / SETTINGS).is_file():
                settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            tokenizer = load(folder)
        except FileNotFoundError:
            raise
        except Exception as error:  # tokenizers raises plain Exception for a damaged file
            raise ValueError(f"{folder}: the tokenizer's files cannot be read: {error}") from error
        length = settings.get("model_max_length")
        return cls(
            tokenizer,
            eos_token=_spelling(settings.get("eos_token")) or END_OF_TEXT,
            pad_token=_spelling(settings.get("pad_token")),
            padding_side=settings.get("padding_side", "right"),
            # transformers writes 1e30 for "no limit".
            model_max_length=length if length and length < 1e9 else None,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json, vocab.json and merges.txt."""
        folder = Path(folder)
        model = json.loads(self.backend.to_str())["model"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        settings = {
            "tokenizer_class": "GPT2Tokenizer",
            "add_prefix_space": False,
            "bos_token": self.eos_token,
            "eos_token": self.eos_token,
            "unk_token": self.eos_token,
            "pad_token": self.pad_token,
            "padding_side": self.padding_side,
        }
        if self.model_max_length is not None:
            settings["model_max_length"] = self.model_max_length
        write_text(folder / FILE, self.backend.to_str())
        write_text(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")
        write_text(folder / VOCAB, json.dumps(self.get_vocab(), ensure_ascii=False))
        write_text(folder / MERGES, "\n".join(["#version: 0.2", *merges, ""]))

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        return_tensors: str | None = None,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
    ) -> BatchEncoding:
        """input_ids and attention_mask of one text or a list of texts.

        return_tensors="pt" gives int64 tensors (batch, tokens). padding=True pads to the longest,
        "max_length" to max_length; truncation=True cuts to max_length. Raises ValueError where the
        rows have different lengths and no padding was asked for, or padding without a pad token.
        """
        single = isinstance(text, str)
        limit = max_length or self.model_max_length
        if (truncation or padding == "max_length") and limit is None:
            raise ValueError(
                "GPT2Tokenizer: max_length: got None, accepted is a number where truncation or "
                "padding needs one"
            )
        texts = [text] if single else list(text)
        rows = [encoding.ids for encoding in self.backend.encode_batch(texts)]
        rows = [row[:limit] for row in rows] if truncation else rows
        masks = [[1] * len(row) for row in rows]
        if padding:
            longest = max(map(len, rows), default=0)
            width = limit if limit and padding == "max_length" else longest
            masks = [self._pad(row, width, 0) for row in masks]
            rows = [self._pad(row, width, self._pad_id()) for row in rows]
        if return_tensors is None:
            return BatchEncoding(
                input_ids=rows[0] if single else rows, attention_mask=masks[0] if single else masks
            )
        return _as_tensors(return_tensors, input_ids=rows, attention_mask=masks)

    def _pad(self, row: list[int], width: int, filler: int) -> list[int]:
        fill = [filler] * (width - len(row))
        return fill + row if self.padding_side == "left" else row + fill

    def _pad_id(self) -> int:
        if self.pad_token_id is None:
            raise ValueError(
                "GPT2Tokenizer: padding: there is no pad token; set one, for example "
                "tokenizer.pad_token = tokenizer.eos_token"
            )
        return self.pad_token_id

    def encode(self, text: str, return_tensors: str | None = None):
        """The ids of `text`: a list, or a (1, tokens) tensor with return_tensors="pt"."""
        if return_tensors is None:
            return self.backend.encode(text).ids
        return self([text], return_tensors=return_tensors)["input_ids"]

    def decode(
        self, ids: int | Sequence[int] | torch.Tensor, skip_special_tokens: bool = False
    ) -> str:
        """The text of one sequence; bytes that are no UTF-8 become the replacement character."""
        ids = ids.tolist() if isinstance(ids, torch.Tensor) else ids
        ids = [ids] if isinstance(ids, int) else list(ids)
        low, high = min(ids, default=0), max(ids, default=0)
        if low < 0 or high >= len(self):
            raise IndexError(
                f"GPT2Tokenizer.decode: got id {low if low < 0 else high}, accepted "
                f"are 0 to {len(self) - 1}"
            )
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(self, rows, skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(row, skip_special_tokens) for row in rows]

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """The size of the base vocabulary; len() counts tokens added to it too."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    def get_vocab(self) -> dict[str, int]:
        return dict(sorted(self.backend.get_vocab().items(), key=lambda item: item[1]))

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    @property
    def eos_token(self) -> str:
        return self._eos_token

    @eos_token.setter
    def eos_token(self, token: str) -> None:
        self._id(token)  # which refuses what is no token
        self._eos_token = token

    @property
    def eos_token_id(self) -> int:
        return self._id(self.eos_token)

    # GPT-2 has one special token, and it does the work of both.
    bos_token = eos_token
    bos_token_id = eos_token_id

    @property
    def pad_token(self) -> str | None:
        return self._pad_token

    @pad_token.setter
    def pad_token(self, token: str | None) -> None:
        if token is not None:
            self._id(token)
        self._pad_token = token

    @property
    def pad_token_id(self) -> int | None:
        return None if self.pad_token is None else self._id(self.pad_token)

    @property
    def padding_side(self) -> str:
        return self._padding_side

    @padding_side.setter
    def padding_side(self, side: str) -> None:
        if side not in ("left", "right"):
            raise ValueError(
                f"GPT2Tokenizer: padding_side: got {side!r}, accepted are 'left' and 'right'"
            )
        self._padding_side = side

    def _id(self, token: str) -> int:
        number = self.backend.token_to_id(token)
        if number is None:
            raise ValueError(
                f"GPT2Tokenizer: got the special token {token!r}, accepted is one of the vocabulary"
            )
        return number


def _spelling(token) -> str | None:
    """A special token as tokenizer_config.json gives it: a string, or a dict around one."""
    return token["content"] if isinstance(token, dict) else token


def _read(text: str | Path) -> str:
    return read_text(text) if isinstance(text, Path) else text


def _as_tensors(kind: str, **rows: list[list[int]]) -> BatchEncoding:
    if kind != "pt":
        raise ValueError(f"GPT2Tokenizer: return_tensors: got {kind!r}, accepted are 'pt' and None")
    lengths = sorted({len(row) for row in rows["input_ids"]})
    if len(lengths) > 1:
        raise ValueError(
            f"GPT2Tokenizer: got texts of {lengths} tokens, accepted in one tensor are equal "
            "lengths, or padding=True"
        )
    tensors = {name: torch.tensor(lists, dtype=torch.int64) for name, lists in rows.items()}
    return BatchEncoding(tensors)
