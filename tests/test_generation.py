"""Generation against transformers' with the same weights, ragged batches, bad input."""

import pytest
import torch
import transformers

from fastlm.generation import KVCache
from fastlm.generation.sampling import filter_logits
from fastlm.models import GPT2Config, GPT2LMHeadModel

SHAPE = {"vocab_size": 61, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4}
END = 7


@pytest.fixture(scope="module")
def models():
    """(ours, theirs), with weights large enough that the likeliest token changes at every step."""
    torch.manual_seed(0)
    settings = {**SHAPE, "bos_token_id": END, "eos_token_id": END}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    ours = GPT2LMHeadModel(GPT2Config(**settings))
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs


def prompts(batch=4, length=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SHAPE["vocab_size"], (batch, length), generator=generator)


def left_mask(*lengths, width=12):
    return torch.stack([(torch.arange(width) >= width - length).long() for length in lengths])


OPTIONS = {
    "plain": {"max_new_tokens": 30},
    "one": {"max_new_tokens": 1},
    "max_length": {"max_length": 25},
    "default": {},
    "min_new_tokens": {"max_new_tokens": 30, "min_new_tokens": 20},
    "two ends": {"max_new_tokens": 30, "eos_token_id": [END, 3]},
    "no end": {"max_new_tokens": 36, "eos_token_id": -1},
    "padding": {"max_new_tokens": 30, "attention_mask": left_mask(12, 5, 1, 9)},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_greedy_is_transformers(models, name, seed):
    ours, theirs = models
    options = {"pad_token_id": 0, **OPTIONS[name]}
    expected = theirs.generate(prompts(seed=seed), do_sample=False, **options)
    got = ours.generate(prompts(seed=seed), **options)
    assert got.tolist() == expected.tolist()


def test_the_greedy_cases_end_early_and_late(models):
    """Otherwise the stop rules above would be compared on rows that never stop."""
    rows = torch.cat([models[0].generate(prompts(seed=s), max_new_tokens=30) for s in range(3)])
    ended = (rows[:, 12:] == END).any(1)
    assert ended.any() and not ended.all()


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 0},
        {"top_k": 5},
        {"top_k": 0, "top_p": 0.7},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.9},
        {"top_k": 1000, "top_p": 1e-9},
    ],
    ids=str,
)
def test_same_draws_as_transformers_from_the_same_generator_state(models, options):
    ours, theirs = models
    common = {"do_sample": True, "max_new_tokens": 30, "pad_token_id": 0}
    options = {**common, "attention_mask": torch.ones_like(prompts()), **options}
    torch.manual_seed(5)
    expected = theirs.generate(prompts(), **options)
    torch.manual_seed(5)
    assert ours.generate(prompts(), **options).tolist() == expected.tolist()


def test_seed_repeats_and_leaves_torchs_generator_alone(models):
    ours, _ = models
    state = torch.get_rng_state()
    options = {"do_sample": True, "max_new_tokens": 20}
    first, again, other = (ours.generate(prompts(), seed=s, **options) for s in (1, 1, 2))
    assert first.equal(again) and not first.equal(other)
    assert torch.get_rng_state().equal(state)


def test_filter_logits():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()

    def left(**options):
        settings = {"temperature": 1.0, "top_k": None, "top_p": 1.0, **options}
        return filter_logits(logits, **settings).softmax(-1)[0]

    assert (left(top_k=2) > 0).tolist() == [True, True, False, False]
    # 0.5 alone is less than 0.6 of the probability, 0.5 + 0.3 is more.
    assert (left(top_p=0.6) > 0).tolist() == [True, True, False, False]
    assert (left(top_p=0.01) > 0).tolist() == [True, False, False, False]
    # temperature 1/2 squares the probabilities: 0.25 / (0.25 + 0.09 + 0.0225 + 0.0025).
    torch.testing.assert_close(left(temperature=0.5)[0], torch.tensor(0.25 / 0.365))


def test_draws_follow_the_probabilities(models):
    """Chi-squared with 4 degrees of freedom: a right sampler passes 34.4 once in 1.6 million."""
    ours, _ = models
    prompt = prompts(batch=1)
    options = {"do_sample": True, "max_new_tokens": 1, "top_k": 5, "seed": 3, "eos_token_id": -1}
    drawn = ours.generate(prompt, num_return_sequences=5000, **options)[:, -1]
    likely, tokens = ours(prompt).logits[0, -1].detach().topk(5)
    expected = 5000 * likely.softmax(-1)
    counts = torch.stack([(drawn == token).sum() for token in tokens])
    assert counts.sum() == 5000
    assert ((counts - expected) ** 2 / expected).sum() < 34.4


def test_num_return_sequences(models):
    ours, _ = models
    rows = ours.generate(
        prompts(batch=2), do_sample=True, num_return_sequences=3, max_new_tokens=9, seed=0
    )
    assert rows.shape[0] == 6
    assert rows[:, :12].equal(prompts(batch=2).repeat_interleave(3, 0))
    assert len({tuple(row) for row in rows.tolist()}) == 6


def test_every_sequence_continues_its_own_prompt(models):
    """With top_k=1 a draw is the likeliest token, so the copies are the greedy continuation."""
    ours, _ = models
    greedy = ours.generate(prompts(), max_new_tokens=9)
    drawn = ours.generate(
        prompts(), do_sample=True, top_k=1, num_return_sequences=2, max_new_tokens=9
    )
    assert drawn.equal(greedy.repeat_interleave(2, 0))


def test_min_new_tokens_holds_to_the_token(models):
    ours, _ = models
    rows = [ours.generate(row[None], max_new_tokens=30)[0, 12:] for row in prompts(8, seed=2)]
    row, made = next((i, int((r == END).int().argmax())) for i, r in enumerate(rows) if END in r)
    prompt = prompts(8, seed=2)[row : row + 1]
    stopped = ours.generate(prompt, max_new_tokens=30, min_new_tokens=made)
    assert stopped.shape[1] == 12 + made + 1
    longer = ours.generate(prompt, max_new_tokens=30, min_new_tokens=made + 1)
    assert longer[0, 12 : 12 + made].equal(stopped[0, 12:-1]) and longer[0, 12 + made] != END


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_batch_gives_each_prompt_what_it_gives_alone(models, side):
    ours, _ = models
    lengths = [12, 5, 1, 9]
    mask = left_mask(*lengths) if side == "left" else left_mask(*lengths).flip(1)
    together = ours.generate(prompts(), attention_mask=mask, max_new_tokens=20, eos_token_id=-1)
    for row, real in enumerate(mask.bool()):
        alone = ours.generate(prompts()[row : row + 1, real], max_new_tokens=20, eos_token_id=-1)
        assert together[row, 12:].tolist() == alone[0, -20:].tolist()


def test_padding_token_marks_padding(models):
    ours, _ = models
    ids = prompts()
    ids[1, :4] = 60
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    assert not (ids[mask.bool()] == 60).any(), "60 must occur as padding only"
    options = {"max_new_tokens": 15, "pad_token_id": 60}
    assert ours.generate(ids, **options).equal(ours.generate(ids, attention_mask=mask, **options))
    assert not ours.generate(ids, **options).equal(
        ours.generate(ids, attention_mask=mask * 0 + 1, **options)
    )


def test_finished_rows_are_padded(models):
    rows = models[0].generate(prompts(8, seed=2), max_new_tokens=30, pad_token_id=60)[:, 12:]
    for row in rows.tolist():
        if END in row:
            after = row[row.index(END) + 1 :]
            assert after == [60] * len(after)
    assert (rows == END).any()


def test_the_end_of_the_context_can_be_reached_but_not_passed(models):
    ours, _ = models
    assert ours.generate(prompts(), max_new_tokens=36, eos_token_id=-1).shape == (4, 48)
    with pytest.raises(ValueError, match=r"n_positions = 48.*12 and 37 new tokens"):
        ours.generate(prompts(), max_new_tokens=37)


def test_bfloat16_generates_from_its_own_logits(models):
    ours = GPT2LMHeadModel(models[0].config).to(torch.bfloat16).eval()
    rows = ours.generate(prompts(), max_new_tokens=8, eos_token_id=-1)
    with torch.no_grad():
        logits = ours(rows[:, :-1]).logits[:, 11:].float()
    chosen = logits.gather(2, rows[:, 12:, None]).squeeze(2)
    # Cached and whole passes round differently: within one bfloat16 step of the largest.
    assert (chosen >= logits.amax(2) - 2**-7 * logits.amax(2).abs()).all()


@pytest.mark.parametrize("end", [None, 50256])
def test_without_an_end_token_rows_run_to_the_limit(models, end):
    model = GPT2LMHeadModel(GPT2Config(**SHAPE, eos_token_id=end)).eval()
    options = {"min_new_tokens": 2, "max_new_tokens": 9}
    assert model.generate(prompts(), **options).shape == (4, 21)


def test_generate_leaves_the_model_as_it_was(models):
    model = GPT2LMHeadModel(models[0].config).train()
    first = model.generate(prompts(), max_new_tokens=8)
    assert model.training
    assert model.generate(prompts(), max_new_tokens=8).equal(first), "dropout was on"


def test_cache_rows_are_independent(models):
    ours, _ = models
    cache = KVCache.for_model(ours, 2, 20)
    with torch.no_grad():
        ours(prompts(2), past_key_values=cache)
        both = cache.select(torch.tensor([0, 0, 1, 1]))
        step = ours(torch.tensor([[1], [2], [1], [2]]), past_key_values=both).logits
        alone = ours(torch.tensor([[1], [2]]), past_key_values=cache).logits
    assert both.get_seq_length() == 13
    torch.testing.assert_close(step[0], alone[0])
    torch.testing.assert_close(step[3], alone[1])


class Recorder:
    def __init__(self):
        self.seen, self.ended = [], False

    def put(self, ids):
        self.seen.append(ids)

    def end(self):
        self.ended = True


def test_streamer_sees_prompt_then_every_token(models):
    recorder = Recorder()
    rows = models[0].generate(prompts(), max_new_tokens=10, streamer=recorder)
    assert recorder.ended
    assert recorder.seen[0].equal(prompts())
    assert torch.stack(recorder.seen[1:], 1).equal(rows[:, 12:])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_beam": 4}, r"\['num_beam'\].*top_k"),
        ({"temperature": 0.0}, "temperature: got 0.0.*do_sample=False"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
        ({"top_k": -1}, "top_k: got -1"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"max_length": 12}, "max_length: got 12 for a prompt of 12"),
        ({"num_return_sequences": 2}, "num_return_sequences: got 2.*do_sample=True"),
        ({"attention_mask": torch.ones(4, 11)}, r"attention_mask: got shape \(4, 11\)"),
        ({"attention_mask": left_mask(12, 0, 1, 1)}, "no real token"),
        ({"pad_token_id": 61}, "pad_token_id: got 61.*0 to 60"),
    ],
)
def test_bad_options_are_named(models, options, named):
    with pytest.raises(ValueError, match=named):
        models[0].generate(prompts(), **options)


@pytest.mark.parametrize(
    "ids", [torch.ones(3, 0).long(), torch.ones(0, 3).long(), torch.ones(3).long()], ids=str
)
def test_bad_prompts_are_named(models, ids):
    with pytest.raises(ValueError, match="input_ids: got shape"):
        models[0].generate(ids)
    with pytest.raises(IndexError, match=r"got 61.*0 to 60"):
        models[0].generate(torch.full((1, 3), 61))
