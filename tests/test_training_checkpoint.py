"""Checkpoints that are damaged, edited, foreign or not finite."""

import copy
import subprocess

import pytest
import torch
from runs import assert_same_bits, new_run, weights

from fastlm import cli
from fastlm.checkpoint import CheckpointError
from fastlm.models import GPT2LMHeadModel
from fastlm.training import checkpoint
from fastlm.training.command import start


@pytest.fixture
def saved(text_folder, tmp_path):
    """A run's folder, the state of its one checkpoint, and a function that writes another."""
    run = new_run(text_folder, tmp_path)
    run.train_step()
    path = run.save() / checkpoint.STATE
    return tmp_path, torch.load(path, weights_only=True), lambda state: torch.save(state, path)


def at(state, *keys):
    for key in keys:
        state = state[key]
    return state


MOMENT = ("optimizer", "state", 0)
DAMAGE = [
    ((*MOMENT, "exp_avg"), torch.zeros(3), r"exp_avg: expected .*\(270, 16\), got .*\(3,\)"),
    ((*MOMENT, "exp_avg_sq"), torch.zeros(1).expand(270, 16), "exp_avg_sq: .* not contiguous"),
    ((*MOMENT, "exp_avg"), torch.zeros(270, 16).half(), "exp_avg: .*float32.* got torch.float16"),
    ((*MOMENT, "exp_avg"), torch.zeros(270, 16).to_sparse(), "exp_avg: .*not contiguous"),
    ((*MOMENT, "exp_avg"), torch.full((270, 16), torch.nan), "exp_avg: expected finite"),
    ((*MOMENT, "exp_avg"), 1.0, "exp_avg: expected .*, got float"),
    ((*MOMENT, "step"), torch.zeros(2), r"step: expected .*\(\), got .*\(2,\)"),
    ((*MOMENT, "more"), torch.zeros(2), r"state\[0\] of transformer\.wte.*expected step"),
    ((*MOMENT,), None, r"state\[0\] of transformer\.wte.*expected step"),
    (("optimizer", "state"), {0: {}}, "expected one entry for each parameter"),
    (("optimizer", "state"), [], "expected one entry for each parameter, .*got list"),
    (("optimizer",), None, "optimizer: expected dict, got NoneType"),
    (("step",), "1", "step: expected int, got str"),
    (("position",), -8, "position: expected >= 0, got -8"),
    (("seconds",), float("nan"), "seconds: expected >= 0, got nan"),
    (("recent",), torch.zeros(3), r"recent: expected shape \(steps, 2\), got \(3,\)"),
]


@pytest.mark.parametrize(("place", "value", "named"), DAMAGE)
def test_an_entry_that_does_not_fit_is_named(saved, place, value, named):
    out_dir, state, write = saved
    at(state, *place[:-1])[place[-1]] = value
    write(state)
    with pytest.raises(CheckpointError, match=rf"training_state\.pt: .*{named}"):
        start({"resume": str(out_dir)})


def test_every_moment_is_compared_with_its_parameter(saved):
    """torch checks none: its fused AdamW would write past the end of the smaller tensor."""
    out_dir, state, write = saved
    for number, entries in state["optimizer"]["state"].items():
        for name in entries:
            changed = copy.deepcopy(state)
            changed["optimizer"]["state"][number][name] = torch.zeros(5, 7)
            write(changed)
            with pytest.raises(
                CheckpointError, match=rf"state\[{number}\] of .*: {name}: expected"
            ):
                start({"resume": str(out_dir)})


def test_a_resized_vocabulary_is_refused(saved):
    out_dir, _, _ = saved
    folder = checkpoint.newest(out_dir)
    model = GPT2LMHeadModel.from_pretrained(folder)
    model.resize_token_embeddings(300)
    model.save_pretrained(folder)
    named = r"training_state\.pt: .*wte\.weight: exp_avg: expected .*\(300, 16\), got .*\(270, 16\)"
    with pytest.raises(CheckpointError, match=named):
        start({"resume": str(out_dir)})


@pytest.mark.parametrize("bytes_", [b"", b"\x89PNG", b"\x80\x02}q\x00X\xff\xff", b"PK\x03\x04"])
def test_bytes_that_are_no_state_are_one_line(saved, bytes_, capsys):
    out_dir, _, _ = saved
    (checkpoint.newest(out_dir) / checkpoint.STATE).write_bytes(bytes_)
    assert cli.main(["train", "--resume", str(out_dir)]) == 1
    error = capsys.readouterr().err
    assert "training_state.pt: not a whole training state" in error and error.count("\n") == 1


class Code:
    def __reduce__(self):
        return subprocess.check_call, (["touch", "run-by-a-file"],)


def test_code_in_a_state_is_not_run(saved, tmp_path, monkeypatch):
    out_dir, _, write = saved
    monkeypatch.chdir(tmp_path)
    write({"optimizer": Code()})
    with pytest.raises(CheckpointError, match="not a whole training state"):
        start({"resume": str(out_dir)})
    assert not (tmp_path / "run-by-a-file").exists()


def test_rates_and_decays_of_a_resumed_run_are_those_asked_for(saved):
    out_dir, _, _ = saved
    run = start({"resume": str(out_dir), "beta2": 0.5, "weight_decay": 0.25})
    decayed, rest = run.optimizer.param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.25, 0.0)
    assert decayed["betas"] == rest["betas"] == (0.9, 0.5)


def test_other_names_are_not_checkpoints(text_folder, tmp_path):
    run = new_run(text_folder, tmp_path, save_every=2, keep=2)
    run.train_step()
    run.save()
    names = [
        "step-00000006.backup",
        "step-best",
        "step-7",
        "step-000000001",
    ]
    folders = [tmp_path / "checkpoints" / name for name in names]
    for folder in folders:
        folder.mkdir()
    (tmp_path / "checkpoints" / "step-99999999").write_text("a file")
    assert run.run()
    assert [p.name for p in checkpoint.every(tmp_path)] == ["step-00000008", "step-00000010"]
    assert checkpoint.newest(tmp_path).name == "step-00000010"
    assert all(folder.is_dir() for folder in folders)


def test_a_moved_checkpoint_is_not_removed(text_folder, tmp_path):
    run = new_run(text_folder, tmp_path / "run", save_every=2, keep=1)
    run.train_step()
    place = run.save()
    place.symlink_to(place.rename(tmp_path / "moved"))
    assert run.run()
    assert [p.name for p in checkpoint.every(tmp_path / "run")] == [place.name, "step-00000010"]
    assert (tmp_path / "moved" / checkpoint.STATE).is_file()


def test_a_checkpoint_of_the_same_step_is_replaced(text_folder, tmp_path):
    run = new_run(text_folder, tmp_path)
    run.train_step()
    assert run.save() == run.save()
    assert_same_bits(weights(start({"resume": str(tmp_path)})), weights(run))


def test_weights_that_are_not_finite_are_never_begun_with(saved):
    out_dir, _, _ = saved
    folder = checkpoint.newest(out_dir)
    model = GPT2LMHeadModel.from_pretrained(folder)
    with torch.no_grad():
        model.transformer.ln_f.bias[3] = torch.inf
    model.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"step-00000001: .*ln_f\.bias: expected finite"):
        start({"resume": str(out_dir)})
