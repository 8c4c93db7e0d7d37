"""A CUDA extension, host code and all, on the CPU."""

import pathlib
import shutil

import pytest
import torch

from fastlm import emulator

SOURCE = pathlib.Path(__file__).parent / "kernels" / "extension.cu"
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")


def build(*flags, **options):
    return emulator.extension([SOURCE], name="scaling", flags=flags, **options)


def call(module, n=300, room=300):
    x, y = torch.randn(n), torch.empty(room)
    module.scale(y, x, n, 2.5)
    return x, y


def test_host_code_launches_kernels():
    module = build()
    x, y = call(module)
    assert torch.equal(y, x * 2.5)
    (launch,) = module.launches
    assert (launch.grid, launch.block, launch.counters) == ((3, 1, 1), (128, 1, 1), None)
    assert module.scale.__doc__ == "y = x * factor"


def test_fault_is_raised_by_the_call_and_names_the_argument():
    module = build()
    with pytest.raises(emulator.KernelError, match=r"write out of bounds.* argument 0 of scale"):
        call(module, n=300, room=299)
    call(module)  # the fault is forgotten


def test_two_of_one_library_have_launches_and_faults_of_their_own():
    first, second = build(), build(counters=True)
    call(first)
    with pytest.raises(emulator.KernelError, match="write out of bounds"):
        call(first, room=299)
    assert not second.launches
    call(second)
    assert second.launches[0].counters.global_written == 4 * 300


def test_view_is_its_own_elements_alone():
    """Memory around a view belongs to the same storage, and is out of bounds all the same."""
    module, storage = build(), torch.empty(400)
    with pytest.raises(emulator.KernelError, match="out of bounds"):
        module.scale(storage[:299], torch.randn(300), 300, 2.5)


def test_defaults_hold_inside_their_block():
    module = build("-DRACE")
    call(module)
    with (
        emulator.defaults(races=True),
        pytest.raises(emulator.KernelError, match="data race on shared memory"),
    ):
        call(module)
    with emulator.defaults(counters=True):
        call(module)
    assert module.launches[0].counters.global_written == 4 * 300
    with pytest.raises(ValueError, match="schedule"), emulator.defaults(schedule="backwards"):
        pass
    call(module)
    assert module.launches[0].counters is None


def test_missing_runtime_function_is_named():
    with pytest.raises(ImportError, match="calls cudaProfilerStart, which the emulator has not"):
        build("-DUNKNOWN", "-include", "cuda_profiler_api.h")


def test_compiler_errors_are_shown(tmp_path):
    broken = tmp_path / "broken.cu"
    broken.write_text("int x = ;\n")
    with pytest.raises(emulator.CompilerError, match="expected an expression"):
        emulator.extension([broken], name="broken")
