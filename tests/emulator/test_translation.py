"""Bad PTX, unknown instructions, wrong launches: errors that say what and where."""

import numpy as np
import pytest
import torch

from fastlm import emulator
from fastlm.emulator import build

HEAD = ".version 9.0\n.target sm_80\n.address_size 64\n"


def ptx(*body, parameters=".param .u64 p", head=HEAD):
    """A module of one kernel with a few registers."""
    lines = "\n".join(body)
    return (
        f"{head}.visible .entry k({parameters})\n{{\n.reg .pred %p<4>;\n.reg .b16 %h<4>;\n"
        f".reg .b32 %r<8>;\n.reg .b64 %rd<4>;\n.reg .f32 %f<8>;\n{lines}\nret;\n}}\n"
    )


def run(text, *arguments, **options):
    emulator.load(text, **options).kernel[1, 1](*arguments)


def test_unknown_instruction_is_named_with_its_line():
    with pytest.raises(emulator.TranslationError) as error:
        run(ptx("mov.u32 %r1, 0;", "frobnicate.b32 %r1, %r2;"), None)
    text = str(error.value)
    assert "PTX line 12" in text and "'frobnicate' is not known" in text
    assert "fastlm/emulator/translate/" in text and "frobnicate.b32 %r1, %r2" in text


@pytest.mark.parametrize(
    "line, modifier",
    [
        ("add.round_up.s32 %r1, %r2, %r3;", "round_up"),
        ("ld.global.compressed.b32 %r1, [%rd1];", "compressed"),
        ("cvt.rn.scaled.f32.s32 %f1, %r1;", "scaled"),
        ("mma.sync.aligned.m16n8k16.row.col.satfinite.f32.bf16.bf16.f32 "
         "{%f0, %f1, %f2, %f3}, {%r0, %r1, %r2, %r3}, {%r4, %r5}, {%f0, %f1, %f2, %f3};",
         "satfinite"),
    ],
)  # fmt: skip
def test_unknown_modifier_is_never_skipped(line, modifier):
    with pytest.raises(emulator.TranslationError, match=rf"modifier \.{modifier} of"):
        run(ptx(line), None)


@pytest.mark.parametrize(
    "line, message",
    [
        ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f0}, {%r0}, {%r1}, {%f0};", "tf32"),
        ("cvt.rn.satfinite.e4m3x2.f32 %h1, %f1, %f2;", "e4m3x2"),
        ("barrier.cluster.arrive;", "clusters"),
        ("add.s32 %r1, %nowhere, 1;", "%nowhere is not known"),
        ("bra NOWHERE;", "label NOWHERE"),
        ("atom.global.exch.f32 %f1, [%rd1], %f2;", "atomic exch of .f32"),
    ],
)
def test_what_is_not_emulated_is_refused(line, message):
    with pytest.raises(emulator.TranslationError, match=message):
        run(ptx(line), None)


BRANCHES = ptx(
    "JUMPS: .branchtargets FIRST, SECOND,\n FIRST;", "ld.param.u64 %rd1, [p];",
    "ld.global.u32 %r1, [%rd1];", "mov.u32 %r2, 0;", "brx.idx.uni %r1, JUMPS;",
    "FIRST: add.u32 %r2, %r2, 10;", "SECOND: add.u32 %r2, %r2, 1;", "st.global.u32 [%rd1], %r2;",
)  # fmt: skip


@pytest.mark.parametrize("index, expected", [(0, 11), (1, 1), (2, 11)])
def test_a_branch_by_index_takes_the_label_of_that_number(index, expected):
    x = torch.tensor([index], dtype=torch.int32)
    run(BRANCHES, x)
    assert x.item() == expected


def test_a_branch_by_index_past_the_table():
    with pytest.raises(emulator.KernelError, match="the index is not below 3"):
        run(BRANCHES, torch.tensor([3], dtype=torch.int32))
    with pytest.raises(emulator.TranslationError, match=r"NOWHERE is no \.branchtargets"):
        run(BRANCHES.replace("%r1, JUMPS", "%r1, NOWHERE"), None)


def test_addresses_of_parameters_fit_32_bits():
    """As LLVM keeps them for tensor maps, which it passes on as generic addresses."""
    text = ptx("mov.b32 %r1, n;", "cvt.u64.u32 %rd1, %r1;", "cvta.param.u64 %rd2, %rd1;",
               "ld.u32 %r2, [%rd2+4];", "ld.param.u32 %r3, [%rd1+8];", "add.u32 %r2, %r2, %r3;",
               "ld.param.u64 %rd1, [p];", "st.global.u32 [%rd1], %r2;",
               parameters=".param .u64 p, .param .align 4 .b8 n[12]")  # fmt: skip
    x = torch.zeros(1, dtype=torch.int32)
    run(text, x, np.array([1, 20, 300], dtype=np.int32).tobytes())
    assert x.item() == 320


def test_truncated_text_and_no_ptx():
    text = ptx("mov.u32 %r1, 0;")
    with pytest.raises(emulator.TranslationError, match="cut off"):
        emulator.load(text[: text.index("mov") + 5])
    with pytest.raises(emulator.TranslationError, match="no \\.version"):
        emulator.Module("not PTX at all")
    with pytest.raises(FileNotFoundError):
        emulator.load("missing.ptx")
    with pytest.raises(LookupError, match="0 kernels"):
        _ = emulator.load(HEAD).kernel


def test_a_kernel_that_is_not_used_may_be_unknown():
    """Kernels are translated when they are first run."""
    good = ptx("mov.u32 %r1, 0;")
    bad = ptx("frobnicate;", head="").replace("entry k(", "entry other(")
    module = emulator.load(good + bad)
    module["k"][1, 1](None)
    with pytest.raises(emulator.TranslationError):
        module["other"][1, 1](None)


def test_launches_that_no_gpu_would_accept():
    kernel = emulator.load(ptx()).kernel
    with pytest.raises(emulator.KernelError, match="2048 threads"):
        kernel[1, 2048](None)
    with pytest.raises(emulator.KernelError, match="grid is empty"):
        kernel[0, 32](None)
    with pytest.raises(emulator.KernelError, match="limit is 166912"):
        kernel[1, 32, 170_000](None)
    with pytest.raises(TypeError, match="must name a block"):
        kernel[1](None)
    with pytest.raises(TypeError, match="1 parameters, got 2"):
        kernel[1, 32](None, 3)


@pytest.mark.parametrize(
    "parameter, value, error",
    [
        (".param .u32 n", 2**33, OverflowError),
        (".param .u32 n", "text", TypeError),
        (".param .u64 n", 1.5, TypeError),
        (".param .align 4 .b8 n[12]", b"short", TypeError),
        (".param .align 4 .b8 n[12]", 5, TypeError),
    ],
)
def test_arguments_that_do_not_fit(parameter, value, error):
    with pytest.raises(error, match="parameter n"):
        run(ptx(parameters=parameter), value)


def test_options_are_checked():
    with pytest.raises(ValueError, match="schedule 'backwards'"):
        emulator.load(ptx(), schedule="backwards")
    with pytest.raises(ValueError, match="workers: expected at least 1, got 0"):
        emulator.load(ptx(), workers=0)
    with pytest.raises(ValueError, match="workers: expected 1 with races"):
        emulator.load(ptx(), workers=2, races=True)
    with pytest.raises(TypeError, match="bounds"):
        emulator.load(ptx(), bounds=False)


def test_missing_compilers_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    build._compiler.cache_clear()
    source = tmp_path / "k.cu"
    source.write_text("__global__ void k() {}")
    with pytest.raises(emulator.CompilerError, match="nvcc is not on the PATH"):
        emulator.load(source)
    with pytest.raises(emulator.CompilerError, match="g\\+\\+ is not installed"):
        run(ptx("mov.u32 %r1, 77;"), None)
    build._compiler.cache_clear()


def test_nothing_is_compiled_twice(monkeypatch):
    text = ptx("mov.u32 %r1, 5;")
    run(text, None)
    monkeypatch.setattr(build, "_start_compiler", lambda _: pytest.fail("compiled again"))
    run(text, None)
    run(text, None, schedule="reverse", late_copies=False)


def test_nvcc_errors_are_shown(cuda, tmp_path):
    source = tmp_path / "bad.cu"
    source.write_text("__global__ void k() { undeclared(); }")
    with pytest.raises(emulator.CompilerError, match="undeclared"):
        emulator.load(source)


def test_a_changed_include_is_compiled_again(cuda, tmp_path):
    header, source = tmp_path / "value.h", tmp_path / "k.cu"
    source.write_text('#include "value.h"\nextern "C" __global__ void k(int* y) { *y = VALUE; }')
    for value in (1, 2, 1):
        header.write_text(f"#define VALUE {value}\n")
        y = torch.zeros(1, dtype=torch.int32)
        emulator.load(source).kernel[1, 1](y)
        assert y.item() == value


def test_memory_that_was_not_given_is_out_of_bounds():
    store = ptx("ld.param.u64 %rd1, [p];", "mov.u32 %r1, 7;", "st.global.u32 [%rd1+4], %r1;")
    x = torch.zeros(4, dtype=torch.int32)
    run(store, x)
    assert x.tolist() == [0, 7, 0, 0]
    with pytest.raises(
        emulator.KernelError, match=r"4 bytes at byte 4 of argument 0 \(p\), which has 4"
    ):
        run(store, torch.zeros(1, dtype=torch.int32))
    # A raw address says nothing about its size: without `memory` the check is off, with it, on.
    run(store, x.data_ptr())
    with pytest.raises(emulator.KernelError, match="out of bounds"):
        run(store, x.data_ptr(), memory=(torch.zeros(1),))
