"""Text files to batches of tokens, and the bigram model that is counted from them."""

import math

import numpy as np
import pytest
import torch

from fastlm.text import TextError, documents, find_files, split
from fastlm.tokenizer import GPT2Tokenizer
from fastlm.training.bigram import Bigram
from fastlm.training.data import Windows, tokenize, training_texts, validation_batches


@pytest.fixture
def text_folder(tmp_path):
    """60 kB in three files; a line is 20 bytes long, a hundredth of the text 30 lines."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(3):
        lines = (f"file {number}, line {line:06d}\n" for line in range(1000))
        (folder / f"{number}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def test_documents_are_the_text_in_order(text_folder):
    files = find_files([text_folder])
    pieces = list(documents(files))
    assert "".join(pieces) == "".join(file.read_text(encoding="utf-8") for file in files)
    assert len(pieces) > len(files)
    assert all(piece.endswith("\n") for piece in pieces[:3])


def test_split_holds_out_the_fraction_evenly():
    pieces = [f"{number:04d}" for number in range(1000)]
    marked = list(split(pieces, 0.1))
    assert [text for text, _ in marked] == pieces
    held = [number for number, (_, held_out) in enumerate(marked) if held_out]
    assert len(held) == 100 and set(np.diff(held)) == {10}


def test_folders_give_their_text_files_sorted(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.py", "image.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = [path.relative_to(tmp_path).as_posix() for path in find_files([tmp_path])]
    assert found == ["a.md", "b.txt", "sub/c.py"]
    assert find_files([tmp_path / "image.png"]) == [tmp_path / "image.png"]


def test_tokens_are_every_document_and_its_end(text_folder, tmp_path):
    files, tokenizer = find_files([text_folder]), GPT2Tokenizer()
    data = tokenize(files, tokenizer, tmp_path, 0.1)
    assert data.train.dtype == np.uint16 and isinstance(data.train, np.memmap)
    for tokens, wanted in ((data.train, False), (data.validation, True)):
        texts = [text for text, held_out in split(documents(files), 0.1) if held_out == wanted]
        assert tokenizer.decode(tokens.tolist()) == "".join(t + "<|endoftext|>" for t in texts)
    assert list(training_texts(files, 0.1)) == [
        text for text, held_out in split(documents(files), 0.1) if not held_out
    ]


def test_tokens_are_made_once_for_each_content(tmp_path):
    file, tokenizer = tmp_path / "a.txt", GPT2Tokenizer()
    file.write_text("some words\n" * 400, encoding="utf-8")
    tokenize([file], tokenizer, tmp_path / "cache", 0.1)
    (entry,) = (tmp_path / "cache").iterdir()
    made = (entry / "train.bin").stat().st_mtime_ns
    tokenize([file], tokenizer, tmp_path / "cache", 0.1)
    assert (entry / "train.bin").stat().st_mtime_ns == made
    file.write_text("other words\n" * 400, encoding="utf-8")
    tokenize([file], tokenizer, tmp_path / "cache", 0.1)
    tokenize([file], tokenizer, tmp_path / "cache", 0.2)
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_windows_take_every_token_once_an_epoch():
    tokens = np.arange(1000, dtype=np.uint16)
    windows = Windows(tokens, 10, seed=0)
    inputs, targets = windows.batch(0, windows.count)
    assert targets.equal(inputs + 1)
    taken = inputs.flatten().sort().values
    assert taken.equal(torch.arange(windows.count * 10) + taken[0]) and taken[0] < 10
    second, _ = windows.batch(windows.count, windows.count)
    assert not second.equal(inputs), "the second epoch has the order of the first"
    assert windows.batch(5, 3)[0].equal(inputs[5:8]), "the order depends on what was asked before"


def test_validation_batches_cover_all_or_an_even_part():
    tokens = np.arange(101, dtype=np.uint16)
    inputs = torch.cat([x for x, _ in validation_batches(tokens, 10, 4)])
    assert inputs.flatten().equal(torch.arange(100))
    part = torch.cat([x for x, _ in validation_batches(tokens, 10, 2, batches=1)])
    assert part[:, 0].tolist() == [0, 50]


def test_bigram_model_knows_its_own_chain():
    """Tokens of a known Markov chain: the loss is that chain's entropy rate."""
    random = np.random.default_rng(0)
    chain = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.6, 0.1]])
    tokens = [0]
    for uniform in random.random(60_000):
        tokens.append(int(np.searchsorted(chain[tokens[-1]].cumsum(), uniform)))
    tokens = np.array(tokens, np.uint16)
    values, vectors = np.linalg.eig(chain.T)
    stationary = np.real(vectors[:, np.argmax(np.real(values))])
    stationary /= stationary.sum()
    entropy = -(stationary[:, None] * chain * np.log(chain)).sum()
    loss = Bigram(tokens[:40_000], 3).loss(tokens[40_000:])
    # The mean of 20000 values of -log p, whose spread is below log(10): four standard errors.
    assert loss == pytest.approx(entropy, abs=4 * math.log(10) / 20_000**0.5)


def test_bigram_model_survives_unseen_tokens():
    loss = Bigram(np.array([0, 1] * 100, np.uint16), 50).loss(np.array([7, 8, 0, 49], np.uint16))
    assert math.isfinite(loss) and loss > math.log(2)


def test_file_that_is_not_utf8_is_named_with_the_byte(tmp_path):
    bad = tmp_path / "latin.txt"
    bad.write_bytes(b"plain, then caf" + b"\xe9 and more\n" * 50)
    with pytest.raises(TextError, match=r"latin\.txt: not UTF-8: got byte 0xe9 at offset 15"):
        tokenize([bad], GPT2Tokenizer(), tmp_path / "cache", 0.1)
    assert not list((tmp_path / "cache").iterdir())


def test_missing_empty_and_too_little_text_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_files([tmp_path / "nowhere"])
    with pytest.raises(TextError, match=r"no text in.*\.txt"):
        find_files([tmp_path])
    with pytest.raises(TextError, match="got 32 training tokens, accepted are at least 33"):
        Windows(np.zeros(32, np.uint16), 16, seed=0)
    assert Windows(np.zeros(33, np.uint16), 16, seed=0).count == 1
