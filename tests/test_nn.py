"""accelerate on transformers' models and plain modules: same numbers, everything undone."""

import subprocess
import sys

import pytest
import torch
import transformers
from accuracy import assert_as_accurate_as_torch
from gpt2_pair import left_mask, pair, prompts
from torch import nn
from torch.nn import functional as F

import fastlm
from fastlm.nn import (
    GELU,
    CrossEntropyLoss,
    LayerNorm,
    accelerate,
    attention_interface,
    register_attention,
)


@pytest.fixture
def theirs():
    return pair()[1]


def grads(model, **inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters()}


MASKS = {
    "no padding": None,
    "left": left_mask(12, 5, 1, 9),
    "right": left_mask(12, 5, 1, 9).flip(1),
}


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_numbers_and_undone(theirs, padding, dtype):
    mask = MASKS[padding]
    labels = prompts() if mask is None else prompts().masked_fill(mask == 0, -100)
    inputs = {"input_ids": prompts(), "labels": labels, "attention_mask": mask}
    theirs = theirs.to(dtype).eval()
    truth = pair()[1].double()
    truth.load_state_dict(theirs.state_dict())
    kinds = {name: type(module) for name, module in theirs.named_modules()}
    before, before_grads = grads(theirs, **inputs)
    report = accelerate(theirs)
    after, after_grads = grads(theirs, **inputs)
    expected, true_grads = grads(truth.eval(), **inputs)
    # What stands at padding is nobody's business.
    real = torch.ones(4, 12) if mask is None else mask
    logits = [output.logits[real.bool()] for output in (after, before, expected)]
    assert_as_accurate_as_torch(*logits, "logits")
    for name, grad in after_grads.items():
        assert_as_accurate_as_torch(grad, before_grads[name], true_grads[name], name)
    report.undo()
    assert {name: type(module) for name, module in theirs.named_modules()} == kinds
    again, _ = grads(theirs, **inputs)
    assert again.logits.equal(before.logits) and again.loss.equal(before.loss)


def test_the_report_names_what_was_swapped(theirs):
    report = accelerate(theirs)
    assert ("transformer.h.1.ln_2", "LayerNorm", "fastlm.nn.LayerNorm") in report.swaps
    assert ("transformer.h.0.mlp.act", "NewGELUActivation", "fastlm.nn._TanhGELU") in report.swaps
    assert ("attention", "sdpa", "ops.attention") in report.swaps
    assert "loss_function: ForCausalLMLoss -> ops.cross_entropy" in str(report)
    assert len(report.swaps) == 2 * 2 + 1 + 2 + 1 + 1
    assert accelerate(theirs).swaps == []
    assert "nothing was found" in str(accelerate(nn.Linear(2, 2)))


def test_it_is_our_kernels_that_run(theirs, monkeypatch):
    called = []
    for name in ("layer_norm", "gelu", "attention", "cross_entropy"):
        real = getattr(fastlm.ops, name)
        monkeypatch.setattr(
            fastlm.ops, name, lambda *a, _f=real, _n=name, **k: (called.append(_n), _f(*a, **k))[1]
        )
    accelerate(theirs)
    theirs(prompts(), labels=prompts())
    assert [called.count(n) for n in ("layer_norm", "gelu", "attention", "cross_entropy")] == [
        5,
        2,
        2,
        1,
    ]


@pytest.mark.parametrize("padding", ["no padding", "left"])
def test_generates_the_same(padding):
    mask = MASKS[padding]
    mask = torch.ones_like(prompts()) if mask is None else mask
    plain, fast = pair()[1], pair()[1]
    accelerate(fast)
    for options in ({}, {"num_beams": 3}):
        settings = {"max_new_tokens": 20, "pad_token_id": 60, "attention_mask": mask, **options}
        assert fast.generate(prompts(), **settings).equal(plain.generate(prompts(), **settings))


def test_attn_implementation_by_name(tmp_path, theirs):
    theirs.save_pretrained(tmp_path)
    register_attention()
    named = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="fastlm")
    torch.testing.assert_close(named(prompts()).logits, theirs(prompts()).logits)
    packed = torch.arange(6).repeat(2)[None].expand(4, -1)  # two documents in each row
    torch.testing.assert_close(
        named(prompts(), position_ids=packed).logits, theirs(prompts(), position_ids=packed).logits
    )


def test_another_family_with_windows_and_grouped_heads():
    torch.manual_seed(0)
    settings = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
    }
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5}
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**settings)).eval()
    before = model(prompts()).logits
    with torch.no_grad():
        report = accelerate(model)
        torch.testing.assert_close(model(prompts()).logits, before)
    assert ("attention", "sdpa", "ops.attention") in report.swaps


def test_attention_interface_with_windows_and_grouped_heads():
    q, k = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8)
    place = torch.arange(7)
    seen = (place <= place[:, None]) & (place > place[:, None] - 3)
    y, weights = attention_interface(nn.Identity(), q, k, k, None, scaling=0.3, sliding_window=3)
    expected = F.scaled_dot_product_attention(q, k, k, seen, scale=0.3, enable_gqa=True)
    assert weights is None
    torch.testing.assert_close(y, expected.transpose(1, 2))


@pytest.mark.parametrize(
    ("ours", "torchs", "arguments"),
    [
        (LayerNorm((4, 6), eps=1e-3), nn.LayerNorm((4, 6), eps=1e-3), (torch.randn(3, 4, 6),)),
        (GELU("tanh"), nn.GELU("tanh"), (torch.randn(3, 6),)),
        (
            CrossEntropyLoss(ignore_index=1, label_smoothing=0.1, reduction="sum"),
            nn.CrossEntropyLoss(ignore_index=1, label_smoothing=0.1, reduction="sum"),
            (torch.randn(4, 6), torch.tensor([0, 1, 5, 2])),
        ),
    ],
    ids=["LayerNorm", "GELU", "CrossEntropyLoss"],
)
def test_modules_are_torchs(ours, torchs, arguments):
    torchs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(*arguments), torchs(*arguments))


def test_importing_fastlm_does_not_import_transformers():
    command = "import fastlm, fastlm.nn, sys; assert 'transformers' not in sys.modules"
    told = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
