"""torch.compile of the model: one graph to train, and one for every token to decode."""

import pytest
import torch
from gpt2_pair import SHAPE, left_mask, pair, prompts
from torch._dynamo.utils import counters

from fastlm.generation import KVCache
from fastlm.models import GPT2Config, GPT2LMHeadModel


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def compiled(model):
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("mask", [None, left_mask(12, 5, 1, 9)], ids=["whole", "padded"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_training_is_one_graph(mask, checkpointing):
    ours = pair(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)[0].train()
    if checkpointing:
        ours.gradient_checkpointing_enable()
    labels = prompts() if mask is None else prompts().masked_fill(mask == 0, -100)
    inputs = {"attention_mask": mask, "labels": labels}
    expected = ours(prompts(), **inputs).loss
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    fast = compiled(ours)
    for _ in range(2):
        loss = fast(prompts(), **inputs).loss
    assert graphs() == 1
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], msg=name)


def test_logits_after_a_compiled_loss():
    ours = pair()[0]
    output = compiled(ours)(prompts(), labels=prompts())
    torch.testing.assert_close(output.logits, ours(prompts()).logits)


def test_dropout_trains_in_one_graph():
    model = GPT2LMHeadModel(GPT2Config(**SHAPE)).train()
    fast = compiled(model)
    losses = [fast(prompts(), labels=prompts()).loss.item() for _ in range(3)]
    assert graphs() == 1 and len(set(losses)) == 3, "dropout draws anew"


@pytest.mark.parametrize("rows", [1, 4])
def test_decoding_does_not_compile_again_for_every_token(rows):
    ours = pair()[0]
    expected = ours.generate(prompts(rows), max_new_tokens=30, eos_token_id=-1)
    fast = compiled(ours)
    cache, ids = KVCache.for_model(ours, rows, 48), prompts(rows)
    seen = []
    with torch.no_grad():
        logits = ours(ids, past_key_values=cache).logits
        for _ in range(30):
            ids = torch.cat([ids, logits[:, -1].argmax(-1)[:, None]], 1)
            logits = fast(ids[:, -1:], past_key_values=cache).logits
            seen.append(graphs())
    assert ids.equal(expected)
    # The count of cached tokens is a number that torch takes for a constant once, and then no more.
    assert seen[0] == 1 and seen[-1] == seen[2] <= 2


def test_generate_with_a_compiled_forward():
    ours = pair()[0]
    expected = ours.generate(prompts(), max_new_tokens=20, eos_token_id=-1)
    ours.forward = compiled(ours.forward)
    assert ours.generate(prompts(), max_new_tokens=20, eos_token_id=-1).equal(expected)
    assert graphs() <= 2
