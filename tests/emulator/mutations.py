"""Layout rules of the emulator, broken one at a time: each must make a Triton kernel wrong.

A rule that can be broken unnoticed is a rule that nothing proves.
"""

import pathlib
import shutil
from dataclasses import dataclass

from fastlm import emulator
from fastlm.emulator import build

from . import triton_cases
from .triton_cases import run


@dataclass
class Mutation:
    """`old` is replaced by `new` in a file of the runtime; `case` on `arch` must notice."""

    name: str
    file: str
    case: object
    arch: int
    old: str
    new: str
    options: dict | None = None


FORWARD, BACKWARD = triton_cases.attention_forward, triton_cases.attention_backward
MATMUL = triton_cases.matmul_descriptors

# fmt: off
MUTATIONS = [
    Mutation("mma: registers 1 and 2 of a swapped", "matrix.cpp", FORWARD, 80,
             "lane / 4 + 8 * (reg & 1)", "lane / 4 + 8 * (reg >> 1)"),
    Mutation("mma: columns of a", "matrix.cpp", FORWARD, 80,
             "+ which + 8 * (reg >> 1)", "+ which + 8 * (reg & 1)"),
    Mutation("mma: registers of b swapped", "matrix.cpp", FORWARD, 80,
             "+ which + 8 * reg;", "+ which + 8 * (1 - reg);"),
    Mutation("mma: rows of c", "matrix.cpp", FORWARD, 80,
             "lane / 4 + 8 * (i >> 1); }", "lane / 4 + 8 * (i & 1); }"),
    Mutation("mma: columns of c", "matrix.cpp", FORWARD, 80,
             "2 * (lane % 4) + (i & 1); }", "2 * (lane % 4) + (i >> 1); }"),
    Mutation("mma: halves of a register swapped", "matrix.cpp", FORWARD, 90,
             "which ? pair >> 16 : pair", "which ? pair : pair >> 16"),
    Mutation("mma: bfloat16 read as float16", "matrix.cpp", FORWARD, 80,
             "format == Format::kHalf ? widen(half{bits})", "true ? widen(half{bits})"),
    Mutation("ldmatrix: .trans ignored", "matrix.cpp", FORWARD, 80,
             "transposed ? across : down, column = transposed ? down : across",
             "down, column = across"),
    Mutation("ldmatrix: rows and lanes mixed up", "matrix.cpp", FORWARD, 80,
             "down = lane / 4", "down = lane % 8"),
    Mutation("stmatrix: matrices in reverse", "matrix.cpp", MATMUL, 90,
             "(operands[lane])->registers[i];",
             "(operands[lane])->registers[count - 1 - i];"),
    Mutation("cp.async: no zero fill", "copies.cpp", FORWARD, 80,
             "std::memset(destination + copy.source_bytes, 0, copy.bytes - copy.source_bytes);",
             ""),
    Mutation("swizzle: one address bit off", "tma.cpp", MATMUL, 90,
             "(address >> 7 & bits) << 4", "(address >> 8 & bits) << 4"),
    Mutation("swizzle: one bit too few", "tma.cpp", MATMUL, 90,
             "(1u << mode) - 1", "(1u << mode) / 2 - 1"),
    Mutation("TMA: no zero fill outside the tensor", "tma.cpp", MATMUL, 90,
             "std::memset(shared, 0, bytes);", ""),
    Mutation("TMA: elements outside are stored", "tma.cpp", MATMUL, 90,
             "at < int64_t(map.dims[i])", "true"),
    Mutation("TMA: coordinates exchanged", "tma.cpp", MATMUL, 90,
             "int64_t(copy.coordinates[0]) + e", "int64_t(copy.coordinates[1]) + e"),
    Mutation("mbarrier: the phase never changes", "mbarrier.cpp", MATMUL, 90,
             "barrier.phase ^= 1;", "", {"spin_limit": 100_000}),
    Mutation("mbarrier: bytes are not counted", "mbarrier.cpp", MATMUL, 90,
             "barrier.bytes += bytes;\n  barrier.pending",
             "barrier.pending", {"spin_limit": 100_000}),
    Mutation("wgmma: rows of the sums", "wgmma.cpp", MATMUL, 90,
             "8 * (i >> 1 & 1);", "8 * (i & 1);"),
    Mutation("wgmma: columns of the sums", "wgmma.cpp", MATMUL, 90,
             "8 * (i >> 2) + 2 * (thread % 4)", "8 * (i >> 2) + 2 * (thread % 8 / 2)"),
    Mutation("wgmma: warps in reverse", "wgmma.cpp", MATMUL, 90,
             "16 * (thread / 32) + thread % 32 / 4", "16 * (3 - thread / 32) + thread % 32 / 4"),
    Mutation("wgmma: a in registers, warps mixed up", "wgmma.cpp", FORWARD, 90,
             "product.a[16 * (thread / 32)", "product.a[16 * (3 - thread / 32)"),
    Mutation("wgmma: K-major, stride and leading offset mixed up", "wgmma.cpp", MATMUL, 90,
             "start + outer / 8 * stride;\n    if", "start + outer / 8 * leading;\n    if"),
    Mutation("wgmma: MN-major, stride and leading offset mixed up", "wgmma.cpp", BACKWARD, 90,
             "outer / elements * leading + k / 8 * stride",
             "outer / elements * stride + k / 8 * leading"),
    Mutation("wgmma: transposition ignored", "wgmma.cpp", FORWARD, 90,
             "outer_major ? matrix.outer_major(outer, k) : matrix.k_major(outer, k)",
             "matrix.k_major(outer, k)"),
    Mutation("wgmma: descriptor's swizzle misread", "wgmma.cpp", MATMUL, 90,
             "(4 - (bits >> 62)) & 3", "bits >> 62"),
    Mutation("wgmma: old sums forgotten", "wgmma.cpp", MATMUL, 90,
             "if (op.operands.accumulate)", "if (false)"),
    Mutation("shfl: butterfly as down", "warp.cpp", triton_cases.softmax, 80,
             "source = int(t.lane ^ b)", "source = int(t.lane + b)"),
]
# fmt: on


def notices(mutation, folder, monkeypatch):
    """How the case shows that the runtime in `folder`, with the mutation, is wrong; else None."""
    runtime = pathlib.Path(folder) / "runtime"
    shutil.copytree(build.RUNTIME, runtime)
    path = runtime / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(
            f"{mutation.name}: '{mutation.old}' stands {text.count(mutation.old)} times"
        )
    path.write_text(text.replace(mutation.old, mutation.new))
    monkeypatch.setattr(build, "RUNTIME", runtime)
    try:
        excess = run(mutation.case, mutation.arch, **(mutation.options or {}))
    except emulator.KernelError as error:
        return error.reason
    return f"error {excess:.3g} times what rounding explains" if excess > 1 else None
