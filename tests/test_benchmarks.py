"""The harness of the CPU's benchmarks: what is timed how often."""

import torch

from benchmarks import harness


def counted(counts, name):
    def call():
        counts[name] = counts.get(name, 0) + 1

    return call


def test_a_slow_call_is_made_once_and_stands_for_every_round(monkeypatch):
    counts: dict[str, int] = {}
    calls = {name: counted(counts, name) for name in ("ours", "torch", "slow")}
    monkeypatch.setattr(harness, "clean_caches", lambda: None)
    first = {"slow": 2 * harness.LONGEST_SECONDS}
    times = harness.interleave(calls, 4, first)
    assert counts == {"ours": 1 + 4, "torch": 1 + 4 + 2 * 4}
    assert times.keys() == {"ours", "torch", "torch, pooled", "slow"}
    assert all(len(t) == 4 for t in times.values())
    assert set(times["slow"]) == {2 * harness.LONGEST_SECONDS}


def test_a_row_with_a_slow_baseline(monkeypatch):
    """Its memory and its time are of one call."""
    monkeypatch.setattr(harness, "LONGEST_SECONDS", 0.0)
    counts: dict[str, int] = {}

    def baseline(x):
        counts["torch"] = counts.get("torch", 0) + 1
        return x * 2

    bench = harness.Bench(
        "double", "forward", "8", lambda dtype: (torch.randn(8, dtype=dtype),),
        lambda x: x + x, {"torch": baseline}, "copy", lambda width: 2 * 8 * width,
    )  # fmt: skip
    result = harness.run(bench, torch.float32, {"copy": 1e9}, rounds=3)
    assert counts["torch"] == 3  # in float64, in float32, and timed
    assert result.error == 0 and result.spread == 0 and result.ratios.keys() == {"torch"}
