"""What a run writes beside its checkpoints: the same however it was cut, and nothing lost by it."""

import os
import signal
from pathlib import Path

import pytest
import torch
from runs import assert_same_bits, before_step, logged, new_run, weights
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm import cli
from fastlm.training import checkpoint
from fastlm.training.command import start
from fastlm.training.finite import first_not_finite

# No setting divides another: rows, samples and checkpoints fall on different steps.
UNEVEN = {"steps": 24, "eval_every": 9, "save_every": 7, "sample_every": 4, "keep": 9}


@pytest.fixture(scope="module")
def straight(text_folder, tmp_path_factory):
    """The folder of a run that nothing interrupts, and its trainer."""
    folder = tmp_path_factory.mktemp("straight")
    trainer = new_run(text_folder, folder, **UNEVEN)
    assert trainer.run()
    return folder, trainer


def test_samples_come_at_their_own_steps(straight):
    """Rows of the log are every 10 steps; samples had waited for a step that is due for both."""
    lines = (straight[0] / "samples.txt").read_text(encoding="utf-8").splitlines()
    headings = [line for line in lines if line.startswith("--- step ")]
    assert headings == [f"--- step {step}" for step in (4, 8, 12, 16, 20, 24)]


def die():
    raise KeyboardInterrupt


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    "stops",
    [
        [(17, die)],
        [(9, interrupt), (13, interrupt), (22, interrupt)],
        [(6, die), (12, interrupt), (20, die)],
    ],
    ids=["killed", "stopped", "both"],
)
def test_an_interrupted_run_leaves_the_files_of_a_straight_one(
    straight, text_folder, tmp_path, stops
):
    trainer = new_run(text_folder, tmp_path, **UNEVEN)
    for step, action in stops:
        before_step(trainer, step, action)
        if action is die:
            with pytest.raises(KeyboardInterrupt):
                trainer.run()
        else:
            assert not trainer.run()
        resumed = bool(checkpoint.every(tmp_path))
        trainer = start({"resume": str(tmp_path)}) if resumed else new_run(
            text_folder, tmp_path, **UNEVEN
        )  # fmt: skip
    assert trainer.run()
    assert [row["step"] for row in logged(tmp_path)] == ["9", "10", "18", "20", "24"]
    assert logged(tmp_path) == logged(straight[0])
    samples = [(folder / "samples.txt").read_bytes() for folder in (tmp_path, straight[0])]
    assert samples[0] == samples[1]
    assert_same_bits(weights(trainer), weights(straight[1]))


def test_part_of_a_row_is_dropped(straight, text_folder, tmp_path):
    trainer = new_run(text_folder, tmp_path, **UNEVEN)
    before_step(trainer, 17, die)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    with open(tmp_path / "log.csv", "a", encoding="utf-8") as file:
        file.write("12,1536,3.4")
    assert start({"resume": str(tmp_path)}).run()
    assert logged(tmp_path) == logged(straight[0])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_at_the_log_costs_no_step(straight, text_folder, tmp_path):
    trainer = new_run(text_folder, tmp_path, **UNEVEN)
    log = tmp_path / "log.csv"

    def fill_disk():
        log.rename(tmp_path / "before")
        log.symlink_to("/dev/full")

    before_step(trainer, 13, fill_disk)
    with pytest.raises(OSError, match=r"log\.csv: could not be written: .*No space.*step-00000018"):
        trainer.run()
    assert checkpoint.newest(tmp_path).name == "step-00000018"
    (tmp_path / "before").rename(log)
    assert start({"resume": str(tmp_path)}).run()
    assert logged(tmp_path) == logged(straight[0])


def test_a_disk_that_takes_no_checkpoint_either_names_both(text_folder, tmp_path):
    trainer = new_run(text_folder, tmp_path)

    def fill_disk():
        (tmp_path / "log.csv").unlink()
        (tmp_path / "log.csv").mkdir()
        (tmp_path / "checkpoints").write_text("in the way")

    before_step(trainer, 5, fill_disk)
    with pytest.raises(OSError, match=r"log\.csv: could.*then .*step-00000005: could not be writ"):
        trainer.run()


def spoil(trainer, what):
    weight = trainer.model.transformer.h[0].mlp.c_fc.weight
    if what == "weight":
        weight.data[0, 0] = torch.nan
    else:
        weight.register_hook(lambda gradient: gradient * torch.inf)


@pytest.mark.parametrize("what", ["weight", "gradient"])
@pytest.mark.parametrize("settings", [{"save_every": 4}, {"save_every": 5}], ids=str)
def test_numbers_that_are_not_finite_stop_the_run(text_folder, tmp_path, what, settings):
    """Step 8 is saved and no row of the log is due; at step 10 a row is."""
    trainer = new_run(text_folder, tmp_path, keep=1, eval_every=100, **settings)
    before_step(trainer, 7, lambda: spoil(trainer, what))
    good = f"step-{settings['save_every']:08d}"
    with pytest.raises(FloatingPointError, match=rf"step 7: the loss is .*{good}.*--resume"):
        trainer.run()
    assert [p.name for p in checkpoint.every(tmp_path)] == [good]
    assert start({"resume": str(tmp_path)}).step == settings["save_every"]


def test_the_first_tensor_that_is_not_finite_is_found():
    large = torch.full((3,), 3e38)
    tensors = {"one": torch.ones(2), "overflowing": large, "none": torch.ones(0)}
    assert not large.sum().isfinite() and first_not_finite(tensors) is None
    opposite = torch.tensor([torch.inf, -torch.inf, 1.0])
    assert (
        first_not_finite(tensors | {"opposite": opposite, "nan": large * torch.nan}) == "opposite"
    )


@pytest.mark.parametrize("what", ["weights", "moments"])
def test_what_is_not_finite_is_not_saved(text_folder, tmp_path, what):
    trainer = new_run(text_folder, tmp_path, keep=1)
    trainer.train_step()
    good = trainer.save()
    trainer.train_step()
    weight = trainer.model.transformer.ln_f.weight
    spoilt = weight if what == "weights" else trainer.optimizer.state[weight]["exp_avg_sq"]
    spoilt.data[3] = torch.inf
    with pytest.raises(FloatingPointError, match=rf"step 2: .* holds inf or nan.*{good.name}"):
        trainer.save()
    assert checkpoint.every(tmp_path) == [good]


def test_a_validation_loss_that_is_not_finite_stops_the_run(text_folder, tmp_path):
    trainer = new_run(text_folder, tmp_path)
    trainer.evaluate = lambda batches: float("inf")
    with pytest.raises(FloatingPointError, match="step 5: the validation loss is inf; there is no"):
        trainer.run()


def test_a_run_that_diverges_ends_with_an_error(text_folder, tmp_path, capsys):
    flags = ["--tokenizer=train", "--vocab-size=270", "--n-layer=1", "--n-head=1", "--n-embd=8",
             "--seq-len=16", "--batch-size=2", "--steps=20", "--learning-rate=1e30", "--clip=0",
             f"--out-dir={tmp_path}"]  # fmt: skip
    assert cli.main(["train", str(text_folder), *flags]) == 1
    assert "fastlm: error: train: step " in capsys.readouterr().err
    assert checkpoint.every(tmp_path) == []


class Reads(TorchDispatchMode):
    """Counts what waits for the device: numbers read from it, and copies to the CPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += any(name in str(function) for name in self.WAITING)
        return function(*args, **(kwargs or {}))


def test_between_steps_nothing_is_read_until_something_is_due(text_folder, tmp_path):
    trainer = new_run(text_folder, tmp_path, eval_every=100, save_every=100)
    train_step, read = trainer.train_step, []
    with Reads() as reads:

        def counting():
            read.append(reads.count)
            result = train_step()
            reads.count = 0
            return result

        trainer.train_step = counting
        assert trainer.run()
    assert read[1:] == [0] * 9 and reads.count > 0
