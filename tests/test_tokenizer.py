"""The tokenizer: GPT-2's known ids, round trips, files both ways, and bad input."""

import json

import pytest
import torch

from fastlm.tokenizer import GPT2Tokenizer

# Ids of OpenAI's own encoder.
KNOWN = {
    "The quick brown fox": [464, 2068, 7586, 21831],
    "Hello world": [15496, 995],
    " Hello": [18435],
    "<|endoftext|>": [50256],
}
AWKWARD = [
    "",
    " ",
    "line\r\n\tindented\n\n\n",
    "naïve café, Ελλάδα, 東京, 🙂🏽",
    "don't we'll I'VE 12345 x=[1,2];",
    "\x00\x7f\x85\u2028",
]


@pytest.fixture(scope="module")
def gpt2():
    return GPT2Tokenizer.gpt2()


@pytest.fixture(scope="module")
def trained():
    return GPT2Tokenizer.train(["the cat sat on the mat\n"] * 20, 270, show_progress=False)


@pytest.mark.parametrize("text", KNOWN)
def test_known_ids(gpt2, text):
    assert gpt2.encode(text) == KNOWN[text]


def test_whole_vocabulary_is_gpt2s(gpt2):
    vocab = gpt2.get_vocab()
    assert len(gpt2) == gpt2.vocab_size == len(vocab) == 50257
    # The first and last of each of the four parts: printable bytes, other bytes, merges, the end.
    for token, number in {"!": 0, "ÿ": 187, "Ā": 188, "Ń": 255, "Ġt": 256, "Ġgazed": 50255}.items():
        assert vocab[token] == number
    assert vocab["<|endoftext|>"] == gpt2.eos_token_id == gpt2.bos_token_id == 50256


@pytest.mark.parametrize("text", AWKWARD)
def test_text_comes_back(gpt2, trained, text):
    assert gpt2.decode(gpt2.encode(text)) == text
    assert trained.decode(trained.encode(text)) == text


def test_same_ids_as_transformers(gpt2, tmp_path):
    transformers = pytest.importorskip("transformers")
    gpt2.save_pretrained(tmp_path)
    theirs = transformers.GPT2TokenizerFast.from_pretrained(tmp_path)
    for text in [*KNOWN, *AWKWARD]:
        assert gpt2.encode(text) == theirs.encode(text)
        assert gpt2.decode(gpt2.encode(text)) == theirs.decode(theirs.encode(text))
    assert (theirs.eos_token, theirs.pad_token) == (gpt2.eos_token, None)


def test_reads_what_transformers_writes(gpt2, tmp_path):
    transformers = pytest.importorskip("transformers")
    gpt2.save_pretrained(tmp_path / "ours")
    theirs = transformers.GPT2TokenizerFast.from_pretrained(tmp_path / "ours")
    theirs.pad_token, theirs.padding_side = theirs.eos_token, "left"
    theirs.save_pretrained(tmp_path / "theirs")
    again = GPT2Tokenizer.from_pretrained(tmp_path / "theirs")
    assert again.get_vocab() == gpt2.get_vocab()
    assert (again.pad_token_id, again.padding_side, again.model_max_length) == (50256, "left", 1024)


def test_reads_vocabulary_and_merges_alone(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    again = GPT2Tokenizer.from_pretrained(tmp_path)
    text = "the cat<|endoftext|> sat, naïve"
    assert again.encode(text) == trained.encode(text)


def test_padding_and_attention_mask(gpt2):
    tokenizer = GPT2Tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    texts = ["The quick brown fox", "Hello world"]
    right = tokenizer(texts, return_tensors="pt", padding=True)
    assert right.input_ids.tolist() == [KNOWN[texts[0]], [15496, 995, 50256, 50256]]
    assert right.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    tokenizer.padding_side = "left"
    left = tokenizer(texts, return_tensors="pt", padding="max_length", max_length=5)
    assert left["input_ids"][1].tolist() == [50256, 50256, 50256, 15496, 995]
    assert left["attention_mask"].dtype == torch.int64
    assert gpt2.pad_token_id is None, "the setting of one tokenizer reached another"


def test_truncation_and_single_text(gpt2):
    assert gpt2("The quick brown fox", truncation=True, max_length=2)["input_ids"] == [464, 2068]
    assert gpt2.encode("Hello world", return_tensors="pt").tolist() == [[15496, 995]]
    assert gpt2.batch_decode(torch.tensor([[464, 2068], [15496, 50256]]), True) == [
        "The quick",
        "Hello",
    ]


def test_training_learns_the_text(trained):
    assert 257 < len(trained) <= 270
    text = "the cat sat on the mat\n"
    assert len(trained.encode(text)) < len(text.encode())
    assert trained.decode([trained.eos_token_id]) == "<|endoftext|>"


def test_training_from_files_is_training_on_their_text(tmp_path):
    texts = ["one two three two one\n" * 5, "three three four\n" * 5]
    paths = []
    for number, text in enumerate(texts):
        paths.append(tmp_path / f"{number}.txt")
        paths[-1].write_text(text, encoding="utf-8")
    from_files = GPT2Tokenizer.train(paths, 280, show_progress=False)
    assert (
        from_files.get_vocab() == GPT2Tokenizer.train(texts, 280, show_progress=False).get_vocab()
    )


@pytest.mark.parametrize(
    ("wrong", "error", "named"),
    [
        (lambda t: t(["a", "b c d"], padding=True), ValueError, "pad_token = tokenizer.eos_token"),
        (lambda t: t(["a", "b c d"], return_tensors="pt"), ValueError, r"\[1, 3\].*padding=True"),
        (lambda t: t("a", return_tensors="np"), ValueError, "'np'"),
        (lambda t: t.decode([50257]), IndexError, "50257.*0 to 50256"),
        (lambda t: t.decode([-1]), IndexError, "-1"),
        (lambda t: setattr(t, "pad_token", "[PAD]"), ValueError, r"\[PAD\]"),
        (lambda t: setattr(t, "padding_side", "top"), ValueError, "'top'.*'left' and 'right'"),
        (lambda t: t.train(["a"], 256), ValueError, "256.*>= 257"),
    ],
)
def test_bad_input_is_named(gpt2, wrong, error, named):
    with pytest.raises(error, match=named):
        wrong(gpt2)


def test_missing_and_damaged_files_are_named(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*tokenizer\.json"):
        GPT2Tokenizer.from_pretrained(tmp_path / "nowhere")
    trained.save_pretrained(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(whole[:500], encoding="utf-8")
    with pytest.raises(ValueError, match=str(tmp_path)):
        GPT2Tokenizer.from_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["tokenizer_class"] == "GPT2Tokenizer"
