"""What generate does beyond transformers: ragged lists, drafts, seeds, sliding, stop rules."""

import time

import pytest
import torch
from gpt2_pair import END, pair, prompts

from fastlm.generation import KVCache
from fastlm.models import GPT2Config, GPT2LMHeadModel
from fastlm.tokenizer import GPT2Tokenizer


@pytest.fixture(scope="module")
def models():
    return pair()


@pytest.fixture(scope="module")
def ours(models):
    return models[0]


def ragged(seed, most=5, longest=15):
    """Two to `most` prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(2, most + 1, (), generator=generator))
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(61, (n,), generator=generator) for n in lengths]


WAYS = [
    {"max_new_tokens": 12},
    {"max_length": 25},
    {"max_new_tokens": 10, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    {"max_new_tokens": 10, "min_length": 12, "bad_words_ids": [[3], [5, 9]]},
    {"max_new_tokens": 8, "num_beams": 3, "length_penalty": 1.5},
    {"max_length": 19, "num_beams": 2, "length_penalty": 9.0},
]


@pytest.mark.parametrize("seed", range(100))
def test_ragged_prompts_give_what_each_gives_alone(ours, seed):
    batch, options = ragged(seed), WAYS[seed % len(WAYS)]
    together = ours.generate(batch, **options)
    alone = [ours.generate([prompt], **options)[0] for prompt in batch]
    assert [row.tolist() for row in together] == [row.tolist() for row in alone]


@pytest.mark.parametrize("seed", range(5))
def test_ragged_draws_with_a_seed_per_row(ours, seed):
    batch = ragged(seed)
    options = {"do_sample": True, "top_k": 20, "max_new_tokens": 15}
    seeds = [10 * seed + row for row in range(len(batch))]
    together = ours.generate(batch, seed=seeds, **options)
    alone = [ours.generate([p], seed=[s], **options)[0] for p, s in zip(batch, seeds, strict=True)]
    assert [row.tolist() for row in together] == [row.tolist() for row in alone]
    assert len({tuple(row[-5:].tolist()) for row in together}) > 1


def test_a_list_has_no_padding_and_a_row_ends_with_its_end(ours):
    rows = ours.generate(ragged(0, longest=9), max_new_tokens=30)
    assert len({len(row) for row in rows}) > 1
    for row, prompt in zip(rows, ragged(0, longest=9), strict=True):
        assert row[: len(prompt)].equal(prompt)
        made = row[len(prompt) :].tolist()
        assert END not in made[:-1] and (len(made) == 30 or made[-1] == END)


def test_no_padding_is_computed(ours, monkeypatch):
    rows_read = []
    mlp = ours.transformer.h[0].mlp
    handle = mlp.register_forward_pre_hook(
        lambda _, x: rows_read.append(x[0].flatten(0, -2).shape[0])
    )
    batch = [torch.tensor([1] * n) for n in (1, 4, 12)]
    ours.generate(batch, max_new_tokens=2, eos_token_id=-1)
    handle.remove()
    assert rows_read == [17, 3]


def test_generators_and_seeds(ours):
    options = {"do_sample": True, "max_new_tokens": 12, "num_return_sequences": 2}
    seeded = ours.generate(prompts(2), seed=[1, 2, 3, 4], **options)
    generators = [torch.Generator().manual_seed(s) for s in (1, 2, 3, 4)]
    assert ours.generate(prompts(2), generator=generators, **options).equal(seeded)
    one = ours.generate(prompts(2), seed=3, **options)
    assert ours.generate(prompts(2), generator=torch.Generator().manual_seed(3), **options).equal(
        one
    )
    with pytest.raises(ValueError, match="got 3, accepted is one, or one for each of the 4 rows"):
        ours.generate(prompts(2), seed=[1, 2, 3], **options)
    with pytest.raises(ValueError, match="both seed and generator"):
        ours.generate(prompts(2), seed=1, generator=generators, **options)


DRAFTS = [
    {"max_new_tokens": 30, "eos_token_id": -1},
    {"max_new_tokens": 30},
    {"max_new_tokens": 36, "repetition_penalty": 1.2, "eos_token_id": -1},
    {"max_new_tokens": 30, "do_sample": True, "top_k": 3, "seed": 4, "eos_token_id": -1},
]


def repetitive(length=12):
    return prompts(1, 3).repeat(1, length // 3)


@pytest.mark.parametrize("options", DRAFTS, ids=str)
@pytest.mark.parametrize("prompt", [prompts(1), repetitive()], ids=["random", "repetitive"])
def test_drafts_change_nothing_but_the_passes(ours, options, prompt):
    assistant = GPT2LMHeadModel(ours.config)
    assistant.load_state_dict(ours.state_dict())
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    plain = ours.generate(prompt, **options)
    ways = (
        {"prompt_lookup_num_tokens": 4},
        {"assistant_model": assistant},
        {"assistant_model": ours},
    )
    for way in ways:
        assert ours.generate(prompt, **options, **way).equal(plain), way


def test_a_perfect_assistant_saves_passes(ours):
    passes = []
    twin = GPT2LMHeadModel(ours.config).eval()
    twin.load_state_dict(ours.state_dict())
    handle = ours.transformer.register_forward_hook(lambda *_: passes.append(1))
    options = {"max_new_tokens": 30, "eos_token_id": -1}
    ours.generate(prompts(1), assistant_model=twin, num_assistant_tokens=5, **options)
    handle.remove()
    # The prompt gives one token, then each pass five drafts and one more.
    assert len(passes) == 1 + 5


def test_prompt_lookup_saves_passes(ours):
    """Where the text repeats itself: a model whose next token is always the one three before."""
    passes = []
    handle = ours.transformer.register_forward_hook(lambda *_: passes.append(1))
    cycle = repetitive()
    processor = [lambda ids, scores: torch.zeros_like(scores).scatter_(1, ids[:, -3:-2], 9.0)]
    options = {"max_new_tokens": 30, "eos_token_id": -1, "logits_processor": processor}
    rows = ours.generate(cycle, prompt_lookup_num_tokens=4, **options)
    handle.remove()
    assert rows.equal(repetitive(42))
    assert len(passes) == 1 + 6  # of four drafts and one more each, the last cut short


@pytest.mark.parametrize("way", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": 1}])
def test_drafts_are_for_one_row(ours, way):
    way = {name: ours if name == "assistant_model" else value for name, value in way.items()}
    with pytest.raises(ValueError, match="got 4 rows, accepted is one"):
        ours.generate(prompts(), **way)


def slide_by_hand(model, ids, new_tokens):
    """The rule said in the docs, without a cache: a full window loses its older half."""
    start, limit = 0, model.config.n_positions
    ids = ids.clone()
    for _ in range(new_tokens):
        if ids.shape[1] - start > limit:
            start = ids.shape[1] - limit // 2
        with torch.no_grad():
            logits = model(ids[:, start:]).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1)[:, None]], 1)
    return ids


@pytest.mark.parametrize("length", [5, 48, 70])
@pytest.mark.parametrize("use_cache", [True, False])
def test_slide_goes_on_past_the_last_position(ours, length, use_cache):
    ids = prompts(1, length)
    options = {"max_new_tokens": 80, "context": "slide", "eos_token_id": -1}
    got = ours.generate(ids, use_cache=use_cache, **options)
    assert got.equal(slide_by_hand(ours, ids, 80))


def test_rows_slide_each_in_its_own_time(ours):
    batch = ragged(3, longest=60)
    options = {"max_new_tokens": 60, "context": "slide", "eos_token_id": -1}
    together = ours.generate(batch, **options)
    for row, prompt in zip(together, batch, strict=True):
        assert row[None].equal(slide_by_hand(ours, prompt[None], 60))


def test_slide_with_drafts(ours):
    options = {"max_new_tokens": 80, "context": "slide", "eos_token_id": -1}
    drafted = ours.generate(repetitive(), prompt_lookup_num_tokens=4, **options)
    assert drafted.equal(ours.generate(repetitive(), **options))


def test_a_cache_of_the_first_tokens_is_taken_up(ours):
    ids = prompts(1, 12)
    plain = ours.generate(ids, max_new_tokens=20)
    cache = KVCache.for_model(ours, 1, 48)
    with torch.no_grad():
        ours(ids[:, :7], past_key_values=cache)
    assert ours.generate(ids, past_key_values=cache, max_new_tokens=20).equal(plain)
    output = ours.generate(ids, max_new_tokens=5, return_dict_in_generate=True, eos_token_id=-1)
    more = ours.generate(
        output.sequences, past_key_values=output.past_key_values, max_new_tokens=15
    )
    assert more.equal(plain) or END in plain[0]
    full = KVCache.for_model(ours, 1, 48)
    with torch.no_grad():
        ours(ids, past_key_values=full)
    with pytest.raises(ValueError, match=r"past_key_values.*at least one token more"):
        ours.generate(ids, past_key_values=full)


@pytest.fixture(scope="module")
def text_model():
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 128}
    return GPT2LMHeadModel(GPT2Config(**shape)).eval(), GPT2Tokenizer()


def test_an_encoding_padded_on_the_left_gives_what_the_list_gives(text_model):
    """As people write it: the end of text for padding, and the encoding for arguments."""
    model, tokenizer = text_model
    tokenizer = GPT2Tokenizer(pad_token=tokenizer.eos_token, padding_side="left")
    texts = ["The quick brown fox", "Hello", "It was the best of times, it was"]
    encoding = tokenizer(texts, return_tensors="pt", padding=True)
    rows = model.generate(**encoding, max_new_tokens=8, eos_token_id=-1)
    listed = model.generate(tokenizer(texts)["input_ids"], max_new_tokens=8, eos_token_id=-1)
    for row, alone, mask in zip(rows, listed, encoding["attention_mask"], strict=True):
        assert row[(mask == 0).sum() :].equal(alone)


def spelling(tokenizer, text):
    """A processor that makes the model say `text`, after a prompt of one token."""
    ids = tokenizer.encode(text)

    def process(input_ids, scores):
        forced = torch.zeros_like(scores)
        forced[:, ids[min(input_ids.shape[1] - 1, len(ids) - 1)]] = 1e9
        return forced

    return [process]


@pytest.mark.parametrize("strings", ["fox jum", ["nothing", "ox ju"], [" jumps", "zzz"]], ids=str)
def test_stop_strings_over_token_boundaries(text_model, strings):
    model, tokenizer = text_model
    story = spelling(tokenizer, "The quick brown fox jumps over the lazy dog")
    start = torch.tensor([[50256]])
    options = {"logits_processor": story, "max_new_tokens": 9}
    ids = model.generate(start, stop_strings=strings, tokenizer=tokenizer, **options)
    assert tokenizer.decode(ids[0, 1:]) == "The quick brown fox jumps"
    # What the prompt says already does not count.
    prompt = tokenizer.encode("The quick", return_tensors="pt")
    ids = model.generate(prompt, stop_strings="quick", tokenizer=tokenizer, max_new_tokens=4)
    assert ids.shape[1] == 6
    ids = model.generate(start, stop_strings="quickly", tokenizer=tokenizer, **options)
    assert tokenizer.decode(ids[0, 1:]).endswith("lazy dog")
    with pytest.raises(ValueError, match="stop_strings: got no tokenizer"):
        model.generate(start, stop_strings="x")


def test_max_time(ours):
    slow = [lambda ids, scores: time.sleep(0.02) or scores]
    rows = ours.generate(
        prompts(1), max_time=0.1, max_new_tokens=36, logits_processor=slow, eos_token_id=-1
    )
    assert 12 < rows.shape[1] < 30


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"context": "forget"}, "context: got 'forget'"),
        ({"cache_implementation": "quantized"}, "cache_implementation: got 'quantized'"),
        ({"num_beams": 0}, "num_beams: got 0"),
        ({"num_beams": 2, "num_return_sequences": 3, "do_sample": True}, "num_return_sequences"),
        ({"early_stopping": "often"}, "early_stopping: got 'often'"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: got 0.0"),
        ({"typical_p": 0.0, "do_sample": True}, "typical_p: got 0.0"),
        ({"num_beams": 2, "prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({"num_beams": 2, "streamer": object()}, "streamer: got one with num_beams"),
        ({"bad_words_ids": [[]]}, "bad_words_ids"),
        ({"bad_words_ids": [[99]]}, "got token 99, accepted are 0 to 60"),
        ({"synced_gpus": True}, "synced_gpus"),
        ({"prefix_allowed_tokens_fn": lambda b, ids: []}, "got no token for row 0"),
        ({"max_length": 12}, "max_length: got 12"),
    ],
)
def test_impossible_options_are_named(ours, options, named):
    with pytest.raises(ValueError, match=named):
        ours.generate(prompts(), **options)


@pytest.mark.parametrize("batch", [[], [torch.ones(2, 2)], [[1], []]], ids=str)
def test_impossible_lists_are_named(ours, batch):
    with pytest.raises(ValueError, match="inputs: got"):
        ours.generate(batch)
