"""Conformance: an independent code generator's kernels give right answers, and no false alarm."""

import pytest

from fastlm import emulator

from . import triton_cases
from .triton_cases import ARCHES, CASES, MODES, run


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)
def test_triton_kernel(case, arch, mode):
    assert run(case, arch, **MODES[mode]) <= 1


def test_late_wgmma():
    assert run(triton_cases.attention_forward, 90, late_wgmma=True) <= 1
    assert run(triton_cases.matmul_descriptors, 90, late_wgmma=True) <= 1


@pytest.mark.parametrize("case", [triton_cases.attention_forward, triton_cases.matmul_descriptors],
                         ids=lambda c: c.__name__)  # fmt: skip
def test_every_proxy_fence_is_needed(case, monkeypatch):
    """Triton's own fences satisfy the proxy check; without them each kernel is reported."""
    name = f"{case.__name__}_sm90"
    text = triton_cases.fixture(name)
    assert "fence.proxy.async" in text
    without = text.replace("fence.proxy.async.shared::cta;", ";")
    monkeypatch.setattr(triton_cases, "fixture", lambda _: without)
    with pytest.raises(emulator.KernelError, match=r"no fence\.proxy\.async"):
        run(case, 90)


@pytest.mark.parametrize("barrier", range(3))
def test_removed_barrier_is_a_race(barrier, monkeypatch):
    """Each of the three barriers that guard the two reductions of Triton's softmax is needed."""
    text = triton_cases.fixture("softmax_rows_sm80")
    parts = text.split("bar.sync \t0;")
    assert len(parts) > 3
    without = (
        "bar.sync \t0;".join(parts[: barrier + 1])
        + ";"
        + "bar.sync \t0;".join(parts[barrier + 1 :])
    )
    monkeypatch.setattr(triton_cases, "fixture", lambda _: without)
    with pytest.raises(emulator.KernelError, match="data race"):
        run(triton_cases.softmax, 80, races=True)
