"""The other heads against transformers' with the same weights: every loss, logit and gradient."""

import pytest
import torch
import transformers
from accuracy import assert_as_accurate_as_torch
from gpt2_pair import SHAPE, prompts

import fastlm.models

PAD = 60
SETTINGS = {**SHAPE, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": PAD}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "classifier_dropout": 0.0}
NO_DROPOUT["summary_first_dropout"] = 0.0


def models(name, **settings):
    """(ours, theirs, truth)."""
    torch.manual_seed(0)
    settings = {**SETTINGS, **NO_DROPOUT, **settings}
    theirs = getattr(transformers, name)(transformers.GPT2Config(**settings))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    truth = getattr(transformers, name)(transformers.GPT2Config(**settings)).double()
    ours = getattr(fastlm.models, name)(fastlm.models.GPT2Config(**settings))
    ours.load_state_dict(theirs.state_dict())
    truth.load_state_dict(theirs.state_dict())
    return ours, theirs, truth


def compare(trio, inputs, fields, loss=lambda output: output.loss, cancels=None):
    compare_batches(trio, [inputs], fields, loss, cancels or {})


def compare_batches(trio, batches, fields, loss, cancels=None):
    """Gradients of all batches are compared at once: of one, a sum over tokens that nearly cancel
    may have several times the rounding of another order of adding, by chance.

    cancels: for a parameter whose gradient is zero, one whose gradient has the size of its terms.
    """
    gradients = [{} for _ in trio]
    for inputs in batches:
        outputs = [model(**_in_dtype(inputs, model)) for model in trio]
        for model, output, found in zip(trio, outputs, gradients, strict=True):
            loss(output).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    found.setdefault(name, []).append(parameter.grad)
            model.zero_grad()
        for name in fields:
            assert_as_accurate_as_torch(*(getattr(output, name) for output in outputs), name)
    for name in gradients[1]:
        stacked = (torch.stack(found[name]) for found in gradients)
        sized_like = (cancels or {}).get(name)
        terms = max((g.abs().max().item() for g in gradients[2].get(sized_like, [])), default=1e-30)
        assert_as_accurate_as_torch(*stacked, f"gradient of {name}", terms)
    first, second = (output.to_tuple() for output in outputs[:2])
    assert [type(t) for t in first][: len(fields)] == [type(t) for t in second][: len(fields)]


def _in_dtype(inputs, model):
    dtype = next(model.parameters()).dtype
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}


def padded():
    ids = prompts()
    ids[ids == PAD] = 1
    ids[1, 8:] = PAD
    ids[2, 3:] = PAD
    return ids


CLASSIFIED = {
    "classes": ({"num_labels": 3}, torch.tensor([0, 2, 1, 1])),
    "regression": ({"num_labels": 1}, torch.tensor([0.5, 2.0, -1.0, 1.0])),
    "two numbers": ({"num_labels": 2, "problem_type": "regression"}, torch.randn(4, 2)),
    "several labels": ({"num_labels": 3}, torch.tensor([[1.0, 0, 1]] * 4)),
}


@pytest.mark.parametrize("name", CLASSIFIED)
def test_sequence_classification(name):
    settings, labels = CLASSIFIED[name]
    trio = models("GPT2ForSequenceClassification", **settings)
    mask = (padded() != PAD).long()
    inputs = {"input_ids": padded(), "labels": labels, "attention_mask": mask}
    compare(trio, inputs, ["logits", "loss"])


def test_sequence_classification_must_know_where_rows_end():
    model = models("GPT2ForSequenceClassification", pad_token_id=None)[0]
    with pytest.raises(ValueError, match=r"got 4 rows and no config\.pad_token_id"):
        model(prompts())
    assert model(prompts(1)).logits.shape == (1, 2)
    model.config.problem_type = "guess"
    with pytest.raises(ValueError, match="problem_type: got 'guess'"):
        model(prompts(1), labels=torch.tensor([1]))


def test_token_classification():
    labels = prompts() % 5
    labels[0, :4] = -100
    trio = models("GPT2ForTokenClassification", num_labels=5)
    compare(trio, {"input_ids": prompts(), "labels": labels}, ["logits", "loss"])


def test_token_classification_drops_in_training():
    model = models("GPT2ForTokenClassification", classifier_dropout=None)[0].train()
    assert not model(prompts()).logits.equal(model(prompts()).logits)
    assert model.eval()(prompts()).logits.equal(model(prompts()).logits)


def test_question_answering():
    places = {
        "start_positions": torch.tensor([0, 3, 11, 99]),
        "end_positions": torch.tensor([2, 4, 11, 5]),
    }
    trio = models("GPT2ForQuestionAnswering")
    # The same number added to every token changes no softmax over tokens.
    cancels = {
        "transformer.ln_f.bias": "transformer.ln_f.weight",
        "qa_outputs.bias": "qa_outputs.weight",
    }
    fields = ["start_logits", "end_logits", "loss"]
    compare(trio, {"input_ids": prompts(), **places}, fields, cancels=cancels)


@pytest.mark.parametrize(
    "mc_token_ids", [None, torch.tensor([[3, 11], [0, 7]])], ids=["last", "given"]
)
def test_double_heads(mc_token_ids):
    batches = []
    for seed in range(8):
        ids = prompts(seed=seed).view(2, 2, 12)
        batches.append({"input_ids": ids, "labels": ids, "mc_labels": torch.tensor([1, 0])})
        if mc_token_ids is not None:
            batches[-1]["mc_token_ids"] = mc_token_ids
    trio = models("GPT2DoubleHeadsModel", summary_activation="tanh")
    fields = ["loss", "mc_loss", "logits", "mc_logits"]
    compare_batches(trio, batches, fields, lambda output: output.loss + 2 * output.mc_loss)


@pytest.mark.parametrize("kind", ["last", "first", "mean"])
def test_double_heads_summaries(kind):
    """On (B, T): with choices transformers takes these over the choices and not over the tokens."""
    trio = models("GPT2DoubleHeadsModel", summary_type=kind)
    # Not the loss: softmax takes no notice of the bias, whose gradient would be rounding alone.
    compare(trio, {"input_ids": prompts()}, ["mc_logits"], lambda o: o.mc_logits.square().sum())


def test_double_heads_generate():
    ours, theirs, _ = models("GPT2DoubleHeadsModel")
    options = {
        "max_new_tokens": 8,
        "pad_token_id": PAD,
        "attention_mask": torch.ones_like(prompts()),
    }
    assert ours.generate(prompts(), **options).equal(theirs.eval().generate(prompts(), **options))
