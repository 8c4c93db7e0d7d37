"""Where a tokenizer's tokens come from: GPT-2's own, in this package, or a folder's files.

GPT-2's vocabulary ships as OpenAI's list of merges alone; the token ids follow from it.
"""

import gzip
from functools import lru_cache
from importlib import resources
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

END_OF_TEXT = "<|endoftext|>"
FILE, VOCAB, MERGES = "tokenizer.json", "vocab.json", "merges.txt"


def byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def bytes_in_order() -> list[str]:
    """The 256 characters that stand for bytes, in the order of GPT-2's ids.

    Printable bytes stand for themselves and come first; the 68 others follow as U+0100 on, which is
    also the order of their code points.
    """
    return sorted(pre_tokenizers.ByteLevel.alphabet())


@lru_cache(maxsize=1)
def gpt2_json() -> str:
    """GPT-2's tokenizer as the text of a tokenizer.json, from which copies are made."""
    packed = resources.files("fastlm") / "data" / "gpt2.vocab.bpe.gz"
    _version, *lines = gzip.decompress(packed.read_bytes()).decode("utf-8").splitlines()
    return _from_merges([tuple(line.split()) for line in lines]).to_str()


def _from_merges(merges: list) -> Tokenizer:
    """The ids of GPT-2: the bytes, then one token a merge, then the end of text."""
    tokens = [*bytes_in_order(), *("".join(pair) for pair in merges), END_OF_TEXT]
    vocab = {token: number for number, token in enumerate(tokens)}
    return _with_end_of_text(byte_level(models.BPE(vocab, merges)))


def _with_end_of_text(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
    return tokenizer


def load(folder: Path) -> Tokenizer:
    """The tokenizer of tokenizer.json, or of vocab.json and merges.txt; or FileNotFoundError."""
    if (folder / FILE).is_file():
        return Tokenizer.from_file(str(folder / FILE))
    if (folder / VOCAB).is_file() and (folder / MERGES).is_file():
        vocab, merges = models.BPE.read_file(str(folder / VOCAB), str(folder / MERGES))
        return _with_end_of_text(byte_level(models.BPE(vocab, merges)))
    raise FileNotFoundError(
        f"{folder}: no such files; accepted is a folder that holds {FILE}, or {VOCAB} and {MERGES}"
    )
