"""rms_norm against torch's own."""

import inspect

import pytest
import torch
from cases import Case, randn
from families import Families
from test_layer_norm import norm_of, wide_parameters
from torch.nn import functional as F

from fastlm import ops


def case(
    name, shape, why, parameters=1, form=lambda norm: norm, scale=1.0, cancels=1e-30, **options
):
    def inputs():
        return randn(*shape, scale=scale), *(randn(shape[-1]) for _ in range(parameters))

    ours, theirs = form(norm_of(ops.rms_norm)), form(norm_of(F.rms_norm))
    return Case(name, ours, theirs, inputs, why, {"eps": 1e-6, **options}, cancels)


class TestFamilies(Families):
    forms = (
        case("weight", (48, 769), "Llama's form; no vector width divides 769"),
        case("plain", (48, 769), "without a weight", parameters=0),
        case("wide", (48, 769), "float32 weight under bfloat16", form=wide_parameters),
        case("eps", (48, 769), "eps as large as the mean square", eps=0.5),
    )
    edges = (
        case("no-rows", (0, 768), "must not launch, and the weight's gradient is zero"),
        case("one-by-one", (1, 1), "dx cancels to eps / x^3", cancels=1.0),
        case("one-column", (5, 1), "shorter than any vector", cancels=1.0),
        case("one-dimension", (768,), "no dimension of rows at all"),
        case("one-row", (1, 768), "fewer rows than threads"),
        case(
            "long-rows", (2, 45000), "longer than the L1 cache, and in float32 than shared memory"
        ),
        case("many-rows", (1100, 33), "more rows than the blocks that column sums are kept in"),
        case("huge", (8, 769), "squares near 1e36", scale=1e16),
    )
    large = (case("streamed", (5520, 769), "rows at every alignment"),)


def test_signature_is_torchs():
    ours, theirs = (inspect.signature(f).parameters for f in (ops.rms_norm, F.rms_norm))
    assert [(p.name, p.default) for p in ours.values()] == [
        (p.name, p.default) for p in theirs.values()
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_eps_is_torchs_where_it_is_not_given(dtype):
    x = torch.full((2, 8), 1e-4, dtype=dtype)
    torch.testing.assert_close(ops.rms_norm(x, 8), F.rms_norm(x, (8,)))


BAD = {
    "another size": lambda f: f(torch.randn(2, 5), (4,)),
    "no sizes": lambda f: f(torch.randn(2, 5), ()),
    "too many sizes": lambda f: f(torch.randn(5), (2, 5)),
    "a weight of another shape": lambda f: f(torch.randn(2, 5), (5,), torch.randn(4)),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_input_raises_what_torch_raises(bad):
    with pytest.raises(Exception) as theirs:
        bad(F.rms_norm)
    with pytest.raises(theirs.type, match="rms_norm: "):
        bad(ops.rms_norm)
