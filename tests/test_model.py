"""GPT-2 against transformers' with the same weights, and what ours does beyond it."""

import json

import pytest
import torch
import transformers
from accuracy import assert_as_accurate_as_torch

from fastlm.generation import KVCache
from fastlm.models import GPT2Config, GPT2LMHeadModel, GPT2Model

SHAPE = {"vocab_size": 101, "n_positions": 32, "n_embd": 48, "n_layer": 3, "n_head": 4}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
END = {"bos_token_id": 0, "eos_token_id": 0}
DTYPES = [torch.float32, torch.bfloat16]
IGNORED = -100


def config(**settings):
    return GPT2Config(**{**SHAPE, **NO_DROPOUT, **END, **settings})


def their_model(**settings):
    """transformers' GPT-2 with no parameter at its initial zero or one, so that each one counts."""
    torch.manual_seed(0)
    kept = {**SHAPE, **NO_DROPOUT, **END, **settings}
    # Their fused attention passes reorder_and_upcast_attn over.
    kept["attn_implementation"] = "eager" if kept.get("reorder_and_upcast_attn") else "sdpa"
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**kept))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def trio(dtype, **settings):
    """(ours, theirs, truth): weights rounded to `dtype`; the truth computes on them in float64."""
    theirs = their_model(**settings).to(dtype)
    # With reorder_and_upcast_attn transformers computes in float32 whatever the model is in.
    truth = their_model(**{**settings, "reorder_and_upcast_attn": False}).double()
    truth.load_state_dict(theirs.state_dict())
    ours = GPT2LMHeadModel(config(**settings)).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, truth


def tokens(batch=3, length=24):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(SHAPE["vocab_size"], (batch, length), generator=generator)


def labels_with(value):
    labels = tokens()
    labels[1, 3] = value
    return labels


def labels_with_gaps():
    labels = tokens()
    labels[0, :5] = IGNORED
    labels[2] = IGNORED
    return labels


VARIANTS = [
    {},
    {"activation_function": "gelu"},
    {"scale_attn_by_inverse_layer_idx": True},
    {"scale_attn_weights": False},
    {"n_inner": 80, "tie_word_embeddings": False},
    {"reorder_and_upcast_attn": True},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: next(iter(v), "default"))
def test_logits_loss_and_every_gradient(dtype, variant):
    models = trio(dtype, **variant)
    outputs = [model(tokens(), labels=labels_with_gaps()) for model in models]
    for output in outputs:
        output.loss.backward()
    assert_as_accurate_as_torch(*(output.logits for output in outputs), "logits")
    # The losses are float32, but of logits in `dtype`, whose precision the rule goes by.
    assert_as_accurate_as_torch(*in_dtype(dtype, *(output.loss for output in outputs)), "loss")
    gradients = [dict(model.named_parameters()) for model in models]
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        assert_as_accurate_as_torch(*(g[name].grad for g in gradients), f"gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ten_adamw_steps(dtype):
    models = trio(dtype)
    losses = [torch.stack(ten_losses(model)) for model in models]
    assert losses[2][-1] < 0.9 * losses[2][0], "nothing was learnt, so nothing was compared"
    assert_as_accurate_as_torch(*in_dtype(dtype, *losses), "losses of ten steps")


def in_dtype(dtype, ours, theirs, truth):
    return ours.to(dtype), theirs.to(dtype), truth


def ten_losses(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(10):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_real_tokens(side):
    ours, _, truth = trio(torch.float32)
    lengths = [24, 9, 1]
    for length, row in zip(lengths, range(3), strict=True):
        real = slice(24 - length, 24) if side == "left" else slice(0, length)
        mask = torch.zeros(3, 24, dtype=torch.long)
        for other, count in enumerate(lengths):
            mask[other, 24 - count :] = 1
        mask = mask if side == "left" else mask.flip(1)
        alone = tokens()[row : row + 1, real]
        padded = ours(tokens(), attention_mask=mask).logits[row : row + 1, real]
        what = f"{length} tokens, padded on the {side}"
        assert_as_accurate_as_torch(padded, ours(alone).logits, truth(alone).logits, what)


def test_padding_gets_no_gradient_and_gives_none():
    ours, _, _ = trio(torch.float32)
    embeds = torch.randn(2, 10, SHAPE["n_embd"], requires_grad=True)
    mask = torch.ones(2, 10)
    mask[0, :4] = 0
    logits = ours(inputs_embeds=embeds, attention_mask=mask).logits
    (logits * mask[..., None]).square().sum().backward()
    assert embeds.grad[0, :4].abs().max() == 0
    assert (embeds.grad[mask.bool()].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cached_pieces_equal_the_whole(dtype):
    ours, theirs, truth = trio(dtype)
    output, pieces = None, []
    for piece in tokens().split([7, 1, 1, 15], dim=1):
        cache = None if output is None else output.past_key_values
        with torch.no_grad():
            output = ours(piece, past_key_values=cache, use_cache=True)
        pieces.append(output.logits)
    assert output.past_key_values.get_seq_length() == 24
    assert_as_accurate_as_torch(
        torch.cat(pieces, 1), theirs(tokens()).logits, truth(tokens()).logits, "cached logits"
    )


def test_logits_to_keep_and_tuple_output():
    ours, _, _ = models = trio(torch.float32)
    whole = ours(tokens(), labels=tokens())
    loss, logits = whole
    assert logits is whole.logits is whole["logits"] is whole[1] and loss is whole[0]
    last_two = [model(tokens(), logits_to_keep=2).logits for model in models]
    assert last_two[0].shape == (3, 2, 101)
    assert_as_accurate_as_torch(*last_two, "logits_to_keep")
    assert torch.equal(ours(tokens(), return_dict=False)[0], logits)


def test_token_types_and_embeddings_as_input():
    ours, theirs, truth = trio(torch.float32)
    types = tokens().flip(0)
    outputs = [model(tokens(), token_type_ids=types).logits for model in (ours, theirs, truth)]
    assert_as_accurate_as_torch(*outputs, "token_type_ids")
    embeds = ours.transformer.wte(tokens())
    assert torch.equal(ours(inputs_embeds=embeds).logits, ours(tokens()).logits)


def test_dropout_is_repeatable_and_off_in_eval():
    model = GPT2LMHeadModel(config(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2))

    def loss(seed):
        torch.manual_seed(seed)
        return model(tokens(), labels=tokens()).loss

    assert loss(1).equal(loss(1)) and not loss(1).equal(loss(2))
    model.eval()
    assert loss(1).equal(loss(2))


@pytest.mark.parametrize("place", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
def test_each_dropout_acts(place):
    model = GPT2LMHeadModel(config(**{place: 0.5}))
    torch.manual_seed(0)
    assert not model(tokens()).logits.equal(model(tokens()).logits)


def test_initial_weights():
    torch.manual_seed(0)
    model = GPT2Model(config(n_layer=2))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name
            continue
        # The residual projections: 0.02 / sqrt(2 * n_layer) = 0.01.
        std = 0.01 if name.endswith("c_proj.weight") else 0.02
        # The deviation of n draws has itself a relative deviation of 1 / sqrt(2 n); five of those.
        assert abs(parameter.std() / std - 1) < 5 / (2 * parameter.numel()) ** 0.5, name


def test_config_round_trip_and_aliases(tmp_path):
    ours = config(n_inner=80, layer_norm_epsilon=1e-6)
    assert GPT2Config.from_json(ours.to_json()) == ours
    assert GPT2Config(hidden_size=48, num_attention_heads=4) == GPT2Config(n_embd=48, n_head=4)
    assert ours.max_position_embeddings == 32 and ours.num_hidden_layers == 3
    ours.hidden_size = 96
    assert ours.n_embd == 96
    (tmp_path / "config.json").write_text(config().to_json())
    theirs = transformers.GPT2Config.from_pretrained(tmp_path)
    for name, value in json.loads(config().to_json()).items():
        value = {int(k): v for k, v in value.items()} if name == "id2label" else value
        assert getattr(theirs, name) == value, name


def test_default_config_is_gpt2s():
    theirs = transformers.GPT2Config()
    for name, value in GPT2Config().to_dict().items():
        # Fields that transformers' config has only once they are set.
        if name not in ("architectures", "classifier_dropout"):
            assert getattr(theirs, name) == value, name


@pytest.mark.parametrize(
    ("settings", "error", "named"),
    [
        ({"width": 3}, TypeError, "'width'.*n_embd"),
        ({"n_embd": 50}, ValueError, "50.*multiple of n_head .4."),
        ({"n_layer": 0}, ValueError, "n_layer: got 0"),
        ({"attn_pdrop": 1.0}, ValueError, "attn_pdrop: got 1.0"),
        ({"activation_function": "swish"}, ValueError, "'swish'.*gelu_new"),
    ],
)
def test_impossible_configs_are_named(settings, error, named):
    with pytest.raises(error, match=named):
        config(**settings)


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"input_ids": torch.tensor([[1, 101]])}, IndexError, "input_ids: got 101.*0 to 100"),
        ({"input_ids": torch.tensor([[1, -1]])}, IndexError, "input_ids: got -1"),
        ({"input_ids": torch.tensor([1, 2])}, ValueError, r"shape \(2,\)"),
        ({"input_ids": torch.ones(1, 2)}, ValueError, "float32.*int64"),
        ({"input_ids": tokens(1, 33)}, ValueError, "33 tokens.*n_positions = 32"),
        ({"input_ids": tokens(1, 0)}, ValueError, "got 0 tokens"),
        ({}, ValueError, "input_ids and inputs_embeds"),
        ({"input_ids": tokens(), "inputs_embeds": torch.ones(3, 24, 48)}, ValueError, "both"),
        ({"inputs_embeds": torch.ones(3, 24, 47)}, ValueError, "47.*48"),
        ({"input_ids": tokens(), "attention_mask": torch.ones(3, 9)}, ValueError, r"\(3, 9\)"),
        ({"input_ids": tokens(), "labels": tokens(3, 23)}, ValueError, r"\(3, 23\).*\(3, 24\)"),
        ({"input_ids": tokens(), "labels": labels_with(101)}, IndexError, "101"),
        ({"input_ids": tokens(), "labels": labels_with(-1)}, IndexError, r"-1"),
    ],
)
def test_bad_input_is_named(arguments, error, named):
    with pytest.raises(error, match=named):
        GPT2LMHeadModel(config())(**arguments)


def test_full_cache_is_named():
    model = GPT2LMHeadModel(config()).eval()
    cache = KVCache.for_model(model, 3, 32)
    with torch.no_grad():
        model(tokens(), past_key_values=cache)
    with pytest.raises(ValueError, match=r"9 tokens after 24 cached.*n_positions = 32"):
        model(tokens(3, 9), past_key_values=cache)


def test_empty_batch_gives_empty_logits():
    assert GPT2LMHeadModel(config())(tokens(0, 8)).logits.shape == (0, 8, 101)
