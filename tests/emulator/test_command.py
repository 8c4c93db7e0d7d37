"""python -m fastlm.emulator, as a person uses it."""

import pytest

from fastlm.emulator.command import main

from .conftest import KERNELS


@pytest.fixture
def faults(cuda):
    """Path of a .cu file; the `cuda` fixture skips where nvcc is missing."""
    return str(KERNELS / "faults.cu")


def test_check_finds_a_missing_synchronisation(faults, capsys):
    status = main(["check", faults, "--kernel", "lanes_unsynchronized", "--block", "32", "f32[32]"])
    printed = capsys.readouterr().out
    assert status == 1
    assert "data race on shared memory" in printed and "faults.cu:" in printed


def test_check_passes_a_correct_kernel(faults, capsys):
    status = main(["check", faults, "--kernel", "lanes_synchronized", "--block", "32", "f32[32]"])
    assert status == 0
    assert "no fault found" in capsys.readouterr().out


def test_run_shows_results_and_counters(faults, capsys):
    command = [
        "run",
        faults,
        "--kernel",
        "counter_atomic",
        "--grid",
        "2",
        "--block",
        "64",
        "i32[1]",
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "i32[1]: [128]" in printed and "counts, not times" in printed and "atomic 128" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["x9[4]"], "type x9"),
        (["f32[4"], "no number and no tensor"),
        ([], "1 parameters, got 0"),
    ],
)
def test_usage_errors(faults, capsys, arguments, message):
    kernel = ["--kernel", "lanes_synchronized", "--block", "32"]
    assert main(["run", faults, *kernel, *arguments]) == 2
    assert message in capsys.readouterr().out
    assert main(["run", "missing.cu"]) == 2
