"""Each instruction on special and random values: against the ISA, and a GPU if there is one."""

import numpy as np
import pytest

from fastlm import emulator
from fastlm.emulator.types import type_bytes

from .cuda_driver import Driver
from .instruction_rows import ROWS
from .instruction_table import DTYPES, LANES

SPECIAL_FLOATS = [0.0, -0.0, 1.0, -1.5, 0.5, 2.5, -2.5, np.inf, -np.inf, np.nan, 1e-40, -1e-40,
                  255.5, 3e38, -3e38, 65520.0, 2.0**31, 1 + 2.0**-8, 1 + 3 * 2.0**-8]  # fmt: skip
SPECIAL_INTEGERS = [
    0,
    1,
    2,
    31,
    32,
    33,
    0x7FFFFFFF,
    -1,
    -2,
    -0x80000000,
    0x3210,
    0x7654,
    0xBA98,
    127,
    128,
]


def inputs(kind, position):
    """32 values of a type; the three operands get different orders of the special ones."""
    generator = np.random.default_rng(position)
    dtype = DTYPES[kind]
    if kind in ("f16x2", "bf16x2", "bf16"):
        values = np.array(SPECIAL_FLOATS * 4, np.float32)[: 2 * LANES]
        generator.shuffle(values)
        with np.errstate(over="ignore"):
            half = values.astype(np.float16).view(np.uint16)
        bits = half if kind == "f16x2" else (values.view(np.uint32) >> 16).astype(np.uint16)
        return bits.view(np.uint32).copy() if "x2" in kind else bits[:LANES].copy()
    if kind[0] == "f":
        with np.errstate(over="ignore"):
            values = np.concatenate([SPECIAL_FLOATS, generator.standard_normal(LANES) * 100])
            values = values[:LANES].astype(dtype)
    else:
        random = generator.integers(-(2**63), 2**63, LANES)
        values = np.array([*SPECIAL_INTEGERS, *map(int, random)][:LANES], np.int64).astype(dtype)
    generator.shuffle(values)
    return values


REGISTER = {1: "%h", 2: "%h", 4: "%r", 8: "%d"}


def ptx_of_table():
    """One kernel that runs all rows; each operand of a row has 32 slots of eight bytes."""
    code = []
    for i, row in enumerate(ROWS):
        kind = f"b{8 * type_bytes(row.kind)}"
        source = REGISTER[type_bytes(row.kind)]
        registers = {"d": "%p0" if row.result == "pred" else REGISTER[type_bytes(row.result)] + "0"}
        for j, name in enumerate("abc"[: row.arity]):
            registers[name] = f"{source}{j + 1}"
            code.append(f"ld.global.{kind} {registers[name]}, [%in{j}+{i * LANES * 8}];")
        code.append(row.text.format(**registers) + ";")
        if row.result == "pred":
            code.append("selp.b32 %r0, 1, 0, %p0;")
        result = 4 if row.result == "pred" else type_bytes(row.result)
        code.append(f"st.global.b{8 * result} [%out+{i * LANES * 8}], {REGISTER[result]}0;")
    addresses = "".join(
        f"ld.param.u64 %{name}, [{name}];\nadd.s64 %{name}, %{name}, %lane;\n"
        for name in ("in0", "in1", "in2", "out")
    )
    return (
        ".version 8.0\n.target sm_90\n.address_size 64\n.visible .entry table(.param .u64 in0, "
        ".param .u64 in1, .param .u64 in2, .param .u64 out)\n{\n.reg .pred %p<2>;\n"
        ".reg .b16 %h<4>;\n.reg .b32 %r<6>;\n.reg .b64 %d<4>, %in0, %in1, %in2, %out, %lane;\n"
        "mov.u32 %r5, %tid.x;\nmul.wide.u32 %lane, %r5, 8;\n"
        f"{addresses}{chr(10).join(code)}\nret;\n}}\n"
    )


def memory():
    """The three inputs and the output, uint64[rows][lanes] each."""
    arrays = [np.zeros((len(ROWS), LANES), np.uint64) for _ in range(4)]
    for i, row in enumerate(ROWS):
        for j in range(row.arity):
            values = inputs(row.kind, 10 * i + j)
            arrays[j][i].view(values.dtype).reshape(LANES, -1)[:, 0] = values
    return arrays


def column(array, i, kind):
    return array[i].view(DTYPES[kind]).reshape(LANES, -1)[:, 0].copy()


@pytest.fixture(scope="module")
def emulated():
    arrays = memory()
    emulator.load(ptx_of_table()).kernel[1, LANES](*arrays)
    return arrays


def as_floats(values, kind):
    if kind in ("f16", "f32", "f64"):
        return values
    return (values.astype(np.uint32) << 16).view(np.float32) if kind == "bf16" else None


def differences(result, expected, row):
    """Lanes that differ by more than the row allows; any NaN equals any other."""
    if row.result in ("f16x2", "bf16x2"):
        parts = [x.view(np.uint16) for x in (result, expected)]
        narrow = row.result[:-2]
        values = [p.view(np.float16) if narrow == "f16" else as_floats(p, "bf16") for p in parts]
        wrong = (parts[0] != parts[1]) & ~(np.isnan(values[0]) & np.isnan(values[1]))
        return np.flatnonzero(wrong.reshape(-1, 2).any(1))
    wide = [as_floats(x, row.result) for x in (result, expected)]
    if wide[0] is None:
        return np.flatnonzero(result != expected)
    bits = [x.view(f"i{x.itemsize}").astype(object) for x in (result, expected)]
    far = np.array([abs(a - b) > row.ulps for a, b in zip(*bits, strict=True)])
    return np.flatnonzero(far & ~(np.isnan(wide[0]) & np.isnan(wide[1])))


@pytest.mark.parametrize("i", range(len(ROWS)), ids=[f"{r.name}-{i}" for i, r in enumerate(ROWS)])
def test_instruction(emulated, i):
    row = ROWS[i]
    operands = [column(emulated[j], i, row.kind) for j in range(row.arity)]
    with np.errstate(all="ignore"):
        expected = np.asarray(row.expected(*operands))
        expected = (
            expected.astype(DTYPES[row.result])
            if expected.dtype.kind != "b"
            else expected.astype(np.uint32)
        )
    result = column(emulated[3], i, row.result)
    wrong = differences(result, expected, row)
    lanes = [([o[k] for o in operands], result[k], expected[k]) for k in wrong[:4]]
    assert not len(wrong), f"{row.text}: (operands, result, expected) {lanes}"


def test_table_on_a_gpu(emulated):
    try:
        driver = Driver()
    except OSError as reason:
        pytest.skip(f"no GPU to compare with: {reason}")
    arrays = memory()
    driver.run(ptx_of_table(), "table", 1, LANES, arrays)
    wrong = [
        row.text
        for i, row in enumerate(ROWS)
        if len(
            differences(column(emulated[3], i, row.result), column(arrays[3], i, row.result), row)
        )
    ]
    assert not wrong
