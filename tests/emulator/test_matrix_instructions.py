"""mma, ldmatrix and stmatrix, lane by lane: against the ISA's layouts, and a GPU if there is one.

Elements are small integers, so that sums are exact in any order and results must agree bit for bit.
"""

import shutil
import subprocess

import numpy as np
import pytest

from fastlm import emulator

from .cuda_driver import Driver
from .test_instructions import ptx_of_table

LANES, WORDS = 32, 12  # each lane gets four words of a, two of b, four of c, and two spare ones
LANE = np.arange(LANES)
GROUP, PLACE = LANE // 4, LANE % 4


def mma_text(shape, inputs, sums, a, b, c):
    names = ", ".join(f"%r{i}" for i in c)
    left, right = (", ".join(f"%r{i}" for i in part) for part in (a, b))
    results = ", ".join(f"%o{i}" for i in range(len(c)))
    opcode = f"mma.sync.aligned.{shape}.row.col.{sums}.{inputs}.{inputs}.{sums}"
    return f"{opcode} {{{results}}}, {{{left}}}, {{{right}}}, {{{names}}};"


def ldmatrix_text(count, trans):
    results = ", ".join(f"%o{i}" for i in range(count))
    return f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{results}}}, [%at];"


def stmatrix_text(count, trans):
    values = ", ".join(f"%r{i}" for i in range(count))
    store = f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%at], {{{values}}};"
    return f"{store}\nbar.sync 0;\nld.shared.v4.b32 {{%o0, %o1, %o2, %o3}}, [%at];"


def elements(words, kind):
    """Two values of each word, low half first, on a new last axis."""
    halves = words[..., None] >> np.array([0, 16], np.uint32) & np.uint32(0xFFFF)
    if kind == "bf16":
        return (halves << np.uint32(16)).astype(np.uint32).view(np.float32)
    return halves.astype(np.uint16).view(np.float16).astype(np.float32)


def mma_expected(words, depth, kind, half_sums):
    """Accumulator words of each lane for m16n8k<depth> (PTX ISA, matrix fragments for mma)."""
    a, b = np.zeros((16, depth)), np.zeros((depth, 8))
    for reg in range(depth // 4):
        for which in range(2):
            column = 2 * PLACE + which + 8 * (reg >> 1)
            a[GROUP + 8 * (reg & 1), column] = elements(words[:, reg], kind)[:, which]
    for reg in range(depth // 8):
        for which in range(2):
            b[2 * PLACE + which + 8 * reg, GROUP] = elements(words[:, 4 + reg], kind)[:, which]
    c = (
        elements(words[:, 6:8], "f16").reshape(LANES, 4)
        if half_sums
        else words[:, 6:10].view(np.float32)
    )
    rows = GROUP[:, None] + 8 * (np.arange(4) >> 1)
    columns = 2 * PLACE[:, None] + (np.arange(4) & 1)
    sums = (a @ b)[rows, columns] + c
    if half_sums:
        return np.ascontiguousarray(sums.astype(np.float16)).view(np.uint32)
    return sums.astype(np.float32).view(np.uint32)


def ldmatrix_expected(words, count, trans):
    """Lane 8i + r holds row r of matrix i; lane l gets elements (l / 4, 2 (l % 4) + 0 and 1)."""
    rows = np.ascontiguousarray(words[:, :4]).view(np.uint16).reshape(4, 8, 8)[:count]
    rows = rows.swapaxes(1, 2) if trans else rows
    return np.ascontiguousarray(rows).view(np.uint32).reshape(count, LANES).T


def stmatrix_expected(words, count, trans):
    matrices = np.ascontiguousarray(words[:, :count].T).view(np.uint16).reshape(count, 8, 8)
    matrices = matrices.swapaxes(1, 2) if trans else matrices
    stored = np.ascontiguousarray(words[:, :4])
    stored[: 8 * count] = np.ascontiguousarray(matrices).view(np.uint32).reshape(8 * count, 4)
    return stored


SUMS = {"f32": (6, 7, 8, 9), "f16": (6, 7)}
INSTRUCTIONS = {
    f"mma-{shape}-{kind}-{sums}": (
        80,
        mma_text(shape, kind, sums, range(depth // 4), range(4, 4 + depth // 8), SUMS[sums]),
        lambda w, depth=depth, kind=kind, sums=sums: mma_expected(w, depth, kind, sums == "f16"),
        (kind, sums),
    )
    for shape, depth in (("m16n8k16", 16), ("m16n8k8", 8))
    for kind, sums in (("f16", "f32"), ("bf16", "f32"), ("f16", "f16"))
}
for count in (1, 2, 4):
    for trans in ("", ".trans"):
        INSTRUCTIONS[f"ldmatrix-x{count}{trans}"] = (
            80,
            ldmatrix_text(count, trans),
            lambda w, count=count, trans=trans: ldmatrix_expected(w, count, trans),
            ("f16", "f32"),
        )
        INSTRUCTIONS[f"stmatrix-x{count}{trans}"] = (
            90,
            stmatrix_text(count, trans),
            lambda w, count=count, trans=trans: stmatrix_expected(w, count, trans),
            ("f16", "f32"),
        )


def ptx(arch, text):
    loads = "\n".join(f"ld.global.b32 %r{i}, [%in+{4 * i}];" for i in range(WORDS))
    stores = "\n".join(f"st.global.b32 [%out+{4 * i}], %o{i};" for i in range(4))
    clear = "\n".join(f"mov.b32 %o{i}, 0;" for i in range(4))
    return (
        f".version 8.0\n.target sm_{arch}\n.address_size 64\n"
        ".visible .entry matrix(.param .u64 in, .param .u64 out)\n{\n"
        f".reg .b32 %r<{WORDS}>, %o<4>, %at, %lane;\n.reg .b64 %in, %out;\n"
        ".shared .align 16 .b8 rows[512];\n"
        "ld.param.u64 %in, [in];\nld.param.u64 %out, [out];\nmov.u32 %lane, %tid.x;\n"
        f"mad.wide.u32 %in, %lane, {4 * WORDS}, %in;\nmad.wide.u32 %out, %lane, 16, %out;\n"
        f"{loads}\n{clear}\nmov.u32 %at, rows;\nmad.lo.u32 %at, %lane, 16, %at;\n"
        "st.shared.v4.b32 [%at], {%r0, %r1, %r2, %r3};\nbar.sync 0;\n"
        f"{text}\n{stores}\nret;\n}}\n"
    )


def inputs(kind, sums):
    """Small integers as a and b (pairs of `kind`) and as c (floats, or pairs of f16)."""
    generator = np.random.default_rng(4)
    values = generator.integers(-8, 9, (LANES, WORDS, 2)).astype(np.float32)
    half = values.astype(np.float16).view(np.uint32)[..., 0]
    bfloat = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint32)[..., 0]
    words = (bfloat if kind == "bf16" else half).copy()
    words[:, 6:10] = half[:, 6:10] if sums == "f16" else values[:, 6:10, 0].view(np.uint32)
    return words


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_lanes_and_elements(name):
    arch, text, expected, kinds = INSTRUCTIONS[name]
    words, out = inputs(*kinds), np.zeros((LANES, 4), np.uint32)
    emulator.load(ptx(arch, text)).kernel[1, LANES](words, out)
    wanted = expected(words)
    assert np.array_equal(out[:, : wanted.shape[1]], wanted)


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="ptxas is not installed")
def test_ptxas_accepts_what_a_gpu_is_to_run(tmp_path):
    texts = [
        (90, ptx_of_table()),
        *((arch, ptx(arch, text)) for arch, text, *_ in INSTRUCTIONS.values()),
    ]
    for arch, text in texts:
        source = tmp_path / "kernel.ptx"
        source.write_text(text)
        command = ["ptxas", f"-arch=sm_{arch}", str(source), "-o", str(tmp_path / "kernel.cubin")]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


def test_a_gpu_agrees():
    try:
        driver = Driver()
    except OSError as reason:
        pytest.skip(f"no GPU to compare with: {reason}")
    different = []
    for name, (arch, text, _, kinds) in INSTRUCTIONS.items():
        words = inputs(*kinds)
        ours, theirs = (np.zeros((LANES, 4), np.uint32) for _ in range(2))
        emulator.load(ptx(arch, text)).kernel[1, LANES](words, ours)
        driver.run(ptx(arch, text), "matrix", 1, LANES, [words, theirs])
        if not np.array_equal(ours, theirs):
            different.append(name)
    assert not different
