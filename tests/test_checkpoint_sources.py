"""Where checkpoints come from and go to: shards, .bin, hub names, dtypes, other heads' files."""

import json
import pickle
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

import fastlm
from fastlm import GPT2Tokenizer
from fastlm.checkpoint import CheckpointError
from fastlm.generation import GenerationConfig
from fastlm.models import (
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

SHAPE = {"vocab_size": 101, "n_positions": 32, "n_embd": 48, "n_layer": 3, "n_head": 4}
END = {"bos_token_id": 0, "eos_token_id": 0}


@pytest.fixture
def theirs():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPE, **END)).eval()


@pytest.fixture
def ours():
    return GPT2LMHeadModel(GPT2Config(**SHAPE, **END)).eval()


def tokens():
    return torch.arange(96).view(3, 32)


def assert_same(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize("tied", [True, False])
def test_shards_both_ways(tmp_path, theirs, tied):
    config = transformers.GPT2Config(**SHAPE, **END, tie_word_embeddings=tied)
    theirs = transformers.GPT2LMHeadModel(config)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 3
    ours = GPT2LMHeadModel.from_pretrained(tmp_path / "theirs")
    assert_same(ours, theirs)
    ours.save_pretrained(tmp_path / "ours", max_shard_size="50KB")
    sizes = [path.stat().st_size for path in (tmp_path / "ours").glob("model-*.safetensors")]
    largest = max(t.nbytes for t in ours.state_dict().values())
    assert len(sizes) > 3 and max(sizes) < max(50_000, largest) + 5_000
    assert_same(transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours"), theirs)
    assert_same(GPT2LMHeadModel.from_pretrained(tmp_path / "ours"), theirs)


def test_saving_again_leaves_no_old_shards(tmp_path, ours):
    ours.save_pretrained(tmp_path, max_shard_size=50_000)
    ours.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    ours.save_pretrained(tmp_path, max_shard_size="0.05MB")
    assert not (tmp_path / "model.safetensors").exists()
    assert_same(GPT2LMHeadModel.from_pretrained(tmp_path), ours)
    with pytest.raises(ValueError, match="max_shard_size: got 'big'"):
        ours.save_pretrained(tmp_path, max_shard_size="big")


def test_damaged_and_missing_shards_are_named(tmp_path, ours):
    ours.save_pretrained(tmp_path, max_shard_size=50_000)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(FileNotFoundError, match="model-00002"):
        GPT2LMHeadModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not an index of shards"):
        GPT2LMHeadModel.from_pretrained(tmp_path)


def test_old_bin_files_are_read_and_code_in_them_is_not_run(tmp_path, theirs):
    theirs.config.save_pretrained(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    torch.save(theirs.state_dict(), path)
    assert_same(GPT2LMHeadModel.from_pretrained(tmp_path), theirs)
    assert_same(GPT2LMHeadModel.from_pretrained(tmp_path, use_safetensors=False), theirs)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        GPT2LMHeadModel.from_pretrained(tmp_path, use_safetensors=True)

    class Trap:
        def __reduce__(self):
            return (tmp_path / "sprung").touch, ()

    path.write_bytes(pickle.dumps({"wte.weight": Trap()}))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: not a whole file of tensors"):
        GPT2LMHeadModel.from_pretrained(tmp_path)
    torch.save({"wte.weight": Trap()}, path)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: not a whole file of tensors"):
        GPT2LMHeadModel.from_pretrained(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_sharded_bin_files(tmp_path, theirs):
    theirs.config.save_pretrained(tmp_path)
    tensors = {k: v for k, v in theirs.state_dict().items() if k != "lm_head.weight"}
    names = sorted(tensors)
    places = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(places.values()):
        torch.save({n: tensors[n] for n in names if places[n] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert_same(GPT2LMHeadModel.from_pretrained(tmp_path), theirs)


def test_logits_bit_for_bit_on_the_torch_backend(tmp_path, theirs):
    """The same operations in the same order, so nothing but the weights can differ."""
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT2LMHeadModel.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    with fastlm.use("torch"):
        assert again(tokens()).logits.equal(ours(tokens()).logits)
    assert back(tokens()).logits.equal(theirs(tokens()).logits)


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ({"dtype": torch.float16}, torch.float16),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "torch.float64"}, torch.float64),
        ({"torch_dtype": torch.float32}, torch.float32),
        ({"dtype": "auto"}, torch.bfloat16),
        ({}, torch.bfloat16),
    ],
    ids=str,
)
def test_dtypes(tmp_path, ours, given, dtype):
    ours.to(torch.bfloat16).save_pretrained(tmp_path)
    assert GPT2LMHeadModel.from_pretrained(tmp_path, **given).dtype == dtype


@pytest.mark.parametrize(
    "where", [{"device": "meta"}, {"device_map": "meta"}, {"device_map": {"": "meta"}}], ids=str
)
@pytest.mark.filterwarnings("ignore:for .*which is a no-op")  # there is nothing to copy to
def test_devices(tmp_path, ours, where):
    ours.save_pretrained(tmp_path)
    assert GPT2LMHeadModel.from_pretrained(tmp_path, **where).device.type == "meta"
    assert GPT2LMHeadModel.from_pretrained(tmp_path, device_map="auto") is not None


def test_arguments_of_transformers_and_unknown_ones(tmp_path, ours):
    ours.save_pretrained(tmp_path / "sub")
    again = GPT2LMHeadModel.from_pretrained(
        str(tmp_path), subfolder="sub", attn_implementation="sdpa", trust_remote_code=False,
        low_cpu_mem_usage=True, attn_pdrop=0.5, revision="main", token=None,
    )  # fmt: skip
    assert again.config.attn_pdrop == 0.5
    with pytest.raises(TypeError, match="'colour'"):
        GPT2LMHeadModel.from_pretrained(tmp_path / "sub", colour="red")
    with pytest.raises(ValueError, match="dtype: got 'float99'"):
        GPT2LMHeadModel.from_pretrained(tmp_path / "sub", dtype="float99")
    with pytest.raises(ValueError, match="device_map: got"):
        GPT2LMHeadModel.from_pretrained(tmp_path / "sub", device_map={"a": "cpu", "b": "meta"})
    config = GPT2Config.from_pretrained(tmp_path / "sub")
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "sub", config=config).config is config


def hub_cache(folder, files, name="models--someone--small"):
    """A cache as huggingface_hub leaves it after a download."""
    snapshot = folder / name / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(files, snapshot)
    (folder / name / "refs").mkdir()
    (folder / name / "refs" / "main").write_text("0" * 40)


def test_hub_names_from_what_was_fetched(tmp_path, ours, monkeypatch):
    ours.save_pretrained(tmp_path / "files", max_shard_size=50_000)
    GPT2Tokenizer().save_pretrained(tmp_path / "files")
    hub_cache(tmp_path / "cache", tmp_path / "files")
    offline = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    assert_same(GPT2LMHeadModel.from_pretrained("someone/small", **offline), ours)
    tokenizer = GPT2Tokenizer.from_pretrained("someone/small", **offline)
    assert tokenizer.encode("The quick brown fox") == [464, 2068, 7586, 21831]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cache = {"cache_dir": tmp_path / "cache"}
    assert_same(GPT2LMHeadModel.from_pretrained("someone/small", **cache), ours)
    with pytest.raises(FileNotFoundError, match=r"someone/large.config\.json: no such file"):
        GPT2LMHeadModel.from_pretrained("someone/large", **cache)


def test_a_folder_comes_before_the_hub(tmp_path, theirs, monkeypatch, capsys):
    """The five lines that people type, with a folder of that name in place of the hub."""
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    GPT2Tokenizer().save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)

    def snippet(GPT2LMHeadModel, GPT2Tokenizer):
        tokenizer = GPT2Tokenizer.from_pretrained("gpt2")
        model = GPT2LMHeadModel.from_pretrained("gpt2")
        input_ids = tokenizer.encode("The quick brown fox", return_tensors="pt")
        output = model.generate(input_ids, max_length=50, num_return_sequences=1)
        print(tokenizer.decode(output[0], skip_special_tokens=True))
        return capsys.readouterr().out

    text = snippet(fastlm.GPT2LMHeadModel, fastlm.GPT2Tokenizer)
    assert text.startswith("The quick brown fox") and len(text) > 40
    assert text == snippet(transformers.GPT2LMHeadModel, transformers.GPT2TokenizerFast)


def test_generation_config_passes_both_ways(tmp_path, theirs):
    settings = {"max_new_tokens": 7, "num_beams": 2, "eos_token_id": [0, 5], "pad_token_id": 3}
    theirs.generation_config.update(**settings)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT2LMHeadModel.from_pretrained(tmp_path / "theirs")
    for name, value in settings.items():
        assert getattr(ours.generation_config, name) == value
    ones = torch.ones(3, 9)
    expected = theirs.generate(tokens()[:, :9], attention_mask=ones)
    assert ours.generate(tokens()[:, :9], attention_mask=ones).equal(expected)
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.GenerationConfig.from_pretrained(tmp_path / "ours")
    assert again.num_beams == 2 and again.eos_token_id == [0, 5]
    assert GenerationConfig.from_pretrained(tmp_path / "ours") == ours.generation_config


def test_a_classifier_starts_from_a_language_model(tmp_path, ours):
    ours.save_pretrained(tmp_path / "lm")
    with pytest.warns(UserWarning, match=r"has no score\.weight: initialised"):
        classifier = GPT2ForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=5)
    assert classifier.score.weight.shape == (5, 48) and classifier.score.weight.std() > 0.01
    assert classifier.transformer.wte.weight.equal(ours.transformer.wte.weight)
    classifier.save_pretrained(tmp_path / "classifier")
    kept = json.loads((tmp_path / "classifier" / "config.json").read_text())
    assert kept["architectures"] == ["GPT2ForSequenceClassification"]
    theirs = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert theirs.config.num_labels == 5
    assert_same(classifier, theirs)
    with pytest.warns(UserWarning, match=r"score\.weight: not of this model"):
        model = GPT2LMHeadModel.from_pretrained(tmp_path / "classifier")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert GPT2Model.from_pretrained(tmp_path / "lm").wte.weight.equal(ours.lm_head.weight)
    with pytest.warns(UserWarning, match="multiple_choice_head"):
        double = GPT2DoubleHeadsModel.from_pretrained(tmp_path / "lm")
    double.save_pretrained(tmp_path / "double")
    assert "lm_head.weight" not in load_file(tmp_path / "double" / "model.safetensors")
    assert_same(transformers.GPT2DoubleHeadsModel.from_pretrained(tmp_path / "double"), double)
