"""Reads of global memory that neither the host nor a kernel has written."""

import numpy as np
import pytest
import torch

from fastlm import emulator

from . import test_extension

UNWRITTEN = "global memory that nobody has written"


@pytest.fixture
def faults(cuda):
    return cuda("faults", uninitialized=True)


def empty(n=8):
    return emulator.unwritten(torch.empty(n))


@pytest.mark.parametrize(
    "kernel, arguments", [("adds_to", (torch.ones(8),)), ("counts_in", ())], ids=["add", "atomic"]
)
def test_reading_what_is_to_be_changed_is_a_fault(faults, kernel, arguments):
    with pytest.raises(emulator.KernelError, match=UNWRITTEN):
        faults[kernel][1, 8](empty(), *arguments)


def test_what_one_launch_has_written_the_next_may_read(faults):
    y = empty()
    faults["stores_to"][1, 6](y, torch.ones(8))
    faults["adds_to"][1, 6](y, torch.ones(8))
    assert y[:6].tolist() == [2] * 6
    with pytest.raises(emulator.KernelError, match=rf"{UNWRITTEN}: 4 bytes at byte 24 of arg"):
        faults["adds_to"][1, 7](y, torch.ones(8))


def test_what_the_host_fills_is_written(faults):
    y = empty().zero_()
    faults["adds_to"][1, 8](y, torch.ones(8))
    assert y.tolist() == [1] * 8


def test_a_view_of_unwritten_memory_is_unwritten(faults):
    y = empty()
    with pytest.raises(emulator.KernelError, match=UNWRITTEN):
        faults["adds_to"][1, 4](y[4:], torch.ones(8))


def test_memory_that_only_an_address_names(faults):
    y = empty()
    with pytest.raises(emulator.KernelError, match=f"{UNWRITTEN}: 4 bytes at address 0x"):
        faults["adds_to"][1, 4](y.data_ptr(), torch.ones(8))


def test_an_array_of_numpy(faults):
    y = emulator.unwritten(np.zeros(8, np.float32))
    with pytest.raises(emulator.KernelError, match=UNWRITTEN):
        faults["adds_to"][1, 8](y, torch.ones(8))


def test_a_launch_without_the_detector_ends_the_mark(faults):
    y = empty()
    faults.with_options(uninitialized=False)["stores_to"][1, 8](y, torch.ones(8))
    faults["adds_to"][1, 8](y, torch.ones(8))
    assert y.tolist() == [2] * 8


def test_marks_end_with_their_tensors(faults):
    """Memory that another tensor gets afterwards is that one's."""
    x = torch.ones(8)
    for _ in range(20):
        empty()
        faults["adds_to"][1, 8](torch.zeros(8), x)


def test_memory_that_host_code_allocates(faults):
    """cudaMalloc gives unwritten memory; cudaMemset, cudaMemcpy and kernels write it."""
    module = test_extension.build(uninitialized=True)
    x = torch.randn(300)
    for how in range(3):
        y = torch.empty(300)
        module.through_workspace(y, x, 300, how)
        assert torch.equal(y, (x, torch.zeros(300), x)[how])
    with pytest.raises(emulator.KernelError, match=f"{UNWRITTEN}.*allocation 0"):
        module.through_workspace(torch.empty(300), x, 300, 3)


def test_tensor_copies_write_and_read():
    pytest.importorskip("triton", reason="Triton is not installed")
    from .test_triton_launcher import described, gluon_kernel

    launcher = emulator.triton_launcher(gluon_kernel(), arch=90, uninitialized=True)
    x = torch.randn(64, 64).bfloat16()
    y = emulator.unwritten(torch.empty_like(x))
    launcher[(1,)](described(x, 16), described(y, 16), 4, num_warps=4)
    assert torch.equal(y, x + x)
    z = torch.empty_like(x)
    launcher[(1,)](described(y, 16), described(z, 16), 4, num_warps=4)
    assert torch.equal(z, y + y)
    with pytest.raises(emulator.KernelError, match=UNWRITTEN):
        launcher[(1,)](described(emulator.unwritten(z), 16), described(y, 16), 4, num_warps=4)
