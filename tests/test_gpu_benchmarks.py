"""The GPU's benchmarks without a GPU: what is declared fits, and the harness does what it says."""

from dataclasses import replace

import pytest
import torch

from benchmarks import gpu, gpu_rows
from benchmarks.harness import phase_call

SMALL = (
    gpu_rows.attention("forward", 2, 2, 40, 16),
    gpu_rows.norm("add_layer_norm", "backward", 8, 32),
    gpu_rows.cross_entropy(8, 50),
    gpu_rows.decoding(2, 16, 2, 8),
)


@pytest.fixture
def untimed(monkeypatch):
    """Every call is made, on the CPU, and takes a millisecond."""
    use = gpu.using
    monkeypatch.setattr(gpu, "using", lambda name, op: use("torch", op))
    monkeypatch.setattr(gpu, "milliseconds", lambda call, flush: call() and 1.0)
    monkeypatch.setattr(gpu, "host_microseconds", lambda call: call() and 5.0)


@pytest.mark.parametrize("bench", gpu_rows.GPU_ROWS, ids=lambda b: f"{b.op}-{b.phase}-{b.shape}")
def test_rows_fit(bench):
    """Ours takes what torch takes and gives as much, at the row's own size."""
    with torch.device("meta"):
        inputs = bench.inputs(torch.bfloat16)
    ours, theirs = (
        phase_call(bench, op, inputs)() for op in (bench.ours, bench.baselines["torch"])
    )
    assert [t.shape for t in ours] == [t.shape for t in theirs]
    assert bench.work(2) > 0


def test_every_kernel_of_a_gpu_is_measured():
    found = gpu.providers(SMALL[0], torch.bfloat16)
    assert {"fastlm cuda", "fastlm gluon", "fastlm triton"} < found.keys()


@pytest.mark.parametrize("bench", SMALL, ids=lambda b: b.op)
def test_row(bench, untimed):
    row = gpu.run(bench, torch.float32, 3, None, "cpu")
    assert {"torch", "fastlm cuda", "fastlm triton"} <= row["milliseconds"].keys()
    assert set(row["times faster than torch"].values()) == {1.0}
    text = gpu.markdown([row], {}, {"copy GB/s": 1000, "gemm bfloat16 TFLOP/s": 100})
    assert f"| {bench.op} {bench.phase} {bench.shape} | float32 | fastlm cuda | 1.0000 |" in text


def test_wrong_kernel_is_not_timed(untimed):
    ours = SMALL[0].ours
    row = gpu.run(replace(SMALL[0], ours=lambda *t: 1.1 * ours(*t)), torch.float32, 1, None, "cpu")
    assert "fastlm cuda" not in row["milliseconds"]
    assert row["skipped"]["fastlm cuda"].startswith("wrong: error")


def test_kernel_that_cannot_run_says_why(monkeypatch, untimed):
    def refuse(name, op):
        def call(*inputs):
            raise RuntimeError(f"{name}: out of memory")

        return call

    monkeypatch.setattr(gpu, "using", refuse)
    row = gpu.run(SMALL[0], torch.float32, 1, None, "cpu")
    assert row["skipped"]["fastlm triton"] == "RuntimeError: triton: out of memory"
