"""Model files: both ways with transformers, and what is said of those that do not fit."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fastlm.checkpoint import CheckpointError
from fastlm.files import replacing
from fastlm.models import GPT2Config, GPT2LMHeadModel, GPT2Model

SHAPE = {"vocab_size": 101, "n_positions": 32, "n_embd": 48, "n_layer": 3, "n_head": 4}
END = {"bos_token_id": 0, "eos_token_id": 0}


def config():
    return GPT2Config(**SHAPE, **END)


def tokens():
    return torch.arange(96).view(3, 32)


@pytest.mark.parametrize("prefix", [True, False], ids=["with prefix", "without"])
def test_files_pass_both_ways(tmp_path, prefix):
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPE, **END))
    (theirs if prefix else theirs.transformer).save_pretrained(tmp_path / "theirs")
    ours = GPT2LMHeadModel.from_pretrained(tmp_path / "theirs")
    assert not ours.training and ours.lm_head.weight is ours.transformer.wte.weight
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    for name, tensor in theirs.state_dict().items():
        assert tensor.equal(ours.state_dict()[name]) and tensor.equal(again.state_dict()[name])
    trunk = GPT2Model.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    assert trunk.h[2].mlp.c_fc.weight.equal(theirs.transformer.h[2].mlp.c_fc.weight.bfloat16())


def test_old_files_with_masks_are_read(tmp_path):
    model = GPT2LMHeadModel(config())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, tmp_path / "model.safetensors")
    again = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert again(tokens()).logits.equal(model.eval()(tokens()).logits)


def damage(tensors, how):
    if how == "missing":
        del tensors["transformer.h.1.attn.c_attn.weight"]
    elif how == "unexpected":
        tensors["transformer.h.1.extra"] = torch.ones(2)
    else:
        tensors["transformer.ln_f.weight"] = torch.ones(7)


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("missing", r"missing transformer\.h\.1\.attn\.c_attn\.weight"),
        ("unexpected", r"unexpected transformer\.h\.1\.extra"),
        ("mis-shaped", r"ln_f\.weight: got shape \(7,\), accepted is \(48,\)"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, how, named):
    GPT2LMHeadModel(config()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors, how)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=named):
        GPT2LMHeadModel.from_pretrained(tmp_path)


def test_truncated_and_missing_files_are_named(tmp_path):
    GPT2LMHeadModel(config()).save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for kept in (0, 5, 100, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:kept])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole"):
            GPT2LMHeadModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"n_embd": ')
    with pytest.raises(CheckpointError, match=r"config\.json"):
        GPT2LMHeadModel.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"gpt2.config\.json.*a folder that holds"):
        GPT2LMHeadModel.from_pretrained("gpt2", local_files_only=True)


def test_replacing_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="mid-way"), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("mid-way")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
