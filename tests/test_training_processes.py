"""Several processes on one folder or one cache, and processes that are ended while they prepare."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from runs import SETTINGS, before_step, new_run

from fastlm import files
from fastlm.files import SUFFIX
from fastlm.text import find_files
from fastlm.tokenizer import GPT2Tokenizer
from fastlm.training import data, lock
from fastlm.training.command import start

HERE = Path(__file__).parent


def test_a_second_process_is_told_who_trains(text_folder, tmp_path):
    trainer = new_run(text_folder, tmp_path)
    trainer.train_step()
    trainer.save()
    settings = (tmp_path / "run.json").read_bytes()
    command = [sys.executable, "-m", "fastlm", "train", "--resume", str(tmp_path), "--steps=50"]
    second = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    assert second.returncode == 1
    assert f"process {os.getpid()} on " in second.stderr and "is training in" in second.stderr
    assert (tmp_path / "run.json").read_bytes() == settings
    assert trainer.run() and start({"resume": str(tmp_path)}).step == 10


def test_the_folder_is_free_after_a_run_and_after_an_error(text_folder, tmp_path):
    def free():
        with open(tmp_path / lock.NAME) as file:
            return files.lock(file.fileno())

    trainer = new_run(text_folder, tmp_path)
    assert free() is False
    assert trainer.run() and free()
    with pytest.raises(ValueError, match="holds a run already"):
        new_run(text_folder, tmp_path)
    assert free()


def test_two_runs_that_share_a_cache_both_prepare(text_folder, tmp_path, monkeypatch):
    """The second begins and ends while the first is half way through."""
    texts, tokenizer = find_files([text_folder]), GPT2Tokenizer()
    encode, second = data._encode, []

    def meanwhile(*arguments):
        pieces = encode(*arguments)
        yield next(pieces)
        monkeypatch.setattr(data, "_encode", encode)
        second.append(data.tokenize(texts, tokenizer, tmp_path, 0.1))
        yield from pieces

    monkeypatch.setattr(data, "_encode", meanwhile)
    first = data.tokenize(texts, tokenizer, tmp_path, 0.1)
    assert np.array_equal(first.train, second[0].train) and len(first.train) > 0
    assert np.array_equal(first.validation, second[0].validation)
    assert len(list(tmp_path.iterdir())) == 1


ENDED = """
import os, sys
from fastlm import cli
from fastlm.training import data
encode = data._encode
def ended(*arguments):
    pieces = encode(*arguments)
    yield next(pieces)
    os.kill(os.getpid(), int(sys.argv[1]))
    yield from pieces
data._encode = ended
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_ended_while_it_prepares_leaves_nothing_for_long(text_folder, tmp_path, number):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    command = ["train", str(text_folder), f"--out-dir={tmp_path}", *flags]
    ended = subprocess.run([sys.executable, "-c", ENDED, str(int(number)), *command], cwd=HERE)
    left = [path.name for path in tmp_path.rglob("*") if SUFFIX in path.name]
    if number == signal.SIGTERM:
        assert ended.returncode == 128 + number and left == []
    else:
        assert ended.returncode == -number and len(left) == 1
    with pytest.raises(FileNotFoundError, match=f"repeat the command .*fastlm train {text_folder}"):
        start({"resume": str(tmp_path)})
    assert new_run(text_folder, tmp_path).run()
    assert [path for path in tmp_path.rglob("*") if path.name.startswith(".")] == []


def test_a_process_killed_while_it_saves_leaves_nothing_for_long(text_folder, tmp_path):
    trainer = new_run(text_folder, tmp_path)
    trainer.train_step()
    trainer.save()
    left = tmp_path / "checkpoints" / f".step-00000002.abc{SUFFIX}"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    (tmp_path / f".log.csv.abc{SUFFIX}").mkdir()
    (tmp_path / "tokenizer" / f".vocab.json.abc{SUFFIX}").mkdir()
    resumed = start({"resume": str(tmp_path)})
    assert [path for path in tmp_path.rglob("*") if path.name.startswith(".")] == []
    before_step(resumed, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert not resumed.run() and start({"resume": str(tmp_path)}).step == 3
