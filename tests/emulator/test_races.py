"""Which races are raised, which are only listed, and how to list all or suppress one."""

import pytest
import torch

from fastlm import emulator
from fastlm.emulator.dataflow import uses
from fastlm.emulator.parser import parse

from .conftest import KERNELS
from .test_translation import ptx

SCHEDULES = ({}, {"schedule": "reverse"}, {"schedule": "random", "seed": 1})
SOURCE = (KERNELS / "races.cu").read_text().splitlines()
FIRST, SECOND = (
    f"races.cu:{next(i for i, line in enumerate(SOURCE, 1) if text in line)}"
    for text in ("// first", "// second")
)


@pytest.fixture
def triton_kernels(monkeypatch, tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    from . import replicated_kernels

    return replicated_kernels


def two_races(cuda, **options):
    kernel, y = cuda("races", **options)["two_races"], torch.zeros(64)
    return kernel, lambda: kernel[1, 64](y)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda o: o.get("schedule", "order"))
@pytest.mark.parametrize("arch", [80, 90])
def test_reads_of_replicated_threads_that_store_nothing_are_listed(triton_kernels, arch, schedule):
    """128 threads, 8 elements: 15 threads of 16 read what the first overwrites, and drop it."""
    x, cos, sin = torch.randn(3, 16), torch.randn(8), torch.randn(8)
    y = x.clone()
    launcher = emulator.triton_launcher(
        triton_kernels.rotate_in_place, arch, races=True, **schedule
    )
    launcher[(3,)](y, cos, sin, WIDTH=8)
    low, high = x[:, :8], x[:, 8:]
    torch.testing.assert_close(y, torch.cat([low * cos - high * sin, high * cos + low * sin], 1))
    assert {race.quiet for race in launcher.races} == {"the value that was read is not used"}
    assert all("replicated_kernels.py:" in race.where for race in launcher.races)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda o: o.get("schedule", "order"))
def test_reads_of_replicated_threads_that_are_stored_are_raised(triton_kernels, schedule):
    launcher = emulator.triton_launcher(triton_kernels.double_and_spread, races=True, **schedule)
    with pytest.raises(emulator.KernelError, match="data race on global memory") as error:
        launcher[(1,)](torch.ones(1), torch.zeros(128), WIDTH=128)
    assert "replicated_kernels.py:" in error.value.where


def test_all_races_are_listed_and_the_launch_ends(cuda):
    kernel, launch = two_races(cuda, races="all")
    with pytest.raises(emulator.KernelError, match="2 data races, and 0 that would not") as error:
        launch()
    assert [race.quiet for race in kernel.races] == [None, None]
    assert all(place in str(error.value) for place in (FIRST, SECOND))
    # Every thread's store races with the read of the thread of the other half.
    assert [race.times for race in kernel.races] == [64, 64]


def test_one_race_is_suppressed(cuda):
    kernel, launch = two_races(cuda, races=True, suppress=[FIRST])
    with pytest.raises(emulator.KernelError) as error:
        launch()
    assert SECOND in error.value.where and FIRST not in error.value.where
    assert [race.quiet for race in kernel.races] == ["suppressed"]


def test_suppressed_races_are_listed(cuda):
    kernel, launch = two_races(cuda, races=True, suppress=[FIRST, SECOND])
    launch()
    assert [race.quiet for race in kernel.races] == ["suppressed"] * 2


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda o: o.get("schedule", "order"))
def test_what_threads_of_another_block_have_stored_is_theirs(cuda, schedule):
    kernel = cuda("races", races=True, **schedule)["read_in_vain"]
    kernel[2, 32](torch.ones(2), torch.zeros(64))
    assert [race.quiet for race in kernel.races] == ["the value that was read is not used"]


def test_stores_of_one_value_are_listed(cuda):
    module = cuda("races", races=True)
    kernel = module["same_value"]
    kernel[1, 64](torch.zeros(1))
    (race,) = kernel.races
    assert race.quiet == "all stored the same value" and race.times == 63
    assert "not raised: all stored the same value" in str(race)
    kernel = module["no_race"]
    kernel[1, 64](torch.zeros(64))
    assert kernel.races == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"races": "some"}, "races: expected False, True or 'all', got 'some'"),
        ({"suppress": "races.cu:3"}, "suppress: expected a list"),
        ({"suppress": ["races.cu"]}, r"suppress: .*got \['races.cu'\]"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        emulator.Options(**options)


def test_a_place_without_instructions(cuda):
    with pytest.raises(ValueError, match=r"expected a line that has instructions, got races\.cu:1"):
        cuda("races", suppress=["races.cu:1"])


LOAD = "ld.global.u32 %r1, [%rd1];"
ELSEWHERE = (1 << 64) - 1


@pytest.mark.parametrize(
    "lines, stores",
    [
        ([], []),
        (["add.u32 %r2, %r1, 1;", "st.global.u32 [%rd2], %r2;"], [0]),
        (["st.shared.u32 [%rd2], %r3;", "@%p1 st.global.u32 [%rd2], %r1;"], [1]),
        (["A: mov.u32 %r3, %r2;", "mov.u32 %r2, %r1;", "st.global.u32 [%rd2], %r3;",
          "bra A;"], [0]),
        (["cvt.u64.u32 %rd3, %r1;", "st.global.u32 [%rd3], %r2;"], None),
        (["setp.eq.u32 %p1, %r1, 0;", "@%p1 bra A;", "A: mov.u32 %r2, 0;"], None),
        (["setp.eq.u32 %p1, %r1, 0;", "@%p1 st.global.u32 [%rd2], %r2;"], None),
        (["shfl.sync.idx.b32 %r2, %r1, 0, 31, -1;"], None),
        (["atom.global.add.u32 %r2, [%rd2], %r1;"], None),
        (["st.local.u32 [%rd2], %r1;"], None),
    ],
)  # fmt: skip
def test_what_uses_a_loaded_value(lines, stores):
    text = ptx("ld.param.u64 %rd1, [p];", LOAD, *lines)
    module = parse(text)
    masks, bits = uses(module, "k")
    line = next(i for i, code in enumerate(module.lines, 1) if LOAD in code)
    expected = ELSEWHERE if stores is None else sum([*bits.values()][i] for i in stores)
    assert masks[line] == expected
