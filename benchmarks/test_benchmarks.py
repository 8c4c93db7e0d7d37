"""The same rows under pytest-benchmark, for its storage and comparisons: pytest benchmarks
--benchmark-only.
"""

import pytest
import torch

from .harness import phase_call
from .rows import ROWS


@pytest.mark.parametrize("provider", ["ours", "torch"])
@pytest.mark.parametrize("bench", ROWS, ids=lambda b: f"{b.op}-{b.phase}")
def test_speed(benchmark, bench, provider):
    op = bench.ours if provider == "ours" else bench.baselines[provider]
    benchmark.group = f"{bench.op} {bench.phase} {bench.shape} float32"
    benchmark(phase_call(bench, op, bench.inputs(torch.float32)))
