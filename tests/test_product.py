"""The CPU's matrix product, which linear_cross_entropy is made of, against torch in float64."""

import os
import subprocess
import sys

import pytest
import torch
from cases import BF16, F32, F64

from fastlm import _cpu

SIZES = {
    "a register tile": (8, 32, 64),
    "one of everything": (1, 1, 1),
    "cut off on every side": (49, 33, 257),
    "less than a tile": (5, 3, 2),
    "one column": (97, 1, 33),
    "one row": (1, 200, 31),
    "several slabs of the depth": (13, 300, 2049),
    "no depth: zero": (3, 4, 0),
}


def operands(size, dtype, a_transposed, b_transposed):
    rows, cols, depth = size
    a, b = torch.randn(rows, depth).to(dtype), torch.randn(depth, cols).to(dtype)
    if a_transposed:
        a = a.t().contiguous().t()
    return a, b.t().contiguous().t() if b_transposed else b


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("transposed", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=str)
def test_product(size, dtype, transposed, cpp):
    a, b = operands(size, dtype, *transposed)
    wanted, sums = a.double() @ b.double(), F64 if dtype == F64 else F32
    room = torch.full((size[0], size[1] + 3), torch.nan, dtype=sums)
    out = room[:, : size[1]]
    rounded = torch.empty(size[0], size[1] + 1, dtype=dtype)[:, 1:]
    _cpu.product(out, rounded, a, b, False, a, 2)
    assert torch.equal(rounded, out.to(dtype))
    # The bound of a sum of `depth` products in any order, doubled by the second call.
    bound = (1 + size[2]) * torch.finfo(sums).eps * (a.double().abs() @ b.double().abs())
    assert ((out.double() - wanted).abs() <= bound).all()
    _cpu.product(out, None, a, b, True, None, 2)
    assert ((out.double() - 2 * wanted).abs() <= 2 * bound).all()
    assert room[:, size[1] :].isnan().all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_same_bits_with_any_number_of_threads_and_rows(dtype, cpp):
    a, b = operands((301, 200, 500), dtype, 0, 1)
    found = []
    for threads in (1, 2, 3):
        found.append(torch.empty(301, 200))
        _cpu.product(found[-1], None, a, b, False, None, threads)
        assert torch.equal(found[-1], found[0])
    few = torch.empty(7, 200)
    _cpu.product(few, None, a[100:107], b, False, None, 2)
    assert torch.equal(few, found[0][100:107])


def test_a_team_that_is_smaller_than_asked_for():
    """OpenMP may give fewer threads than there are shares of the result."""
    script = """
import torch
from fastlm import _cpu
a, b = torch.randn(301, 500), torch.randn(500, 200)
one, many = torch.empty(301, 200), torch.full((301, 200), torch.nan)
_cpu.product(one, None, a, b, False, None, 1)
_cpu.product(many, None, a, b, False, None, 6)
assert torch.equal(one, many)
"""
    limited = {**os.environ, "OMP_THREAD_LIMIT": "2"}
    subprocess.run([sys.executable, "-c", script], env=limited, check=True)


A, B, OUT = torch.randn(4, 6), torch.randn(6, 5), torch.empty(4, 5)
BAD = {
    "another depth": (OUT, None, A, B[:5]),
    "another dtype": (OUT, None, A, B.double()),
    "sums in a narrow dtype": (OUT.to(BF16), None, A.to(BF16), B.to(BF16)),
    "other rows": (OUT[:3], None, A, B),
    "float16": (OUT, None, A.half(), B.half()),
    "gaps in both directions": (OUT, None, torch.randn(4, 12)[:, ::2], B),
    "an output in columns": (torch.empty(5, 4).t(), None, A, B),
    "rounded to another dtype": (OUT, OUT.to(BF16), A, B),
    "rounded, other columns": (OUT, torch.empty(4, 6), A, B),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_input(bad):
    with pytest.raises(ValueError, match="product: "):
        _cpu.product(*bad, False, None, 1)
