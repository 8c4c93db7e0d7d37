"""What code written for transformers' GPT-2 expects of ours: fields, caches, embeddings, memory."""

import pytest
import torch
from accuracy import assert_as_accurate_as_torch
from gpt2_pair import SHAPE, left_mask, pair, prompts
from torch import nn

import fastlm
from fastlm.generation import KVCache
from fastlm.models import GPT2Config, GPT2LMHeadModel


def three(**settings):
    """(ours, theirs, truth in float64), theirs with the eager attention that shows its weights."""
    ours, theirs = pair(**settings)
    theirs.set_attn_implementation("eager")
    truth = pair(**settings)[1].double()
    truth.set_attn_implementation("eager")
    return ours, theirs, truth


@pytest.mark.parametrize("field", ["hidden_states", "attentions"])
def test_hidden_states_and_attentions(field):
    shown = {f"output_{field}": True}
    outputs = [getattr(model(prompts(), **shown), field) for model in three()]
    assert len(outputs[0]) == len(outputs[1]) == SHAPE["n_layer"] + (field == "hidden_states")
    for layer, tensors in enumerate(zip(*outputs, strict=True)):
        assert_as_accurate_as_torch(*tensors, f"{field} of layer {layer}")


def test_attentions_with_a_cache_and_with_padding():
    ours, theirs, truth = three()
    whole = [model(prompts(), output_attentions=True).attentions for model in (ours, theirs, truth)]
    with torch.no_grad():
        first = ours(prompts()[:, :7])
        second = ours(
            prompts()[:, 7:], past_key_values=first.past_key_values, output_attentions=True
        )
    for layer, rest in enumerate(second.attentions):
        expected = [attentions[layer][:, :, 7:] for attentions in whole[1:]]
        assert_as_accurate_as_torch(rest, *expected, f"cached, layer {layer}")
    mask = left_mask(12, 5, 1, 9)
    padded = ours(prompts(), attention_mask=mask, output_attentions=True).attentions
    for row, length in enumerate([12, 5, 1, 9]):
        real = slice(12 - length, 12)
        alone = ours(prompts()[row : row + 1, real], output_attentions=True).attentions
        for one, other in zip(padded, alone, strict=True):
            torch.testing.assert_close(one[row, :, real, real], other[0])
    # The weights of real queries are those of real keys, and sum to one.
    assert (padded[0][1, :, 7:, :7] == 0).all()


def test_gradients_flow_through_what_is_shown():
    ours, theirs, truth = three(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    grads = []
    for model in (ours, theirs, truth):
        output = model(prompts(), output_hidden_states=True, output_attentions=True)
        sum(t.square().sum() for t in (*output.hidden_states, *output.attentions)).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name in grads[0]:
        assert_as_accurate_as_torch(*(g[name] for g in grads), name)


def test_output_order_and_what_is_left_out():
    ours = pair()[0]
    with torch.no_grad():
        output = ours(prompts(), output_hidden_states=True)
        assert output.keys() == ["logits", "past_key_values", "hidden_states"]
        assert "loss" not in output and len(output) == 3
        assert output[1] is output.past_key_values is output["past_key_values"]
        assert ours(prompts(), use_cache=False).keys() == ["logits"]
    ours.config.output_attentions = True
    assert ours(prompts()).keys() == ["logits", "attentions"]


def test_logits_are_not_held_in_training(monkeypatch):
    ours = GPT2LMHeadModel(GPT2Config(**SHAPE)).train()
    applied = []
    ours.lm_head.register_forward_hook(lambda *_: applied.append(1))
    output = ours(prompts(), labels=prompts())
    output.loss.backward()
    assert output[0] is output.loss and output.keys()[:2] == ["loss", "logits"] and not applied
    assert output.logits.shape == (4, 12, 61) and output.logits is output[1]
    assert len(applied) == 1


def test_deferred_logits_are_those_of_their_forward():
    ours = pair()[0]
    with torch.autocast("cpu", torch.bfloat16):
        output = ours(prompts(), labels=prompts())
        now = ours(prompts()).logits
    assert output.logits.dtype == now.dtype and output.logits.equal(now)
    with torch.no_grad():
        output = ours(prompts(), labels=prompts())
    assert not output.logits.requires_grad
    output = ours(prompts(), labels=prompts(), logits_to_keep=3)
    assert output.logits.shape[1] == 3
    output = ours(prompts(), labels=prompts())
    with torch.no_grad():
        ours.lm_head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="weights have changed"):
        _ = output.logits


def test_a_head_of_another_kind_is_applied():
    ours = pair()[0]
    expected = ours(prompts(), labels=prompts()).loss
    linear = ours.lm_head
    ours.lm_head = nn.Sequential(linear, nn.Hardtanh(-0.1, 0.1))
    output = ours(prompts(), labels=prompts())
    assert output.logits.abs().max() <= 0.1 and not torch.allclose(output.loss, expected)


def test_padding_predicts_nothing():
    """A padded batch's loss is that of its rows alone, whatever stands at the padding."""
    ours = pair()[0]
    mask = left_mask(12, 5, 2, 9)
    together = ours(prompts(), attention_mask=mask, labels=prompts(), num_items_in_batch=1).loss
    alone = [
        ours(ids[None], labels=ids[None], num_items_in_batch=1).loss
        for ids in (prompts()[row, mask[row] == 1] for row in range(4))
    ]
    torch.testing.assert_close(together, torch.stack(alone).sum())


def test_positions_to_keep_as_indices():
    ours = pair()[0]
    index = torch.tensor([0, 5, 11])
    assert ours(prompts(), logits_to_keep=index).logits.equal(ours(prompts()).logits[:, index])


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradient_checkpointing_gives_the_same_gradients(p):
    model = pair(resid_pdrop=p, embd_pdrop=p, attn_pdrop=p)[0].train()
    grads = []
    for checkpointing in (False, True):
        (
            model.gradient_checkpointing_enable
            if checkpointing
            else model.gradient_checkpointing_disable
        )()
        assert model.is_gradient_checkpointing is checkpointing
        model.zero_grad()
        torch.manual_seed(3)
        model(prompts(), labels=prompts()).loss.backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(one.equal(other) for one, other in zip(*grads, strict=True))


def test_gradient_checkpointing_computes_layers_again():
    model = pair()[0].train()
    model.gradient_checkpointing_enable()
    calls = []
    model.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model(prompts(), labels=prompts()).loss.backward()
    assert len(calls) == 2
    assert model(prompts(), use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="past_key_values: got one with gradient checkpointing"):
        model(prompts(), past_key_values=KVCache.for_model(model, 4, 48))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [70, 40])
def test_resizing_the_vocabulary(tied, rows):
    ours, theirs = pair(tie_word_embeddings=tied)
    kept = min(rows, 61)
    before = [ours.transformer.wte.weight[:kept].clone(), ours.lm_head.weight[:kept].clone()]
    assert ours.resize_token_embeddings(rows) is ours.get_input_embeddings()
    theirs.resize_token_embeddings(rows)
    assert ours.config.vocab_size == ours.transformer.wte.num_embeddings == rows
    assert ours.transformer.wte.weight.shape == theirs.transformer.wte.weight.shape
    assert ours.transformer.wte.weight[:kept].equal(before[0])
    assert ours.lm_head.weight[:kept].equal(before[1]) and ours.lm_head.out_features == rows
    assert (ours.lm_head.weight is ours.transformer.wte.weight) == tied
    ids = prompts() % kept
    ours(ids, labels=ids).loss.backward()
    assert ours.transformer.wte.weight.grad.shape[0] == rows
    torch.testing.assert_close(ours(ids).logits[..., :kept], theirs(ids).logits[..., :kept])


def test_resizing_to_a_multiple_and_new_rows():
    ours = pair()[0]
    mean = ours.transformer.wte.weight.mean(0)
    ours.resize_token_embeddings(62, pad_to_multiple_of=8)
    assert ours.config.vocab_size == 64
    torch.testing.assert_close(ours.transformer.wte.weight[61:], mean.expand(3, -1))
    ours.resize_token_embeddings(80, mean_resizing=False)
    assert ours.transformer.wte.weight[64:].std() > 0
    assert ours.resize_token_embeddings().num_embeddings == 80


def test_embeddings_and_counts_like_transformers():
    ours, theirs = pair()
    assert ours.num_parameters() == theirs.num_parameters()
    assert ours.num_parameters(exclude_embeddings=True) == theirs.num_parameters(
        exclude_embeddings=True
    )
    ours.transformer.h.requires_grad_(False)
    theirs.transformer.h.requires_grad_(False)
    assert ours.num_parameters(only_trainable=True) == theirs.num_parameters(only_trainable=True)
    assert ours.get_output_embeddings() is ours.lm_head
    ours.set_input_embeddings(nn.Embedding(61, 32))
    assert ours.transformer.get_input_embeddings() is ours.transformer.wte
    assert ours.lm_head.weight is not ours.transformer.wte.weight
    ours.tie_weights()
    assert ours.lm_head.weight is ours.transformer.wte.weight
    assert ours.device == torch.device("cpu") and ours.half().dtype == torch.float16


def test_float16_runs_on_the_reference():
    ours = pair()[0].half()
    assert ours(prompts()).logits.isfinite().all()
    assert ours.generate(prompts(), max_new_tokens=3, eos_token_id=-1).shape == (4, 15)


def test_the_names_are_public():
    for name in ("GPT2DoubleHeadsModel", "GPT2ForSequenceClassification", "accelerate"):
        assert hasattr(fastlm, name)
