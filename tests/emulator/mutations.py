"""Layout rules of the emulator, broken one at a time: each must make a Triton kernel wrong.

A rule that can be broken unnoticed is a rule that nothing proves.
"""

import pathlib
import shutil
from dataclasses import dataclass

from . import triton_cases
from .triton_cases import run

from fastlm import emulator
from fastlm.emulator import build


@dataclass
class Mutation:
    """`old` is replaced by `new` in a file of the runtime; `case` on `arch` must notice."""

    name: str
    file: str
    old: str
    new: str
    case: object
    arch: int
    options: dict | None = None


FORWARD, BACKWARD = triton_cases.attention_forward, triton_cases.attention_backward
MATMUL = triton_cases.matmul_descriptors

MUTATIONS = [
    Mutation("mma: registers 1 and 2 of a swapped", "matrix.cpp", "lane / 4 + 8 * (reg & 1)", "lane / 4 + 8 * (reg >> 1)", FORWARD, 80),
    Mutation("mma: columns of a", "matrix.cpp", "+ which + 8 * (reg >> 1)", "+ which + 8 * (reg & 1)", FORWARD, 80),
    Mutation("mma: registers of b swapped", "matrix.cpp", "+ which + 8 * reg;", "+ which + 8 * (1 - reg);", FORWARD, 80),
    Mutation("mma: rows of c", "matrix.cpp", "lane / 4 + 8 * (i >> 1); }", "lane / 4 + 8 * (i & 1); }", FORWARD, 80),
    Mutation("mma: columns of c", "matrix.cpp", "2 * (lane % 4) + (i & 1); }", "2 * (lane % 4) + (i >> 1); }", FORWARD, 80),
    Mutation("mma: halves of a register swapped", "matrix.cpp", "which ? pair >> 16 : pair", "which ? pair : pair >> 16", FORWARD, 90),
    Mutation("mma: bfloat16 read as float16", "matrix.cpp", "format == Format::kHalf ? widen(half{bits})", "true ? widen(half{bits})", FORWARD, 80),
    Mutation("ldmatrix: .trans ignored", "matrix.cpp", "transposed ? across : down, column = transposed ? down : across", "down, column = across", FORWARD, 80),
    Mutation("ldmatrix: rows and lanes mixed up", "matrix.cpp", "down = lane / 4", "down = lane % 8", FORWARD, 80),
    Mutation("stmatrix: matrices in reverse", "matrix.cpp", "uint32_t pair = static_cast<MatrixOperands*>(operands[lane])->registers[i]", "uint32_t pair = static_cast<MatrixOperands*>(operands[lane])->registers[count - 1 - i]", MATMUL, 90),
    Mutation("cp.async: no zero fill", "copies.cpp", "std::memset(destination + copy.source_bytes, 0, copy.bytes - copy.source_bytes);", "", FORWARD, 80),
    Mutation("swizzle: one address bit off", "tma.cpp", "(address >> 7 & bits) << 4", "(address >> 8 & bits) << 4", MATMUL, 90),
    Mutation("swizzle: one bit too few", "tma.cpp", "(1u << mode) - 1", "(1u << mode) / 2 - 1", MATMUL, 90),
    Mutation("TMA: no zero fill outside the tensor", "tma.cpp", "std::memset(shared, 0, bytes);", "", MATMUL, 90),
    Mutation("TMA: elements outside are stored", "tma.cpp", "at < int64_t(map.dims[i])", "true", MATMUL, 90),
    Mutation("TMA: coordinates exchanged", "tma.cpp", "int64_t(copy.coordinates[0]) + e", "int64_t(copy.coordinates[1]) + e", MATMUL, 90),
    Mutation("mbarrier: the phase never changes", "mbarrier.cpp", "barrier.phase ^= 1;", "", MATMUL, 90, {"spin_limit": 100_000}),
    Mutation("mbarrier: bytes are not counted", "mbarrier.cpp", "barrier.bytes += bytes;\n  barrier.pending", "barrier.pending", MATMUL, 90, {"spin_limit": 100_000}),
    Mutation("wgmma: rows of the sums", "wgmma.cpp", "8 * (i >> 1 & 1);", "8 * (i & 1);", MATMUL, 90),
    Mutation("wgmma: columns of the sums", "wgmma.cpp", "8 * (i >> 2) + 2 * (thread % 4)", "8 * (i >> 2) + 2 * (thread % 8 / 2)", MATMUL, 90),
    Mutation("wgmma: warps in reverse", "wgmma.cpp", "16 * (thread / 32) + thread % 32 / 4", "16 * (3 - thread / 32) + thread % 32 / 4", MATMUL, 90),
    Mutation("wgmma: a in registers, warps mixed up", "wgmma.cpp", "product.a[16 * (thread / 32)", "product.a[16 * (3 - thread / 32)", FORWARD, 90),
    Mutation("wgmma: K-major, stride and leading offset mixed up", "wgmma.cpp", "start + outer / 8 * stride;\n    if", "start + outer / 8 * leading;\n    if", MATMUL, 90),
    Mutation("wgmma: MN-major, stride and leading offset mixed up", "wgmma.cpp", "outer / elements * leading + k / 8 * stride", "outer / elements * stride + k / 8 * leading", BACKWARD, 90),
    Mutation("wgmma: transposition ignored", "wgmma.cpp", "outer_major ? matrix.outer_major(outer, k) : matrix.k_major(outer, k)", "matrix.k_major(outer, k)", FORWARD, 90),
    Mutation("wgmma: descriptor's swizzle misread", "wgmma.cpp", "(4 - (bits >> 62)) & 3", "bits >> 62", MATMUL, 90),
    Mutation("wgmma: old sums forgotten", "wgmma.cpp", "if (op.operands.accumulate)", "if (false)", MATMUL, 90),
    Mutation("shfl: butterfly as down", "warp.cpp", "source = int(t.lane ^ b)", "source = int(t.lane + b)", triton_cases.softmax, 80),
]  # fmt: skip


def notices(mutation, folder, monkeypatch):
    """How the case shows that the runtime in `folder`, with the mutation, is wrong; else None."""
    runtime = pathlib.Path(folder) / "runtime"
    shutil.copytree(build.RUNTIME, runtime)
    path = runtime / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.name}: '{mutation.old}' stands {text.count(mutation.old)} times")
    path.write_text(text.replace(mutation.old, mutation.new))
    monkeypatch.setattr(build, "RUNTIME", runtime)
    try:
        excess = run(mutation.case, mutation.arch, **(mutation.options or {}))
    except emulator.KernelError as error:
        return error.reason
    return f"error {excess:.3g} times what rounding explains" if excess > 1 else None
