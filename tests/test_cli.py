"""The command line: each command as a user types it, in its own process where that matters."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastlm import cli
from fastlm.models import GPT2LMHeadModel
from fastlm.tokenizer import GPT2Tokenizer
from fastlm.training.checkpoint import newest
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
        (["train"], "data: expected text files and folders, got nothing"),
        (["train", "--resume=nowhere"], "nowhere has no run.json"),
    ],
)
def test_errors_are_one_line(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastlm: error: ") and named in error and error.count("\n") == 1


@pytest.mark.parametrize("more", [["--prompt=" + "question " * 40], ["--max-new-tokens=17"]])
def test_past_the_models_context_is_named_and_slides(trained, capsys, more):
    command = ["generate", f"--model={trained}", "--max-new-tokens=5", "--temperature=0", *more]
    assert cli.main(command) == 1
    error = capsys.readouterr().err
    assert "n_positions = 16" in error and "--context slide" in error
    assert cli.main([*command, "--context=slide"]) == 0
    model, tokenizer = (
        c.from_pretrained(newest(trained)) for c in (GPT2LMHeadModel, GPT2Tokenizer)
    )
    prompt = "question " * 40 if "--prompt" in more[0] else ""
    ids = tokenizer.encode(prompt) or [tokenizer.bos_token_id]
    new = 5 if prompt else 17
    ids = model.generate(torch.tensor([ids]), max_new_tokens=new, context="slide")[0]
    assert (
        capsys.readouterr().out.strip() == tokenizer.decode(ids, skip_special_tokens=True).strip()
    )


@pytest.mark.parametrize(
    ("device", "named"),
    [
        ("foo", "expected cpu, cuda, cuda:1 or another of torch's, got 'foo'"),
        ("meta", "expected cpu, cuda, cuda:1 or another of torch's, got 'meta'"),
        ("cuda:x", "expected cpu, cuda, cuda:1 or another of torch's, got 'cuda:x'"),
        ("cpu:7", "expected one that torch finds on this machine, got 'cpu:7'"),
        ("cuda:99", "expected one that torch finds on this machine, got 'cuda:99'"),
        ("mps:99", "expected one that torch finds on this machine, got 'mps:99'"),
    ],
)
@pytest.mark.parametrize("command", ["train", "generate"])
def test_devices_that_are_not_here_are_one_line(trained, tmp_path, command, device, named, capsys):
    files = [f"--model={trained}"]
    if command == "train":
        files = [str(trained.parent / "text.txt"), f"--out-dir={tmp_path}"]
    assert cli.main([command, *files, f"--device={device}"]) == 1
    error = capsys.readouterr().err
    assert f"fastlm: error: {command}: device: {named}" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--num-samples=-1", "num_samples: expected >= 1, got -1"),
        ("--max-new-tokens=0", "max_new_tokens: expected >= 1, got 0"),
        ("--temperature=nan", "temperature: expected 0 or >= 1e-6, finite, got nan"),
        ("--temperature=inf", "temperature: expected 0 or >= 1e-6, finite, got inf"),
        ("--temperature=-1", "temperature: expected 0 or >= 1e-6, finite, got -1.0"),
        ("--temperature=1e-40", "temperature: expected 0 or >= 1e-6, finite, got 1e-40"),
        ("--top-k=-1", "top_k: expected >= 0, got -1"),
        ("--top-p=nan", "top_p: expected 0 < top_p <= 1, got nan"),
        ("--seed=-1", "seed: expected 0 to 18446744073709551615, got -1"),
        (f"--seed={2**64}", "seed: expected 0 to 18446744073709551615"),
    ],
)
def test_senseless_numbers_are_named(trained, flag, named, capsys):
    assert cli.main(["generate", f"--model={trained}", flag]) == 1
    assert f"fastlm: error: generate: {named}" in capsys.readouterr().err


def test_the_largest_seed_draws(trained, capsys):
    largest = f"--seed={2**64 - 2}"
    command = ["generate", f"--model={trained}", "--max-new-tokens=3", "--num-samples=2", largest]
    assert cli.main(command) == 0
    assert "--- 2" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--top-k=5", "--top-p=0.5", "--seed=1"])
def test_flags_without_effect_on_greedy_text_are_told(trained, flag, capsys):
    command = ["generate", f"--model={trained}", "--max-new-tokens=3", "--temperature=0"]
    assert cli.main(command) == 0
    greedy = capsys.readouterr()
    assert greedy.err == ""
    assert cli.main([*command, flag]) == 0
    told = capsys.readouterr()
    assert told.out == greedy.out
    assert f"warning: {flag.partition('=')[0]} has no effect with --temperature 0" in told.err


def test_a_file_without_words_to_block_is_named(trained, tmp_path, capsys):
    (tmp_path / "words.txt").write_text("\n \n")
    command = ["generate", f"--model={trained}", f"--block-words={tmp_path / 'words.txt'}"]
    assert cli.main(command) == 1
    assert "words.txt: expected words, got none" in capsys.readouterr().err


def test_a_name_that_the_hub_cannot_be_asked_for_fails_at_once(trained, monkeypatch, capsys):
    """huggingface_hub asks six times for each of four files, and sleeps in between."""

    def no_sleep(seconds):
        raise AssertionError(f"asked again after {seconds} s")

    # Nothing listens at a port that was free a moment ago.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        hub = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub)
    monkeypatch.setattr("time.sleep", no_sleep)
    monkeypatch.chdir(trained.parent)
    for command in (["train", "text.txt", "--tokenizer=nosuch", "--out-dir=new"],
                    ["generate", "--model=nosuch"]):  # fmt: skip
        assert cli.main(command) == 1
        error = capsys.readouterr().err
        assert "nosuch: no such folder, and none of" in error and error.count("\n") == 1
        assert f"{hub} cannot be reached" in error


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
    step = int(newest(tmp_path).name.removeprefix("step-"))
    assert cli.main(["train", "--resume", str(tmp_path), f"--steps={step + 1}"]) == 0


def test_bench_without_the_repository_says_where_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "fastlm" / "cli.py"))
    assert cli.main(["bench", "--quick"]) == 1
    assert "make bench" in capsys.readouterr().err
