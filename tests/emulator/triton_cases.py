"""The stored PTX of Triton's kernels, run on the emulator and compared with float64.

Each case returns its error divided by what rounding explains: 1 or less is right.
"""

import functools
import gzip
import pathlib
import re

import torch

from fastlm import emulator

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
NAN = float("nan")
# bfloat16 keeps 8 bits: rounding to nearest is off by at most 2^-8 of the value.
ROUNDING = 2.0**-8


@functools.cache
def fixture(name):
    return gzip.decompress((FIXTURES / f"{name}.ptx.gz").read_bytes()).decode()


def kernel(name, **options):
    """The kernel of a fixture, with the shared memory that Triton's launcher would give it."""
    text = fixture(name)
    module = emulator.load(text, **options)
    module.default_shared = int(re.search(r"shared=(\d+)", text).group(1))
    return module.kernel


def _normal(*shape):
    return torch.randn(*shape).bfloat16()


def _excess(result, truth, allowed):
    error = (result.double() - truth).abs().max().item()
    return error / allowed if error == error else float("inf")


def softmax(arch, **options):
    x = _normal(3, 777)
    y = torch.full_like(x, NAN)
    kernel(f"softmax_rows_sm{arch}", **options)[3](x, y, 777)
    truth = x.double().softmax(-1)
    return _excess(y, truth, ROUNDING * truth.max().item() + 1e-6)


def column_sums(arch, **options):
    x, sums = _normal(40, 100), torch.zeros(100)
    kernel(f"column_sums_sm{arch}", **options)[3](x, sums, 40, 100)
    return _excess(sums, x.double().sum(0), 1e-4)


def _attention(length, heads=1):
    q, k, v, do = (_normal(heads, length, 64) for _ in range(4))
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    scores = wide[0] @ wide[1].mT / 8
    scores = scores.masked_fill(~torch.ones(length, length).tril().bool(), float("-inf"))
    o = scores.softmax(-1) @ wide[2]
    o.backward(do.double())
    return (q, k, v, do), o.detach(), scores.logsumexp(-1).detach(), [x.grad for x in wide]


def attention_forward(arch, **options):
    (q, k, v, _), truth, true_lse, _ = _attention(100)
    o, lse = torch.full_like(q, NAN), torch.full(q.shape[:2], NAN)
    run = kernel(f"attention_forward_sm{arch}", **options)
    run[(2, 1), None](q, k, v, o, lse, 100, 0.125)
    # p and o are rounded: relative to the largest value that enters the sum.
    allowed = 2 * ROUNDING * v.double().abs().max().item()
    return max(_excess(o, truth, allowed), _excess(lse, true_lse, 1e-4))


def attention_backward(arch, **options):
    (q, k, v, do), o, lse, grads = _attention(100)
    delta = (o * do.double()).sum(-1).float()
    dq, dk, dv = torch.zeros(q.shape), torch.full_like(q, NAN), torch.full_like(q, NAN)
    run = kernel(f"attention_backward_sm{arch}", **options)
    run[(2, 1), None](q, k, v, do, lse.float(), delta, dq, dk, dv, 100, 0.125)
    # p and ds are rounded once, dk and dv once more; sums of up to 100 such terms.
    return max(
        _excess(result, truth, 8 * ROUNDING * truth.abs().max().item())
        for result, truth in zip((dq, dk, dv), grads, strict=True)
    )


def matmul_descriptors(arch, **options):
    m, n, k = 80, 72, 208  # 208 = 3.25 steps of 64: every stage of the pipeline wraps
    a, b, c = _normal(m, k), _normal(n, k), torch.full((m, n), NAN).bfloat16()
    run = kernel(f"matmul_descriptors_sm{arch}", **options)
    run[(2, 2), None](a, b, c, m, n, k)
    truth = a.double() @ b.double().T
    return _excess(c, truth, ROUNDING * truth.abs().max().item() + 1e-3)


CASES = (softmax, column_sums, attention_forward, attention_backward, matmul_descriptors)
ARCHES = (80, 90)
EVERY_DETECTOR = {"races": True, "uninitialized": True}
MODES = {
    "in order": {},
    "reverse": {"schedule": "reverse"},
    "random": {"schedule": "random", "seed": 11},
    "early copies": {"late_copies": False},
    "detectors": EVERY_DETECTOR,
}


def run(case, arch, **options):
    """The case's excess on inputs that do not depend on what ran before."""
    torch.manual_seed(0)
    return case(arch, **options)
