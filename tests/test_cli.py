"""The command line: each command as a user types it, in its own process where that matters."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastlm import cli
from fastlm.training.log import read

SMALL = [
    "--tokenizer=train",
    "--vocab-size=270",
    "--n-layer=1",
    "--n-head=2",
    "--n-embd=16",
    "--seq-len=16",
    "--batch-size=4",
    "--warmup-steps=2",
    "--eval-every=100",
    "--sample-every=0",
    "--save-every=100",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The --out-dir of four steps on a small text, run in this process."""
    folder = tmp_path_factory.mktemp("cli")
    text = folder / "text.txt"
    text.write_text("to be, or not to be: that is the question.\n" * 300, encoding="utf-8")
    assert cli.main(["train", str(text), f"--out-dir={folder / 'run'}", "--steps=4", *SMALL]) == 0
    return folder / "run"


def test_info_is_what_no_command_gives(capsys):
    # From another folder: the repository's must not be needed on the module path.
    told = subprocess.run(
        [sys.executable, "-m", "fastlm"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert told.returncode == 0, told.stderr
    assert "fastlm 0." in told.stdout and "layer_norm" in told.stdout
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out == told.stdout


def test_a_reader_that_has_gone_is_no_error():
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "fastlm", "info"]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert done.returncode == 128 + signal.SIGPIPE and done.stderr == ""


def test_resume_takes_the_settings_and_a_flag_wins(trained, capsys):
    assert cli.main(["train", "--resume", str(trained), "--steps=6"]) == 0
    assert "done after 6 steps" in capsys.readouterr().out
    assert [row["step"] for row in read(trained / "log.csv")] == ["4", "6"]
    assert cli.main(["train", "--resume", str(trained)]) == 0
    assert "done after 6 steps" in capsys.readouterr().out


def test_generate_streams_and_repeats(trained, capsys):
    command = ["generate", f"--model={trained}", "--prompt=to be", "--max-new-tokens=5"]
    texts = []
    for seed in (1, 1, 2):
        assert cli.main([*command, f"--seed={seed}", "--temperature=5"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("to be") and texts[0] == texts[1] != texts[2]
    assert cli.main([*command, "--temperature=0"]) == 0
    greedy = capsys.readouterr().out
    assert cli.main([*command, "--temperature=0", "--num-samples=2"]) == 0
    assert capsys.readouterr().out == f"--- 1\n{greedy}--- 2\n{greedy}"


def test_generate_reads_the_prompt_from_a_file(trained, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("not to", encoding="utf-8")
    options = [f"--model={trained}", "--max-new-tokens=3", "--seed=1"]
    assert cli.main(["generate", f"--prompt=FILE:{tmp_path / 'prompt.txt'}", *options]) == 0
    assert capsys.readouterr().out.startswith("not to")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["generate", "--model=./nowhere"], "nowhere: no such files"),
        (["train", "nowhere.txt"], "nowhere.txt: no such file or folder"),
        (["train"], "data: got nothing"),
        (["train", "--resume=nowhere"], "nowhere has no run.json"),
    ],
)
def test_errors_are_one_line(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastlm: error: ") and named in error and error.count("\n") == 1


def test_prompt_longer_than_the_model_is_named(trained, capsys):
    prompt = "--prompt=" + "question " * 40
    assert cli.main(["generate", f"--model={trained}", prompt]) == 1
    assert "n_positions = 16" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["train", "--colour=red"], ["paint"], ["info", "--all"]])
def test_unknown_flags_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(trained, tmp_path):
    text = trained.parent / "text.txt"
    process = subprocess.Popen(
        [sys.executable, "-m", "fastlm", "train", str(text), f"--out-dir={tmp_path}",
         "--steps=1000000", *SMALL],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=Path(__file__).parent,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not read(tmp_path / "log.csv"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"go on with: fastlm train --resume {tmp_path}" in told
    steps = [int(row["step"]) for row in read(tmp_path / "log.csv")]
    assert cli.main(["train", "--resume", str(tmp_path), f"--steps={steps[-1] + 1}"]) == 0


def test_bench_without_the_repository_says_where_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "fastlm" / "cli.py"))
    assert cli.main(["bench", "--quick"]) == 1
    assert "make bench" in capsys.readouterr().err
