"""The word filter: what it keeps out, however it is spelt or cut, and what it lets through."""

import pytest
import torch

from fastlm import cli
from fastlm.generation import WordFilter
from fastlm.models import GPT2Config, GPT2LMHeadModel
from fastlm.tokenizer import GPT2Tokenizer

TOKENIZER = GPT2Tokenizer()
START = torch.tensor([[50256]])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**shape)).eval()


def insisting_on(pieces):
    """A processor by which the model says `pieces` one after the other, given the chance."""
    ids = [TOKENIZER.encode(piece)[0] for piece in pieces]
    assert TOKENIZER.decode(ids) == "".join(pieces), "each piece is to be one token"

    def process(input_ids, scores):
        place = min(input_ids.shape[1] - 1, len(ids) - 1)
        wish = torch.full_like(scores, 0.0).scatter_(1, torch.tensor([[ids[place]]]), 50.0)
        return torch.where(scores.isneginf(), scores, scores * 0.01 + wish)

    return [process]


def say(model, pieces, words=("badger", "to be", "rat"), **options):
    word_filter = WordFilter(TOKENIZER, words, **options)
    ids = model.generate(
        START, logits_processor=insisting_on(pieces), max_new_tokens=len(pieces),
        word_filter=word_filter, eos_token_id=-1,
    )  # fmt: skip
    return TOKENIZER.decode(ids[0, 1:]), word_filter


KEPT_OUT = [
    ["The", " bad", "ger"],
    ["B", "AD", "GER"],
    ["A", " b", "4", "d", "ger"],
    ["A", " b", "@", "d", "g", "3", "r"],
    ["b", ".", "a", ".", "d", ".", "g", ".", "e", ".", "r"],
    ["A", " b", "aaa", "ad", "ger"],
    ["or", " not", " to", " be"],
    ["or", " to", "\n", "be"],
    ["a", " rat"],
    ["a", " (", "rat", ")"],
]


@pytest.mark.parametrize("pieces", KEPT_OUT, ids="|".join)
def test_words_are_kept_out(model, pieces):
    text, word_filter = say(model, pieces)
    assert text != "".join(pieces) and sum(word_filter.refused.values()) >= 1
    assert not word_filter.patterns[0].search(text)
    assert "kept out" in str(word_filter) and "nothing" not in str(word_filter)


LET_THROUGH = [
    ["c", "rat", "e"],
    ["The", " bad", " German"],
    ["gr", "ate", "ful"],
    ["to", " bet"],
    ["2", "rat"],
]


@pytest.mark.parametrize("pieces", LET_THROUGH, ids="|".join)
def test_words_inside_others_are_let_through(model, pieces):
    text, word_filter = say(model, pieces)
    assert text == "".join(pieces)
    assert str(word_filter) == "word filter: nothing was kept out"


def test_patterns_and_allowed_words(model):
    pieces = ["call", " 555", "-", "12", "34"]
    text, word_filter = say(model, pieces, words=[], patterns=[r"\d{3}-\d{4}"])
    assert text.startswith("call 555-12") and not text.endswith("34")
    assert word_filter.refused["555-1234"] == 1
    assert say(model, ["a", " rat"], allow=["Rat"])[0] == "a rat"


def test_it_is_off_unless_given_and_prompts_are_left_alone(model):
    process = insisting_on(["a", " rat", "!"])
    ids = model.generate(START, logits_processor=process, max_new_tokens=3)
    assert TOKENIZER.decode(ids[0, 1:]) == "a rat!"
    prompt = TOKENIZER.encode("a rat", return_tensors="pt")
    word_filter = WordFilter(TOKENIZER, ["rat"])
    longer = model.generate(prompt, max_new_tokens=3, word_filter=word_filter, eos_token_id=-1)
    assert longer[:, :2].equal(prompt) and not word_filter.refused


WAYS = [{}, {"do_sample": True, "top_k": 1, "seed": 0}, {"num_beams": 3}]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_every_way_of_choosing(model, options):
    word_filter = WordFilter(TOKENIZER, ["badger"])
    process = insisting_on(["The", " bad", "ger", " is"])
    rows = model.generate(
        START, logits_processor=process, max_new_tokens=4, word_filter=word_filter,
        eos_token_id=-1, **options,
    )  # fmt: skip
    text = TOKENIZER.decode(rows[0, 1:])
    assert text.startswith("The bad") and "badger" not in text and word_filter.refused["badger"]


def test_draws_follow_what_is_allowed():
    """Chi-squared with 3 degrees of freedom: a right sampler passes 30.7 once in a million."""
    letters = [TOKENIZER.encode(letter)[0] for letter in "abcde"]
    shape = {"vocab_size": 100, "n_embd": 16, "n_layer": 1, "n_head": 2, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(**shape))
    shares = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])

    def process(ids, scores):
        told = torch.full_like(scores, -torch.inf)
        told[:, letters] = shares.log()
        return torch.where(scores.isneginf(), scores, told)

    drawn = model.generate(
        torch.tensor([[0]]), do_sample=True, max_new_tokens=1, num_return_sequences=3000, seed=1,
        logits_processor=[process], word_filter=WordFilter(TOKENIZER, ["b"]),
    )[:, 1]  # fmt: skip
    counts = torch.stack([(drawn == letter).sum() for letter in letters])
    assert counts[1] == 0 and counts.sum() == 3000
    kept = [0, 2, 3, 4]
    expected = 3000 * shares[kept] / shares[kept].sum()
    assert ((counts[kept] - expected) ** 2 / expected).sum() < 30.7


def test_rows_that_are_finished_are_not_looked_at(model):
    """Their filler would otherwise be refused again and again."""
    ends, goes_on = TOKENIZER.encode(" end")[0], TOKENIZER.encode(" on")[0]

    def process(ids, scores):
        wish = torch.full_like(scores, 0.0)
        wish[0, ends] = wish[1, goes_on] = 50.0
        return scores * 0.01 + wish

    word_filter = WordFilter(TOKENIZER, ["pad"])
    rows = model.generate(
        START.repeat(2, 1), logits_processor=[process], word_filter=word_filter, max_new_tokens=4,
        eos_token_id=ends, pad_token_id=TOKENIZER.encode("pad")[0],
    )  # fmt: skip
    assert TOKENIZER.decode(rows[0, 1:]) == " endpadpadpad" and not word_filter.refused


def test_a_filter_that_leaves_nothing_is_named(model):
    with pytest.raises(ValueError, match="leaves a row no token"):
        model.generate(
            START, word_filter=WordFilter(TOKENIZER, [], patterns=["."]),
            prefix_allowed_tokens_fn=lambda batch, ids: [64, 65],
        )  # fmt: skip


def test_the_default_list():
    pytest.importorskip("better_profanity")
    pattern = WordFilter(TOKENIZER).patterns[0]
    for innocent in ("Scunthorpe class assessment", "the shuttlecock passed", "a classic grape"):
        assert not pattern.search(innocent), innocent
    for crude in ("what the fuck", "F.U.C.K", "5h1t", "$hit!"):
        assert pattern.search(crude), crude


def test_without_the_package_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install fastlm\[safety\]"):
        WordFilter(TOKENIZER)


def test_the_command_line_reports_its_effect(model, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    command = ["generate", f"--model={tmp_path}", "--prompt=a", "--max-new-tokens=3", "--seed=0"]
    assert cli.main(command) == 0
    plain = capsys.readouterr()
    assert "word filter" not in plain.err
    word = TOKENIZER.decode(TOKENIZER.encode(plain.out)[1:2]).strip()
    (tmp_path / "words.txt").write_text(f"{word}\nzebra\n", encoding="utf-8")
    assert cli.main([*command, f"--block-words={tmp_path / 'words.txt'}"]) == 0
    filtered = capsys.readouterr()
    assert filtered.out != plain.out and f"1 kept out: {word.lower()} (1)" in filtered.err
