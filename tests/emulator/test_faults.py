"""Every detector fires on a planted fault, says where, and is silent on the correct sister."""

import pytest
import torch

from fastlm import emulator

from .fault_cases import FAULTS, WRONG_NUMBERS
from .test_fused_kernels import run_attention
from .test_hopper import run_gemm


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.found], ids=lambda f: f.name)
def test_fault_is_found(cuda, fault):
    with pytest.raises(emulator.KernelError, match=fault.found) as error:
        fault.launch(cuda, **fault.options)
    assert "stack overflow" in str(error.value) or ".cu:" in error.value.where
    assert error.value.block is not None


@pytest.mark.parametrize("fault", [f for f in FAULTS if not f.found], ids=lambda f: f.name)
def test_correct_sister_passes(cuda, fault):
    fault.launch(cuda, **fault.options)


@pytest.mark.parametrize("name, kernel, options", WRONG_NUMBERS, ids=lambda x: str(x))
def test_fault_spoils_the_numbers(cuda, name, kernel, options):
    o, truth = run_attention(cuda("attention", **options), kernel, 1, 200)
    assert not (o.double() - truth).abs().max() < 0.1


def test_reading_accumulators_before_the_wait_gives_nan(cuda):
    """Refilling a buffer that late wgmma still reads, or reading sums too early, shows as NaN."""
    c, truth = run_gemm(cuda, "hopper_early_refill", late_wgmma=True)
    assert not (c - truth).abs().max() < 0.1


def test_refilling_what_a_product_still_reads_is_a_race(cuda):
    with pytest.raises(emulator.KernelError, match=r"data race on .* read by wgmma of threads 0"):
        run_gemm(cuda, "hopper_early_refill", late_wgmma=True, late_copies=False, races=True)
    run_gemm(cuda, late_wgmma=True, races=True)


def test_an_error_leaves_the_process_and_the_next_launch_intact(cuda):
    module = cuda("faults")
    for _ in range(3):
        with pytest.raises(emulator.KernelError, match="stack overflow"):
            module["endless_recursion"][1, 1](torch.zeros(1, dtype=torch.int32))
    count = torch.zeros(1, dtype=torch.int32)
    module["counter_atomic"][2, 64](count)
    assert count.item() == 128


def test_the_text_of_an_error(cuda):
    with pytest.raises(emulator.KernelError) as error:
        cuda("faults", races=True)["lanes_unsynchronized"][1, 32](torch.zeros(32))
    text = str(error.value)
    assert text.startswith("lanes_unsynchronized: data race on shared memory: ")
    assert text.count("faults.cu:") == 2 and "st.shared.f32" in text and "ld.shared.f32" in text
    assert "in block (0, 0, 0), thread (" in text and "look at: the barrier" in text
