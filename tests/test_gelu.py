"""gelu, with its bias, against torch's own."""

import pytest
import torch
from cases import BF16, Case, randn
from families import Families
from torch.nn import functional as F

import fastlm
from fastlm import ops


def biased(gelu):
    return lambda x, bias, **options: gelu(x + bias, **options)


def fused(x, bias, **options):
    return ops.gelu(x, bias=bias, **options)


def case(name, shape, why, bias=True, scale=1.0, **options):
    ours, theirs = (fused, biased(F.gelu)) if bias else (ops.gelu, F.gelu)

    def inputs():
        x = randn(*shape, scale=scale)
        return (x, randn(shape[-1])) if bias else (x,)

    return Case(name, ours, theirs, inputs, why, options=options)


FORMS = (
    case("erf", (48, 769), "the exact form; no vector width divides 769", bias=False),
    case("erf-bias", (48, 769), "its bias is added, and its gradient summed, on the way"),
    case("tanh", (48, 769), "GPT-2's gelu_new", bias=False, approximate="tanh"),
    case("tanh-bias", (48, 769), "what an MLP of GPT-2 runs", approximate="tanh"),
)
EDGES = tuple(
    case(f"{name}-{approximate}", shape, why, approximate=approximate, **options)
    for approximate in ("none", "tanh")
    for name, shape, why, options in (
        ("scalar", (), "no dimension at all", {"bias": False}),
        ("no-rows", (0, 768), "an empty batch", {}),
        ("one-column", (5, 1), "shorter than any vector", {}),
        ("one-row", (1, 768), "fewer rows than threads", {}),
        ("many-rows", (1100, 33), "more rows than the blocks that dbias is summed in", {}),
        ("wide", (8, 769), "both tails, where erf and tanh are 1 but for rounding", {"scale": 4.0}),
        ("huge", (8, 769), "cubes near 1e36 must neither overflow to NaN nor to 0 * inf",
         {"scale": 1e12}),
    )
)  # fmt: skip


LARGE = (
    case("streamed-tanh", (5520, 769), "rows at every alignment", approximate="tanh"),
    case("streamed-erf", (5520, 769), "rows at every alignment", bias=False),
)


class TestFamilies(Families):
    forms, edges, large = FORMS, EDGES, LARGE


# ---- the front takes what torch.nn.functional.gelu takes ----


@pytest.mark.parametrize("options", [{}, {"approximate": "none"}, {"approximate": "tanh"}], ids=str)
def test_arguments_are_torchs(options, backend):
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(ops.gelu(input=x, **options), F.gelu(input=x, **options))


def test_bad_input_raises_what_torch_raises():
    with pytest.raises(Exception) as theirs:
        F.gelu(torch.randn(3), approximate="sigmoid")
    with pytest.raises(theirs.type, match="gelu: approximate: expected 'none' or 'tanh', got"):
        ops.gelu(torch.randn(3), approximate="sigmoid")


def test_bias_of_another_shape():
    with pytest.raises(RuntimeError, match=r"gelu: bias: expected shape \(4,\), got \(3,\)"):
        ops.gelu(torch.randn(2, 4), bias=torch.randn(3))


def test_float32_bias_under_bfloat16_runs_on_the_reference(capsys):
    x, bias = torch.randn(3, 8, dtype=BF16), torch.randn(8)
    assert ops.gelu(x, bias=bias).dtype == BF16
    fastlm.explain("gelu", x, bias=bias)
    assert "cpp     no: does not take a bias of torch.float32" in capsys.readouterr().out
    with fastlm.use("cpp"), pytest.raises(fastlm.BackendUnavailable, match="does not take a bias"):
        ops.gelu(x, bias=bias)
