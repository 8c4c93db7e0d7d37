"""The same tokens as transformers give, from the same weights, in every way of choosing them."""

import pytest
import torch
from gpt2_pair import DEEPER, END, left_mask, pair, prompts
from transformers import (
    GenerationConfig as TheirConfig,
)
from transformers import (
    LogitsProcessorList,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
)

from fastlm.generation import GenerationConfig

MASK = left_mask(12, 5, 1, 9)
BIAS = {(3,): 2.0, (5, 9): -torch.inf, (11, 12): 4.0}

GREEDY = {
    "repetition_penalty": {"repetition_penalty": 1.7},
    "repetition_reward": {"repetition_penalty": 0.6},
    "no_repeat_ngram_size 1": {"no_repeat_ngram_size": 1, "max_new_tokens": 20},
    "no_repeat_ngram_size 2": {"no_repeat_ngram_size": 2, "eos_token_id": -1},
    "bad_words_ids": {"bad_words_ids": [[3], [5, 9], [END], [1, 2, 3]]},
    "suppress_tokens": {"suppress_tokens": [0, 1, 2, 3, 40, END]},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(40))},
    "sequence_bias": {"sequence_bias": BIAS},
    "sequence_bias as a list": {"sequence_bias": [[[3], 2.0], [[11, 12], 4.0]]},
    "min_length": {"min_length": 30},
    "min_new_tokens and ends": {"min_new_tokens": 9, "eos_token_id": [END, 3, 5, 11, 20]},
    "forced_eos": {"forced_eos_token_id": 9, "max_length": 20, "max_new_tokens": None},
    "forced_bos": {"forced_bos_token_id": 5, "input_ids": prompts(length=1)},
    "remove_invalid_values": {"remove_invalid_values": True},
    "renormalize": {"renormalize_logits": True, "repetition_penalty": 1.3},
    "prefix_allowed": {"prefix_allowed_tokens_fn": lambda b, ids: range(b, 61, 1 + len(ids) % 3)},
    "custom processor": {"logits_processor": LogitsProcessorList([lambda ids, s: s.roll(1, -1)])},
    "their processor": {"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.5)])},
    "custom criterion": {
        "stopping_criteria": StoppingCriteriaList([lambda ids, s, **k: (ids[:, -1] % 5) == 2])
    },
    "all together": {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[3, 4]],
        "min_new_tokens": 5,
        "suppress_tokens": [8],
    },
    "no cache": {"use_cache": False, "max_new_tokens": 10},
    "padded": {"attention_mask": MASK},
    "padded, bad words": {"attention_mask": MASK, "bad_words_ids": [[3], [5, 9]]},
    "one row": {"input_ids": prompts(batch=1)},
    "from the beginning": {"input_ids": None, "max_new_tokens": 40},
    "to the last position": {"max_new_tokens": 36, "eos_token_id": -1},
}
BEAMS = {
    "2": {"num_beams": 2},
    "5": {"num_beams": 5},
    "all returned": {"num_beams": 4, "num_return_sequences": 4},
    "early": {"num_beams": 3, "early_stopping": True, "num_return_sequences": 2},
    "never early": {"num_beams": 3, "early_stopping": "never"},
    "long": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": "never"},
    "short": {"num_beams": 4, "length_penalty": -1.0},
    "no penalty": {"num_beams": 3, "length_penalty": 0.0},
    "two ends": {"num_beams": 3, "eos_token_id": [END, 3, 20]},
    "no end": {"num_beams": 3, "eos_token_id": None, "max_new_tokens": 12},
    "padded": {"num_beams": 3, "attention_mask": MASK},
    "ngrams": {"num_beams": 3, "no_repeat_ngram_size": 2, "repetition_penalty": 1.4},
    "bad words": {"num_beams": 3, "bad_words_ids": [[3], [5, 9]], "min_new_tokens": 6},
    "prefix": {"num_beams": 3, "prefix_allowed_tokens_fn": lambda b, ids: range(b, 61, 2)},
    "forced end": {"num_beams": 3, "forced_eos_token_id": 9, "max_new_tokens": 7},
    "no cache": {"num_beams": 2, "use_cache": False, "max_new_tokens": 8},
    "one row": {"num_beams": 6, "num_return_sequences": 3, "input_ids": prompts(batch=1)},
}


@pytest.fixture(scope="module")
def models():
    return pair()


def both(models, options):
    """What ours and theirs give, as lists."""
    settings = {"max_new_tokens": 25, "pad_token_id": 60, **options}
    if "input_ids" not in settings:
        settings["input_ids"] = prompts()
    if settings["input_ids"] is not None and "attention_mask" not in settings:
        settings["attention_mask"] = torch.ones_like(settings["input_ids"])
    ids = settings.pop("input_ids")
    ours, theirs = (model.generate(ids, **settings) for model in models)
    return ours.tolist(), theirs.tolist()


@pytest.mark.parametrize("name", GREEDY)
def test_greedy(models, name):
    ours, theirs = both(models, {"do_sample": False, **GREEDY[name]})
    assert ours == theirs


@pytest.mark.parametrize("name", BEAMS)
def test_beams(models, name):
    ours, theirs = both(models, BEAMS[name])
    assert ours == theirs


@pytest.mark.parametrize("beams", [1, 3])
def test_another_size(beams):
    models = pair(DEEPER, seed=3, scale=0.25, activation_function="gelu", n_inner=80)
    for seed in range(3):
        ids = prompts(3, 17, seed, vocab=DEEPER["vocab_size"])
        ours, theirs = both(models, {"input_ids": ids, "num_beams": beams, "max_new_tokens": 47})
        assert ours == theirs


def test_early_stopping_where_it_matters():
    """Many ends, so that all places are taken early, and a penalty by which longer is better."""
    models = pair(scale=0.15)
    settings = {"num_beams": 2, "length_penalty": 2.0, "eos_token_id": list(range(0, 60, 2))}
    results = {}
    for early in (False, "never", True):
        ours, theirs = both(models, {**settings, "early_stopping": early})
        assert ours == theirs, early
        results[early] = str(ours)
    assert len(set(results.values())) > 1


def test_a_config_in_place_of_arguments(models):
    settings = {"max_new_tokens": 9, "num_beams": 3, "pad_token_id": 60, "repetition_penalty": 1.5}
    mask = {"attention_mask": torch.ones_like(prompts())}
    ours = models[0].generate(prompts(), GenerationConfig(**settings), **mask)
    config = TheirConfig(**settings)
    theirs = models[1].generate(prompts(), generation_config=config, **mask)
    assert ours.tolist() == theirs.tolist()
    assert models[0].generate(prompts(), generation_config=config, **mask).tolist() == ours.tolist()


SAMPLED = [
    {"top_k": 0, "min_p": 0.2},
    {"top_k": 0, "typical_p": 0.6},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.9, "temperature": 1.4},
    {"top_k": 0, "temperature": 0.7, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"num_beams": 3, "top_k": 0},
    {"num_beams": 3, "top_k": 2, "top_p": 0.5, "min_p": 0.3, "typical_p": 0.5},
    {"num_return_sequences": 3, "top_k": 10},
]


@pytest.fixture(scope="module")
def wide_models():
    """In float64: rounding, which depends on the processor, must not decide a draw of many."""
    return [model.double() for model in pair()]


@pytest.mark.parametrize("options", SAMPLED, ids=str)
def test_same_draws_from_the_same_generator_state(wide_models, options):
    settings = {"do_sample": True, "max_new_tokens": 20, "pad_token_id": 60, **options}
    settings["attention_mask"] = torch.ones_like(prompts())
    rows = []
    for model in wide_models:
        torch.manual_seed(5)
        rows.append(model.generate(prompts(), **settings).tolist())
    assert rows[0] == rows[1]


DETAILS = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


@pytest.mark.parametrize(
    "options",
    [{}, {"repetition_penalty": 1.5, "min_new_tokens": 4}, {"num_beams": 3}],
    ids=["greedy", "processed", "beams"],
)
def test_scores_logits_and_beams(models, options):
    settings = {"max_new_tokens": 8, "pad_token_id": 60, **DETAILS, **options}
    settings["attention_mask"] = torch.ones_like(prompts())
    ours, theirs = (model.generate(prompts(), **settings) for model in models)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    for name in ("scores", "logits"):
        pairs = list(zip(getattr(ours, name), getattr(theirs, name), strict=True))
        assert pairs
        for one, other in pairs:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    if "num_beams" in options:
        torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores)
        assert ours.beam_indices.tolist() == theirs.beam_indices.tolist()


def test_hidden_states_and_attentions_of_every_step():
    ours, theirs = pair()
    theirs.set_attn_implementation("eager")
    settings = {"max_new_tokens": 5, "return_dict_in_generate": True, "pad_token_id": 60}
    settings |= {"output_hidden_states": True, "output_attentions": True, "min_new_tokens": 5}
    ones = torch.ones_like(prompts())
    one, other = (
        model.generate(prompts(), attention_mask=ones, **settings) for model in (ours, theirs)
    )
    for name in ("hidden_states", "attentions"):
        for step, expected in zip(getattr(one, name), getattr(other, name), strict=True):
            for tensor, their_tensor in zip(step, expected, strict=True):
                torch.testing.assert_close(tensor, their_tensor, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 3.0}, {"top_p": 0.8}, {"min_p": 0.2}, {"typical_p": 0.7}],
    ids=str,
)
def test_draws_are_distributed_as_transformers_says(models, options):
    """Chi-squared of at most 4 degrees of freedom: a right sampler passes 34.4 once in 1.6 million.

    The expected shares are softmax of transformers' scores after its own processors.
    """
    options = {"do_sample": True, "max_new_tokens": 1, "top_k": 5, "temperature": 5.0, **options}
    prompt, ones = prompts(batch=1, seed=6), torch.ones(1, 12)
    details = {"return_dict_in_generate": True, "output_scores": True, "pad_token_id": 60}
    scores = models[1].generate(prompt, attention_mask=ones, **details, **options).scores[0]
    expected = 4000 * scores.softmax(-1)[0]
    drawn = models[0].generate(prompt, num_return_sequences=4000, seed=2, **options)[:, -1]
    counts = torch.bincount(drawn, minlength=61)
    possible = expected > 0
    assert possible.sum() > 1 and counts[~possible].sum() == 0
    assert ((counts - expected)[possible] ** 2 / expected[possible]).sum() < 34.4
