"""What a run may be asked for: numbers, flags that would have no effect, and others' files."""

import shutil
from dataclasses import fields

import pytest
from runs import SETTINGS, new_run

from fastlm import cli
from fastlm.training import TrainingConfig, checkpoint
from fastlm.training.command import start
from fastlm.training.log import COLUMNS
from fastlm.training.optimizer import learning_rate
from fastlm.training.settings import ModelSettings

FLOATS = [
    (c, f.name) for c in (TrainingConfig, ModelSettings) for f in fields(c) if f.type is float
]


@pytest.fixture(scope="module")
def finished(text_folder, tmp_path_factory):
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("finished")
    assert new_run(text_folder, folder, steps=2, warmup_steps=1, seed=3).run()
    return folder


def refused(given, named):
    with pytest.raises(ValueError, match=named):
        start(given)


@pytest.mark.parametrize("peak", [5e-5, 1e-3, 0.0])
def test_the_rate_falls_to_a_tenth_of_its_peak(peak):
    config = TrainingConfig(steps=50, learning_rate=peak)
    rates = [learning_rate(step, config) for step in range(50)]
    assert config.warmup_steps == 5, "a tenth of the steps"
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[5] == peak and rates[-1] == pytest.approx(peak / 10)


def test_the_warm_up_is_at_most_100_steps_unless_asked_for():
    assert TrainingConfig(steps=5000).warmup_steps == 100
    assert TrainingConfig(steps=5000, warmup_steps=700).warmup_steps == 700
    assert TrainingConfig(steps=3).warmup_steps == 0


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(("owner", "name"), FLOATS)
def test_inf_and_nan_are_refused_for_every_number(owner, name, value):
    with pytest.raises(ValueError, match=f"train: {name}: expected a finite number, got {value}"):
        owner(**{name: value})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"learning_rate": 1e-5, "min_learning_rate": 1e-4}, r"min_learning_rate: .*1e-05, got"),
        ({"steps": 10, "warmup_steps": 11}, "warmup_steps: expected 0 to .* = 10, got 11"),
        ({"warmup_steps": -1}, "warmup_steps: expected 0 to"),
        ({"seed": -1}, "seed: expected 0 to .*, got -1"),
        ({"seed": 2**64}, "seed: expected 0 to"),
        ({"steps": 10**8}, "steps: expected at most 99999999"),
        ({"batch_size": 10**20}, r"batch_size: expected less than 2\*\*31"),
        ({"keep": 0}, "keep: expected >= 1, got 0"),
        ({"steps": 2.5}, "steps: expected an integer, got 2.5"),
        ({"steps": "10"}, "steps: expected an integer, got '10'"),
        ({"keep": True}, "keep: expected an integer, got True"),
        ({"device": 0}, "device: expected text, got 0"),
    ],
)
def test_senseless_training_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=f"train: {named}"):
        TrainingConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"n_layer": 0}, "n_layer: expected >= 1, got 0"),
        ({"n_head": 5, "n_embd": 16}, "n_embd: expected a multiple of n_head = 5, got 16"),
        ({"dropout": 1.0}, "dropout: expected 0 <= dropout < 1, got 1.0"),
        ({"validation": -0.1}, "validation: expected 0 <= validation < 1, got -0.1"),
    ],
)
def test_senseless_model_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=f"train: {named}"):
        ModelSettings(**settings)


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_every_accepted_seed_trains_and_samples(text_folder, tmp_path, seed):
    assert new_run(text_folder, tmp_path, steps=1, warmup_steps=0, seed=seed, sample_every=1).run()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_layer", 9), ("dropout", 0.5), ("tokenizer", "gpt2"), ("vocab_size", 300), ("seed", 0),
        ("validation", 0.5), ("seq_len", 8), ("init_from", "elsewhere"),
    ],
)  # fmt: skip
def test_what_a_run_began_with_cannot_change(finished, name, value):
    began_with = {**SETTINGS, "seed": 3, "validation": 0.05, "dropout": 0.1, "init_from": ""}[name]
    refused({"resume": str(finished), name: value}, f"{name}: expected {began_with!r}, with which")
    assert start({"resume": str(finished), name: began_with}).step == 2


def test_a_resumed_run_goes_no_steps_back(finished):
    refused({"resume": str(finished), "steps": 1}, "steps: expected at least 2, which .* got 1")
    assert start({"resume": str(finished), "steps": 2}).step == 2


def test_an_out_dir_beside_resume_is_refused(finished, tmp_path):
    given = {"resume": str(finished), "out_dir": str(tmp_path)}
    refused(given, f"out_dir: expected none with --resume .*, got '{tmp_path}'")
    assert start({"resume": str(finished), "out_dir": str(finished)}).step == 2


def test_text_of_the_same_length_is_other_text(text_folder, tmp_path):
    text = shutil.copytree(text_folder, tmp_path / "text")
    # 256 bytes and the end of text: a token for each byte.
    run = new_run(text, tmp_path / "run", vocab_size=257)
    run.save()
    resumed = {"resume": str(tmp_path / "run"), "data": [str(text.rename(tmp_path / "moved"))]}
    assert start(resumed).step == 0
    other = tmp_path / "moved" / "0.txt"
    other.write_text(other.read_text(encoding="utf-8").replace("alpha", "ALPHA"), encoding="utf-8")
    tokens = len(run.data.train)
    refused(resumed, f"data: expected the text .*, {tokens} tokens, got other text, {tokens} tok")


def test_flags_without_effect_are_refused(text_folder, finished, tmp_path):
    new = {"data": [str(text_folder)], "out_dir": str(tmp_path)}
    refused({**new, "vocab_size": 300}, "vocab_size: expected none without --tokenizer train")
    tuned = {**new, "init_from": str(checkpoint.newest(finished))}
    for name, value in (("n_layer", 2), ("tokenizer", "train"), ("dropout", 0.1)):
        refused({**tuned, name: value}, f"{name}: expected none with --init-from")
    held_out = {**new, "tokenizer": "train", "validation": 0.0}
    refused({**held_out, "eval_every": 5}, "eval_every: expected none with --validation 0")
    assert list(tmp_path.iterdir()) == []


def test_too_little_text_for_a_validation_loss_is_told(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("some words\n" * 500, encoding="utf-8")
    flags = ["--tokenizer=train", "--vocab-size=257", "--seq-len=1200", "--steps=1", "--n-layer=1",
             "--n-head=1", "--n-embd=8", "--batch-size=1", "--validation=0.2"]  # fmt: skip
    assert cli.main(["train", str(text), f"--out-dir={tmp_path / 'run'}", *flags]) == 0
    assert "warning: no validation loss: 1" in capsys.readouterr().err


def test_a_prompt_without_samples_is_told(finished, capsys):
    assert cli.main(["train", "--resume", str(finished), "--sample-prompt=alpha"]) == 0
    assert "warning: --sample-prompt has no effect" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["log.csv", "run.json", "samples.txt", "loss.png", "tokenizer"])
def test_files_of_others_are_not_overwritten(text_folder, tmp_path, name):
    (tmp_path / name).write_text('{"mine": [1, 2]}')
    with pytest.raises(ValueError, match=rf"/{name}: expected"):
        new_run(text_folder, tmp_path)
    assert (tmp_path / name).read_text() == '{"mine": [1, 2]}'
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["log.csv", "run.json", "samples.txt"])
def test_files_of_others_do_not_pass_for_a_runs(text_folder, tmp_path, name):
    new_run(text_folder, tmp_path).save()
    (tmp_path / name).write_text("my,own\n1,2\n")
    for again in ({"resume": str(tmp_path)}, None):
        if again is None:
            checkpoint.newest(tmp_path).rename(tmp_path / "moved")
        with pytest.raises(ValueError, match=rf"/{name}: expected"):
            start(again) if again else new_run(text_folder, tmp_path)
        assert (tmp_path / name).read_text() == "my,own\n1,2\n"


def test_a_log_with_other_rows_is_named(text_folder, tmp_path):
    new_run(text_folder, tmp_path).save()
    (tmp_path / "log.csv").write_text(",".join(COLUMNS) + "\nfirst,2\n")
    refused({"resume": str(tmp_path)}, r"log\.csv: expected a step and 8 columns")
