"""Kernels, variables and parameters by their names in the source; what an argument may be."""

import struct

import numpy as np
import pytest
import torch

from fastlm import emulator
from fastlm.emulator.source import capability

BF16 = torch.bfloat16


@pytest.fixture
def names(cuda):
    return cuda("names")


@pytest.mark.parametrize("name", ["scale", "_Z5scaleifPKfPf"])
def test_first_parameters_are_numbers(names, name):
    x, y = torch.ones(4), torch.zeros(4)
    names[name][1, 4](3, 2.5, x, y)
    assert y.tolist() == [2.5, 2.5, 2.5, 0]


@pytest.mark.parametrize(
    "name, expected",
    [("add<float, 3>", 3), ("add<float,3,false>", 3), ("add<float, 4, true>", 8)],
)
def test_kernel_of_a_template_as_the_source_has_it(names, name, expected):
    y = torch.zeros(2)
    names[name][1, 2](y, 2)
    assert y.tolist() == [expected] * 2


def test_scopes_may_be_left_out(names):
    for name in ("inner::count", "count"):
        names[name][1, 1](torch.zeros(1, dtype=torch.int32))
    y = torch.zeros(1, dtype=torch.float64)
    names["unnamed"][1, 1](2**40, y)
    assert y.item() == 2**40


def test_a_name_that_is_of_none_or_of_several(names):
    with pytest.raises(LookupError, match=r"kernel 'add': expected one of scale, .*got 4 of that"):
        names["add"]
    with pytest.raises(LookupError, match=r"'scal': .*add<float, 3, false>.*, got none"):
        names["scal"]
    with pytest.raises(LookupError, match=r"variable 'table': expected one .*inner::counter"):
        names.variable("table")


def test_a_template_that_the_file_makes_no_kernel_of(cuda, tmp_path):
    source = tmp_path / "fill.cu"
    source.write_text("template <int K> __global__ void fill(int* y) { y[threadIdx.x] = K; }")
    module = emulator.load(source, instantiate=["fill<7>"])
    y = torch.zeros(2, dtype=torch.int32)
    module["fill<7>"][1, 2](y)
    assert y.tolist() == [7, 7]
    with pytest.raises(emulator.CompilerError, match="undefined"):
        emulator.load(source, instantiate=["fill<unheard>"])


# ---- types


def wrong(match, error=TypeError):
    return pytest.raises(error, match=match)


def test_a_fraction_is_no_integer(names):
    with wrong(r"scale: parameter n: expected a \.u32 integer, got 3\.5"):
        names["scale"][1, 4](3.5, 1.0, torch.ones(4), torch.ones(4))
    with wrong("parameter n: expected int, got a tensor of torch.int32"):
        names["scale"][1, 4](torch.tensor(3, dtype=torch.int32), 1.0, *[torch.ones(4)] * 2)
    with wrong("unnamed: parameter n: expected long long, got a tensor"):
        names["unnamed"][1, 1](torch.tensor(3), torch.zeros(1, dtype=torch.float64))
    with wrong("parameter factor: expected a .f32 number, got 1e[+]300", OverflowError):
        names["scale"][1, 4](3, 1e300, torch.ones(4), torch.ones(4))


@pytest.mark.parametrize(
    "name, data, expected",
    [
        ("plain", torch.float16, "x: expected a tensor of float32 for float[*], got float16"),
        ("plain", torch.int32, "x: .* got int32"),
        ("made_by_a_macro", torch.float32, "x: expected a tensor of float64 for double[*]"),
        ("add<float, 3>", torch.float16, "y: expected a tensor of float32"),
        ("add<__half, 3>", BF16, "y: expected a tensor of float16 for __half[*], got bfloat16"),
        ("add<__nv_bfloat16, 3>", torch.float16, "y: expected a tensor of bfloat16"),
        ("inner::count", torch.int64, "y: expected a tensor of int32 for int[*], got int64"),
    ],
)
def test_data_of_another_type_is_refused(names, name, data, expected):
    kernel = names[name]
    rest = {"plain": (torch.zeros(4), 4), "inner::count": ()}.get(name, (1,))
    with wrong(f"parameter {expected}"):
        kernel[1, 1](torch.zeros(4, dtype=data), *rest)


def test_a_number_for_a_pointer(names):
    with wrong("parameter x: expected a tensor, got 1.5"):
        names["plain"][1, 1](1.5, torch.zeros(4), 4)


@pytest.mark.parametrize(
    "name, data", [("add<__half, 3>", torch.half), ("add<__nv_bfloat16, 3>", BF16)]
)
def test_halves_are_taken_as_such_and_as_their_bits(names, name, data):
    y = torch.ones(2, dtype=data)
    for view in (y, y.view(torch.int16), y.view(torch.uint8)):
        names[name][1, 2](view, 2)
    assert y.tolist() == [10, 10]


def test_numbers_of_numpy(names):
    y = torch.zeros(4)
    names["scale"][1, 4](np.int64(3), np.float32(1.5), np.ones(4, np.float32), y)
    assert y.tolist() == [1.5, 1.5, 1.5, 0]
    y = torch.zeros(1, dtype=torch.float64)
    names["unnamed"][1, 1](np.int64(5), y)  # and not the address of the number
    assert y.item() == 5


def test_a_struct_with_a_pointer(cuda):
    data = torch.zeros(1)
    half = struct.pack("e", 0.5)
    packed = struct.pack("Qi4x", data.data_ptr(), 3)
    cuda("names", memory=(data,))["by_struct"][1, 1](packed, half, 2, True)
    assert data.item() == 6.5
    with wrong("parameter pair: expected 16 bytes, got 12"):
        cuda("names")["by_struct"][1, 1](packed[:12], half, 2, True)


@pytest.mark.parametrize(
    "arch, expected",
    [(80, "80"), ("8.0", "80"), ("sm_80", "80"), ("compute_90", "90"), ("sm_90a", "90a"),
     (100, "100"), ("12.0", "120")],
)  # fmt: skip
def test_ways_to_write_an_architecture(arch, expected):
    assert capability(arch) == expected


def test_what_is_no_architecture(cuda):
    with pytest.raises(ValueError, match=r"arch: expected a compute capability.*got 'hopper'"):
        cuda("names", arch="hopper")


# ---- memory


@pytest.mark.parametrize(
    "view, outside",
    [
        (lambda x: x[:32], 32),
        (lambda x: x[32:], 32),
        (lambda x: x[::2], 63),
        (lambda x: x.view(8, 8)[:, :4], 60),
        (lambda x: x.view(8, 8)[:, 4:].t(), 60),
    ],
)
@pytest.mark.parametrize("make", [lambda x: x, lambda x: x.numpy()], ids=["torch", "numpy"])
def test_a_view_is_its_own_elements_alone(names, view, outside, make):
    """From its first to its last element; what else is in its storage is out of bounds."""
    x, y = torch.ones(64), torch.zeros(64)
    seen = view(x)
    names["plain"][1, 1](make(seen), y, outside)
    assert y.sum() == outside
    with pytest.raises(emulator.KernelError, match=r"out of bounds: .* argument 0 \(x\)"):
        names["plain"][1, 1](make(seen), y, outside + 1)


def test_an_array_that_runs_backwards(names):
    y, memory = torch.zeros(64), np.ones(8, np.float32)
    names["plain"][1, 1](memory[3::-1], y, 1)  # its first element lies last
    with pytest.raises(emulator.KernelError, match="byte 16 of argument 0"):
        names["plain"][1, 1](memory[3::-1], y, 2)


def test_memory_around_a_view_can_be_given(names):
    x, y = torch.ones(64), torch.zeros(64)
    names.with_options(memory=(x,))["plain"][1, 1](x[:32], y, 64)
    assert y.sum() == 64


def test_a_launch_whose_memory_is_empty_may_touch_none(names):
    with pytest.raises(emulator.KernelError, match="the launch has no buffer at all"):
        names["add<float, 3>"][1, 1](torch.zeros(0), 1)


# ---- variables


def counter_of(module):
    return struct.unpack("i", module.variable("counter"))[0]


def test_a_faulting_launch_leaves_the_variables_as_they_were(names):
    y = torch.zeros(1, dtype=torch.int32)
    names.variable("inner::counter")[:] = struct.pack("i", 5)
    names["trip"][1, 1](y, 0)
    with pytest.raises(emulator.KernelError, match="out of bounds"):
        names["trip"][1, 1](y, 1)
    assert (y.item(), counter_of(names)) == (6, 6)


def test_a_module_that_is_loaded_again_is_new(cuda):
    y = torch.zeros(1, dtype=torch.int32)
    first = cuda("names")
    first["trip"][1, 1](y, 0)
    assert (counter_of(first), counter_of(cuda("names"))) == (1, 0)


def test_variables_are_the_same_under_other_options(names):
    y = torch.zeros(1, dtype=torch.int32)
    names.variable("counter")[:] = struct.pack("i", 5)
    names.with_options(races=True)["trip"][1, 1](y, 0)
    names["trip"][1, 1](y, 0)
    assert (y.item(), counter_of(names)) == (7, 7)
