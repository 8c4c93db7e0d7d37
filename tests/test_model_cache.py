"""The cache: steps and pieces against the whole, its formats, and what it refuses."""

import pytest
import torch
from accuracy import assert_as_accurate_as_torch
from gpt2_pair import left_mask, pair, prompts

from fastlm.generation import KVCache


def test_a_cache_comes_where_no_gradient_is_wanted():
    ours = pair()[0]
    assert ours(prompts()).past_key_values is None
    with torch.no_grad():
        assert ours(prompts()).past_key_values.get_seq_length() == 12
        assert ours(prompts(), labels=prompts()).past_key_values is None
        ours.config.use_cache = False
        assert ours(prompts()).past_key_values is None


@pytest.mark.parametrize("mask", [None, left_mask(12, 5, 1, 9)], ids=["whole", "padded"])
def test_a_step_at_a_time_in_pieces(mask):
    """Decoding by hand, as people write it: no position_ids, the mask growing along."""
    ours, truth = pair()[0], pair()[1].double()
    more = prompts(4, 9, seed=5)
    cache = None
    pieces = [prompts(), *more.split([1, 5, 1, 2], 1)]
    with torch.no_grad():
        for piece in pieces:
            if mask is not None and cache is not None:
                mask = torch.cat([mask, torch.ones_like(piece)], 1)
            output = ours(piece, attention_mask=mask, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
    for row, length in enumerate([12, 5, 1, 9]):
        start = 0 if mask is None else 12 - length
        alone = torch.cat([prompts(), more], 1)[row : row + 1, start:]
        ours_alone, expected = ours(alone).logits[:, -2:], truth(alone).logits[:, -2:]
        assert_as_accurate_as_torch(
            output.logits[row : row + 1], ours_alone, expected, f"row {row}"
        )


def test_ragged_pieces_on_a_filled_cache():
    """Several tokens at once behind rows of different length, some of them padding."""
    ours, truth = pair()[0], pair()[1].double()
    first, second = left_mask(12, 5, 1, 9), left_mask(3, 6, 1, 2, width=6)
    more = prompts(4, 6, seed=9)
    with torch.no_grad():
        cache = ours(prompts(), attention_mask=first).past_key_values
        output = ours(more, attention_mask=second, past_key_values=cache)
        for row in range(4):
            one, two = prompts()[row, first[row] == 1], more[row, second[row] == 1]
            alone = torch.cat([one, two])[None]
            got = output.logits[row : row + 1, second[row] == 1]
            expected = [model(alone).logits[:, -len(two) :] for model in (ours, truth)]
            assert_as_accurate_as_torch(got, *expected, f"row {row}")


def test_cache_formats():
    ours, theirs = pair()
    with torch.no_grad():
        cache = ours(prompts()).past_key_values
        legacy = cache.to_legacy_cache()
        their_cache = theirs(prompts(), use_cache=True).past_key_values
        for (k, v), layer in zip(legacy, their_cache.layers, strict=True):
            torch.testing.assert_close(k, layer.keys)
            torch.testing.assert_close(v, layer.values)
        expected = ours(prompts(4, 3), past_key_values=cache).logits
        assert ours(prompts(4, 3), past_key_values=legacy).logits.equal(expected)
    with pytest.raises(TypeError, match="past_key_values: got DynamicCache"):
        ours(prompts(), past_key_values=their_cache)


def test_caches_grow_crop_and_reorder():
    ours = pair()[0]
    with torch.no_grad():
        small, large = (KVCache.for_model(ours, 4, n) for n in (1, 48))
        for piece in prompts(4, 30).split([12, 1, 17], 1):
            logits = [ours(piece, past_key_values=cache).logits for cache in (small, large)]
            assert logits[0].equal(logits[1])
        assert small.capacity >= 30 and small.get_seq_length() == 30
        small.crop(12)
        ragged = ours(prompts(), attention_mask=left_mask(12, 5, 1, 9)).past_key_values
        ragged.reorder_cache(torch.tensor([2, 2, 0, 1]))
        assert ragged.lengths.tolist() == [1, 1, 12, 5]
        small.reorder_cache(torch.tensor([2, 2, 0, 1]))
        step = ours(prompts(4, 1), past_key_values=small).logits
        rows = prompts(4, 30)[[2, 2, 0, 1], :12]
        whole = ours(torch.cat([rows, prompts(4, 1)], 1)).logits[:, -1:]
    torch.testing.assert_close(step, whole)


def test_backward_through_a_cache_is_refused_and_its_first_tokens_are_not():
    ours = pair()[0]
    cache = KVCache.for_model(ours, 4, 48)
    first = ours(prompts(), past_key_values=cache)
    first.logits.sum().backward()
    second = ours(prompts(4, 2), past_key_values=cache)
    with pytest.raises(RuntimeError, match="backward through a filled cache"):
        second.logits.sum().backward()
