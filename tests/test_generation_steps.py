"""Decoding by replayed kernels: the same as running the model, and only where nobody looks on."""

import pytest
import torch

from fastlm import GPT2Config, GPT2LMHeadModel
from fastlm.generation import steps

OPTIONS = {"max_new_tokens": 7, "output_logits": True, "return_dict_in_generate": True}


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=99, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval()


class Counted(steps.Replay):
    runs = 0

    def run(self):
        Counted.runs += 1
        return super().run()


@pytest.fixture
def replays(monkeypatch):
    """How many steps were replayed."""
    Counted.runs = 0
    monkeypatch.setattr(steps, "Replay", Counted)
    return lambda: Counted.runs


CASES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "ragged": {"prompts": [[1, 2, 3], [4], [5, 6]]},
    "more rows than the kernel for few takes": {"num_return_sequences": 11, "do_sample": True},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_as_the_models_own_steps(model, replays, case, dtype, monkeypatch):
    model, options = model.to(dtype), dict(case)
    prompts = options.pop("prompts", torch.tensor([[1, 2, 3]]))
    found = model.generate(prompts, **OPTIONS, **options, seed=1)
    assert replays() > 0
    monkeypatch.setattr(steps, "_is_watched", lambda model: True)
    before = replays()
    wanted = model.generate(prompts, **OPTIONS, **options, seed=1)
    assert replays() == before
    for ours, plain in zip(found.sequences, wanted.sequences, strict=True):
        assert torch.equal(ours, plain)
    for ours, plain in zip(found.logits, wanted.logits, strict=True):
        assert torch.equal(ours, plain)


def test_hooks_see_every_step(model, replays):
    seen = []
    model.transformer.h[0].register_forward_hook(lambda *_: seen.append(1))
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=7, eos_token_id=None)
    assert len(seen) == 7 and replays() == 0


def test_a_forward_of_the_users_own_is_called(model, replays):
    calls, forward = [], model.forward
    model.forward = lambda *args, **options: calls.append(1) or forward(*args, **options)
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=7, eos_token_id=None)
    assert len(calls) == 6 and replays() == 0


def test_what_cannot_be_replayed_runs_as_it_is(model, replays):
    import fastlm

    with fastlm.use("torch"):
        found = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=7, eos_token_id=None)
    assert replays() == 0
    wanted = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=7, eos_token_id=None)
    assert torch.equal(found, wanted) and replays() > 0


def test_a_window_that_slides_and_a_cache_that_grows(model, replays):
    ids = torch.arange(30)[None] % 99
    found = model.generate(ids, max_new_tokens=9, context="slide", eos_token_id=None)
    assert found.shape == (1, 39)
    cache = model(ids[:, :3], use_cache=True).past_key_values
    cache.keys, cache.values = ([t[:, :4] for t in ts] for ts in (cache.keys, cache.values))
    options = {"max_new_tokens": 9, "eos_token_id": None}
    grown = model.generate(ids[:, :4], past_key_values=cache, **options)
    assert torch.equal(grown, model.generate(ids[:, :4], **options)) and replays() > 0
