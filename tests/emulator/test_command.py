"""python -m fastlm.emulator, as a person uses it."""

import numpy as np
import pytest

from fastlm.emulator.command import main
from fastlm.emulator.written_arguments import Argument, UsageError

from .conftest import KERNELS


@pytest.fixture
def path(cuda):
    """path("faults"): a .cu file; the `cuda` fixture skips where nvcc is missing."""
    return lambda name: str(KERNELS / f"{name}.cu")


@pytest.fixture
def command(path, capsys):
    """command("run", "faults", "kernel", *more): (exit status, what it printed) with 32 threads."""

    def call(action, name, kernel, *more):
        status = main([action, path(name), "--kernel", kernel, "--block", "32", *more])
        return status, capsys.readouterr().out

    return call


def test_check_finds_a_missing_synchronisation(command):
    status, printed = command("check", "faults", "lanes_unsynchronized", "f32[32]")
    assert status == 1
    assert "data race on shared memory" in printed and "faults.cu:" in printed


def test_check_passes_a_correct_kernel(command):
    status, printed = command("check", "faults", "lanes_synchronized", "f32[32]")
    assert status == 0 and "no fault found" in printed


def test_check_reports_a_read_of_an_empty_tensor(command):
    status, printed = command("check", "faults", "adds_to", "f32[32]=empty", "f32[32]")
    assert status == 1 and "memory that nobody has written" in printed
    status, _ = command("check", "faults", "stores_to", "f32[32]=empty", "f32[32]")
    assert status == 0


def test_races_are_listed_and_suppressed(command):
    status, printed = command("check", "races", "two_races", "--block", "64", "f32[64]", "--all")
    assert status == 1 and printed.count("data race on shared") == 2
    lines = ["--suppress", "races.cu:8", "--suppress", "races.cu:9"]
    status, printed = command("check", "races", "two_races", "--block", "64", "f32[64]", *lines)
    assert status == 0 and "2 races that change nothing or are suppressed" in printed
    status, printed = command("check", "races", "same_value", "f32[1]", "--all")
    assert status == 0 and "not raised: all stored the same value" in printed


def test_run_shows_results_and_counters(command):
    status, printed = command("run", "faults", "counter_atomic", "--grid", "4", "i32[1]")
    assert status == 0
    assert "i32[1]: [128]" in printed and "counts, not times" in printed and "atomic 128" in printed


def test_a_fault_in_a_run(command):
    status, printed = command("run", "faults", "stores_to", "f32[31]", "f32[32]")
    assert status == 1 and "out of bounds: 4 bytes at byte 124 of argument 0 (p)" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["x9[4]"], "expected one of the types f16, bf16"),
        (["f32[4"], "expected a number or a tensor"),
        (["12@y.npy"], "expected a tensor before @"),
        (["i8[4]=300"], "expected an integer that fits i8, got 300"),
        (["i32[4]=1.5"], "expected an integer that fits i32, got 1.5"),
        ([], "1 parameters, got 0"),
        (["f16[32]"], "parameter p: expected a tensor of float32 for float*, got float16"),
        (["bf16[32]"], "parameter p: expected a tensor of float32 for float*, got uint16"),
        (["f32[32]", "--block", "2048"], "the block has 2048 threads"),
        (["f32[32]", "--arch", "hopper"], "arch: expected a compute capability"),
    ],
)
@pytest.mark.parametrize("action", ["run", "check"])
def test_usage_errors(command, action, arguments, message):
    status, printed = command(action, "faults", "lanes_synchronized", *arguments)
    assert status == 2 and printed.startswith("error: ") and message in printed


def test_a_fraction_for_an_integer(command):
    numbers = ("2.5", "f32[32]", "f32[32]")
    status, printed = command("run", "names", "scale", "3.5", *numbers)
    assert status == 2 and "scale: parameter n: expected a .u32 integer, got 3.5" in printed


def test_a_file_that_is_not_there(capsys):
    assert main(["run", "missing.cu"]) == 2
    assert "no such file" in capsys.readouterr().out


def test_options_of_the_other_action(path):
    for action, option in (("run", "--all"), ("check", "--schedule=order")):
        with pytest.raises(SystemExit) as error:
            main([action, path("races"), option])
        assert error.value.code == 2


@pytest.mark.parametrize("action", ["run", "check"])
def test_what_the_compiler_refuses_is_no_fault(cuda, tmp_path, capsys, action):
    source = tmp_path / "bad.cu"
    source.write_text("__global__ void k() { undeclared(); }")
    assert main([action, str(source), "--block", "1"]) == 2
    printed = capsys.readouterr().out
    assert "FAULT" not in printed and 'identifier "undeclared" is undefined' in printed


def test_an_unknown_instruction_is_no_fault(tmp_path, capsys):
    from .test_translation import ptx

    source = tmp_path / "unknown.ptx"
    source.write_text(ptx("frobnicate;"))
    assert main(["check", str(source), "--block", "1", "0"]) == 2
    printed = capsys.readouterr().out
    assert "FAULT" not in printed and "'frobnicate' is not known" in printed


# ---- sources and arguments


def test_headers_and_definitions(cuda, tmp_path, capsys):
    folder = tmp_path / "include"
    folder.mkdir()
    (folder / "added.h").write_text("#define ADDED 40\n")
    source = tmp_path / "k.cu"
    source.write_text('#include "added.h"\n__global__ void k(int* y) { *y = ADDED + MORE; }')
    flags = ["-I", str(folder), "-D", "MORE=2", "--arch", "sm_80"]
    assert main(["run", str(source), "--block", "1", *flags, "i32[1]"]) == 0
    assert "i32[1]: [42]" in capsys.readouterr().out


def test_a_kernel_of_a_template(cuda, command, tmp_path, capsys):
    status, printed = command("run", "names", "add<float, 3>", "f32[2]=1", "2")
    assert status == 0 and "f32[2]=1: [4. 4.]" in printed
    source = tmp_path / "fill.cu"
    source.write_text("template <int K> __global__ void fill(int* y) { y[threadIdx.x] = K; }")
    assert main(["run", str(source), "--kernel", "fill<7>", "--block", "2", "i32[2]"]) == 0
    assert "[7 7]" in capsys.readouterr().out


def test_files_in_and_out(command, tmp_path):
    x, y = tmp_path / "x.npy", tmp_path / "y.npy"
    np.save(x, np.arange(32, dtype=np.float32))
    arguments = ["32", "2", str(x), f"f32[32]=0@{y}"]
    status, printed = command("run", "names", "scale", *arguments)
    assert status == 0 and f"{x}: [0. 1. 2." in printed
    assert np.load(y).tolist() == [2 * i for i in range(32)]
    status, printed = command("run", "names", "scale", "32", "1", f"f32[32]={x}", "f32[32]=0")
    assert status == 0 and "f32[32]=0: [0. 1. 2." in printed
    status, printed = command("run", "names", "scale", "32", "1", f"f32[4]={x}", "f32[32]")
    assert status == 2 and "expected f32[4] in" in printed


def test_bfloat16_is_printed_and_saved_as_numbers(command, tmp_path):
    y = tmp_path / "y.npy"
    arguments = [f"bf16[2]=0.3@{y}", "1"]
    status, printed = command("run", "names", "add<__nv_bfloat16, 3>", *arguments)
    # 0.3 and 3.3 to the nearest of the numbers with 8 bits: steps of 2^-9 and of 2^-6.
    expected = [round((154 / 512 + 3) * 64) / 64, 154 / 512]
    assert status == 0 and f": [{expected[0]:.8g}" in printed.replace("0.30078125]", "")
    assert np.load(y).tolist() == expected


def test_a_struct_with_a_pointer(command):
    arguments = ["{f32[1]=0,i32:3}", "f16:0.5", "2", "true"]
    status, printed = command("run", "names", "by_struct", "--block", "1", *arguments)
    assert status == 0 and "f32[1]=0: [6.5]" in printed
    arguments[0] = "{f32[1]=0,i32:3,i64:0}"
    status, printed = command("run", "names", "by_struct", "--block", "1", *arguments)
    assert status == 2 and "parameter pair: expected 16 bytes, got 24" in printed
    status, printed = command(
        "run", "names", "by_struct", "--block", "1", "{f32[0],3}", *arguments[1:]
    )
    assert status == 1 and "the launch has no buffer at all" in printed


@pytest.mark.parametrize(
    "text, expected",
    [
        ("5", 5), ("-1", -1), ("0x10", 16), ("3.5", 3.5), ("1e3", 1000.0), ("true", True),
        ("i8:-2", b"\xfe"), ("u16:1", b"\1\0"), ("i64:1", b"\1" + bytes(7)),
        ("f64:1", bytes(6) + b"\xf0\x3f"), ("f16:1", b"\0\x3c"), ("bf16:1", b"\x80\x3f"),
        ("bool:true", b"\1"), ("{i8:1,i32:2,i8:3}", b"\1\0\0\0\2\0\0\0\3\0\0\0"),
        ("{1,2.0}", b"\1\0\0\0\0\0\0\x40"),
    ],
)  # fmt: skip
def test_numbers_and_structs(text, expected):
    assert Argument(text, None).value == expected


@pytest.mark.parametrize(
    "text, dtype, expected",
    [
        ("u32[3]=arange", "uint32", [0, 1, 2]), ("i64[1,2]=-3", "int64", [[-3, -3]]),
        ("bool[2]=true", "bool", [True, True]), ("f64[1]=0.5", "float64", [0.5]),
        ("i16[2]", "int16", [0, 0]), ("f32[]=2", "float32", 2),
        # 1.00390625 and 1.01171875 lie between two numbers of bfloat16: the even one is taken.
        ("bf16[1]=1.00390625", "uint16", [0x3F80]), ("bf16[1]=1.01171875", "uint16", [0x3F82]),
        ("bf16[1]=nan", "uint16", [0x7FC0]),
    ],
)  # fmt: skip
def test_tensors(text, dtype, expected):
    array = Argument(text, np.random.default_rng(0)).value
    assert array.dtype == dtype and array.tolist() == expected
    assert array.ctypes.data % 256 == 0


def test_files_of_types_that_kernels_have_not(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.zeros(2, np.complex64))
    with pytest.raises(UsageError, match="got complex64"):
        Argument(str(path), None)
