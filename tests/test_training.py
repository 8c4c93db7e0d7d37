"""Training: resuming bit for bit, the optimiser, and what can go wrong with settings and disks."""

import csv
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import SETTINGS, assert_same_bits, new_run, weights

from fastlm.checkpoint import CheckpointError
from fastlm.models import GPT2Config, GPT2LMHeadModel
from fastlm.tokenizer import GPT2Tokenizer
from fastlm.training import TokenData, Trainer, TrainingConfig, checkpoint, lock
from fastlm.training.command import start
from fastlm.training.log import read
from fastlm.training.settings import OF_A_NEW_MODEL


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_run_is_bit_for_bit_the_straight_one(text_folder, tmp_path, dtype):
    straight = new_run(text_folder, tmp_path / "a", dtype=dtype)
    losses = [straight.train_step()[0].item() for _ in range(10)]
    first = new_run(text_folder, tmp_path / "b", dtype=dtype)
    resumed_losses = [first.train_step()[0].item() for _ in range(5)]
    first.save()
    torch.manual_seed(1234)  # what else the process draws must not matter
    second = start({"resume": str(tmp_path / "b")})
    assert second.step == 5 and second.config.dtype == dtype
    resumed_losses += [second.train_step()[0].item() for _ in range(5)]
    assert losses == resumed_losses
    assert_same_bits(weights(straight), weights(second))
    moments = [t.optimizer.state_dict()["state"] for t in (straight, second)]
    for key in moments[0]:
        assert_same_bits(*(m[key] for m in moments))


def test_evaluation_and_samples_do_not_change_training(text_folder, tmp_path):
    quiet = new_run(text_folder, tmp_path / "a", eval_every=100, save_every=100)
    talking = new_run(text_folder, tmp_path / "b", eval_every=1, sample_every=3, save_every=2)
    assert quiet.run() and talking.run()
    assert_same_bits(weights(quiet), weights(talking))
    samples = (tmp_path / "b" / "samples.txt").read_text(encoding="utf-8").splitlines()
    headings = [line for line in samples if line.startswith("--- step")]
    assert headings == ["--- step 3", "--- step 6", "--- step 9"]


def test_other_seed_gives_other_weights_and_order(text_folder, tmp_path):
    one = new_run(text_folder, tmp_path / "a")
    two = new_run(text_folder, tmp_path / "b", seed=1)
    assert not one.windows.batch(0, 4)[0].equal(two.windows.batch(0, 4)[0])
    assert not one.model.lm_head.weight.equal(two.model.lm_head.weight)


def test_gradients_are_the_mean_over_all_tokens_however_split(text_folder, tmp_path):
    """Four passes of 2 sequences and one of 8 are the same step, up to the order of the sums."""
    steps = {}
    for passes in (1, 4):
        run = new_run(
            text_folder, tmp_path / str(passes), accumulate=passes, batch_size=8 // passes,
            dropout=0.0, clip=0.0,
        )  # fmt: skip
        loss, norm = run.train_step()
        steps[passes] = loss.item(), norm.item()
    # Sums of 8 * 16 terms in float32, in another order: 128 half-ulps bound them.
    assert steps[1] == pytest.approx(steps[4], rel=128 * 2**-24)


def test_training_learns(text_folder, tmp_path):
    run = new_run(text_folder, tmp_path, steps=60, dropout=0.0)
    before = run.evaluate()
    assert run.run()
    assert before == pytest.approx(math.log(len(run.tokenizer)), rel=0.05), "not uniform at first"
    assert run.evaluate() < 0.7 * before


def test_run_writes_log_plot_and_checkpoints(text_folder, tmp_path):
    run = new_run(text_folder, tmp_path, steps=12, keep=2, save_every=3, eval_every=4)
    assert run.run()
    rows = list(csv.DictReader((tmp_path / "log.csv").open(encoding="utf-8")))
    assert [row["step"] for row in rows] == ["4", "8", "10", "12"]
    assert [bool(row["validation_loss"]) for row in rows] == [True, True, False, True]
    assert rows[-1]["tokens"] == str(12 * 2 * 4 * 16)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in checkpoint.every(tmp_path)] == ["step-00000009", "step-00000012"]
    again = GPT2LMHeadModel.from_pretrained(checkpoint.newest(tmp_path))
    assert_same_bits(again.state_dict(), weights(run))


def test_resumed_log_has_each_step_once(text_folder, tmp_path):
    run = new_run(text_folder, tmp_path, steps=8, save_every=4, eval_every=2, keep=9)
    assert run.run()
    checkpoint.every(tmp_path)[-1].rename(tmp_path / "lost")
    assert start({"resume": str(tmp_path)}).run()
    rows = list(csv.DictReader((tmp_path / "log.csv").open(encoding="utf-8")))
    assert [row["step"] for row in rows] == ["2", "4", "6", "8"]


def test_ctrl_c_saves_and_resumes(text_folder, tmp_path):
    run = new_run(text_folder, tmp_path, steps=1000, save_every=1000)
    step, taken = run.train_step, []

    def step_then_interrupt():
        taken.append(step())
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return taken[-1]

    run.train_step = step_then_interrupt
    handler = signal.getsignal(signal.SIGINT)
    assert not run.run()
    assert len(taken) == 3
    assert signal.getsignal(signal.SIGINT) is handler
    assert start({"resume": str(tmp_path)}).step == 3


def test_a_run_is_not_overwritten(text_folder, tmp_path):
    new_run(text_folder, tmp_path).save()
    with pytest.raises(ValueError, match=f"--resume {tmp_path}"):
        new_run(text_folder, tmp_path)


def test_init_from_continues_the_weights_not_the_run(text_folder, tmp_path):
    first = new_run(text_folder, tmp_path / "a")
    first.train_step()
    folder = first.save()
    settings = {name: value for name, value in SETTINGS.items() if name not in OF_A_NEW_MODEL}
    settings |= {"init_from": str(folder), "data": [str(text_folder)]}
    tuned = start({**settings, "out_dir": str(tmp_path / "b")})
    assert tuned.step == 0
    assert_same_bits(weights(first), weights(tuned))
    assert tuned.tokenizer.get_vocab() == first.tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"steps": 0}, "steps: expected >= 1, got 0"),
        ({"clip": -1.0}, "clip: expected >= 0, got -1.0"),
        ({"beta2": 1.0}, "beta2: expected 0 <= beta < 1, got 1.0"),
        ({"dtype": "float16"}, "dtype: expected float32 or bfloat16, got 'float16'"),
    ],
)
def test_impossible_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        TrainingConfig(**settings)


def test_sequence_longer_than_the_model_is_named(text_folder, tmp_path):
    folder = new_run(text_folder, tmp_path / "a").save()
    with pytest.raises(ValueError, match=r"seq_len: got 32.*n_positions = 16"):
        start({"data": [str(text_folder)], "out_dir": str(tmp_path / "b"), "seq_len": 32,
               "init_from": str(folder)})  # fmt: skip


def test_resuming_on_other_text_is_named(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some words\n" * 500, encoding="utf-8")
    new_run(text, tmp_path / "run").save()
    text.write_text("some words\n" * 600, encoding="utf-8")
    with pytest.raises(ValueError, match="it has changed"):
        start({"resume": str(tmp_path / "run")})


def test_no_text_is_named(tmp_path):
    with pytest.raises(ValueError, match="data: expected text files and folders, got nothing"):
        start({**SETTINGS, "out_dir": str(tmp_path)})


def test_truncated_training_state_is_named(text_folder, tmp_path):
    state = new_run(text_folder, tmp_path).save() / checkpoint.STATE
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"training_state\.pt: not a whole training state"):
        start({"resume": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match=r"has no run\.json"):
        start({"resume": str(tmp_path / "nowhere")})


FULL_DISK = """
import resource, sys
from pathlib import Path
from fastlm.training import command
run = command.start({"resume": sys.argv[1]})
run.train_step()
# What a full disk does to a write, for every file of more than so many bytes.
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    run.save()
except OSError as error:
    print("OSError:", error)
"""


@pytest.mark.parametrize("cut", ["model.safetensors", checkpoint.STATE])
def test_full_disk_keeps_the_last_checkpoint(text_folder, tmp_path, cut):
    run = new_run(text_folder, tmp_path)
    run.train_step()
    folder = run.save()
    limit = (folder / cut).stat().st_size - 1
    lock.release(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), str(limit)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "OSError: " in result.stdout and "could not be written" in result.stdout, result.stderr
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [folder.name]
    assert start({"resume": str(tmp_path)}).step == 1


def test_two_processes_train_like_one(text_folder, tmp_path):
    """Under torchrun each takes half of every batch; the weights agree with one process's."""
    alone = new_run(text_folder, tmp_path / "a", dropout=0.0, batch_size=8, steps=3)
    assert alone.run()
    flags = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in {**SETTINGS, "dropout": 0.0, "steps": 3}.items()
    ]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "-m", "fastlm", "train", str(text_folder), f"--out-dir={tmp_path / 'b'}", *flags],
        check=True, capture_output=True, cwd=Path(__file__).parent, timeout=120,
    )  # fmt: skip
    # Adam and clipping hide the gradient's scale; the norm, a sum of 10^4 terms in another order,
    # does not.
    norms = [float(read(tmp_path / run / "log.csv")[-1]["gradient_norm"]) for run in "ab"]
    assert norms[0] == pytest.approx(norms[1], rel=1e4 * 2**-24)
    together = GPT2LMHeadModel.from_pretrained(checkpoint.newest(tmp_path / "b"))
    for name, tensor in weights(alone).items():
        # Sums in another order may turn the sign of a gradient near zero, and with it Adam's first
        # steps: at most 2 * learning rate each, and only for few elements.
        difference = (together.state_dict()[name] - tensor).abs()
        assert difference.max() <= 3 * 2 * SETTINGS["learning_rate"]
        assert difference.median() <= 1e-5 * tensor.abs().max(), name


def test_trainer_needs_no_command_line(tmp_path):
    """The library's own door: any tokens, any model."""
    tokenizer = GPT2Tokenizer()
    data = TokenData(np.arange(400, dtype=np.uint16) % 50, np.arange(100, dtype=np.uint16) % 50)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=50257, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    )
    config = TrainingConfig(steps=2, seq_len=8, batch_size=2, sample_every=0)
    assert Trainer(model, tokenizer, data, config, tmp_path).run()
