"""layer_norm against torch's own."""

import inspect

import pytest
import torch
from cases import BF16, F32, Case, randn
from families import Families
from torch.nn import functional as F

import fastlm
from fastlm import ops, reference


def inputs(shape, parameters, scale, shift):
    return lambda: (
        randn(*shape, scale=scale, shift=shift),
        *(randn(shape[-1]) for _ in range(parameters)),
    )


def wide_parameters(norm):
    def call(x, *parameters, **options):
        dtype = reference.accumulation_dtype(x)
        return norm(x, *(p.to(dtype) for p in parameters), **options)

    return call


def norm_of(layer_norm):
    """layer_norm over the last dimension, with whatever parameters follow."""
    return lambda x, *parameters, **options: layer_norm(x, x.shape[-1:], *parameters, **options)


def without_weight(norm):
    return lambda x, bias: norm(x, None, bias)


def case(
    name,
    shape,
    why,
    parameters=2,
    form=lambda norm: norm,
    cancels=1e-30,
    scale=1.0,
    shift=0.0,
    **options,
):
    ours, theirs = form(norm_of(ops.layer_norm)), form(norm_of(F.layer_norm))
    made = inputs(shape, parameters, scale, shift)
    return Case(name, ours, theirs, made, why, options, cancels)


FORMS = (
    case("affine", (48, 769), "GPT-2's form; no vector width divides 769"),
    case("plain", (48, 769), "without parameters", parameters=0),
    case("weight", (48, 769), "without a bias", parameters=1),
    case("bias", (48, 769), "without a weight", parameters=1, form=without_weight),
    case(
        "wide",
        (48, 769),
        "float32 parameters under bfloat16, as autocast gives",
        form=wide_parameters,
    ),
    case("eps", (48, 769), "eps as large as the variance", eps=0.5),
)
EDGES = (
    case(
        "no-rows",
        (0, 768),
        "an empty batch must not launch, and its parameters' gradients are zero",
    ),
    case("one-by-one", (1, 1), "the variance is zero and rstd is 1/sqrt(eps) = 316", cancels=316.0),
    case("one-column", (5, 1), "shorter than any vector", cancels=316.0),
    case("one-dimension", (768,), "no dimension of rows at all"),
    case("one-row", (1, 768), "fewer rows than threads"),
    case("long-rows", (2, 45000), "longer than the L1 cache, and in float32 than shared memory"),
    case("many-rows", (1100, 33), "more rows than the blocks that column sums are kept in"),
    case("far-from-zero", (8, 769), "E[x^2] - E[x]^2 would cancel to nothing", shift=1000.0),
    case("huge", (8, 769), "squares near 1e36", scale=1e16),
)


LARGE = (case("streamed", (5520, 769), "rows at every alignment"),)


class TestFamilies(Families):
    forms, edges, large = FORMS, EDGES, LARGE


# ---- the front takes what torch.nn.functional.layer_norm takes ----


def test_signature_is_torchs():
    ours, theirs = (inspect.signature(f).parameters for f in (ops.layer_norm, F.layer_norm))
    assert [(p.name, p.default) for p in ours.values()] == [
        (p.name, p.default) for p in theirs.values()
    ]


@pytest.mark.parametrize("shape", [5, [5], (5,), torch.Size([4, 5]), (3, 4, 5)], ids=str)
def test_normalized_shape_in_every_form(shape, backend):
    x = torch.randn(2, 3, 4, 5)
    sizes = [shape] if isinstance(shape, int) else shape
    weight, bias = torch.randn(*sizes), torch.randn(*sizes)
    torch.testing.assert_close(
        ops.layer_norm(x, shape, weight, bias),
        F.layer_norm(x, sizes, weight, bias),
    )


BAD = {
    "another size": lambda f: f(torch.randn(2, 5), (4,)),
    "no sizes": lambda f: f(torch.randn(2, 5), ()),
    "too many sizes": lambda f: f(torch.randn(5), (2, 5)),
    "a weight of another shape": lambda f: f(torch.randn(2, 5), (5,), torch.randn(4)),
    "a bias of another shape": lambda f: f(torch.randn(2, 5), (5,), None, torch.randn(1, 5)),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_input_raises_what_torch_raises(bad):
    with pytest.raises(Exception) as theirs:
        bad(F.layer_norm)
    with pytest.raises(theirs.type, match="layer_norm: "):
        bad(ops.layer_norm)


def test_other_dtypes_run_on_the_reference():
    x = torch.randn(3, 8).half()
    torch.testing.assert_close(ops.layer_norm(x, 8), F.layer_norm(x, (8,)))
    with fastlm.use("cpp"), pytest.raises(fastlm.BackendUnavailable, match="not float16"):
        ops.layer_norm(x, 8)


def test_autocast_gives_bfloat16_with_float32_parameters():
    linear, norm = torch.nn.Linear(8, 16), torch.nn.LayerNorm(16)
    with torch.autocast("cpu", dtype=BF16):
        y = ops.layer_norm(linear(torch.randn(4, 8)), 16, norm.weight, norm.bias)
    y.float().sum().backward()
    assert (y.dtype, norm.weight.grad.dtype) == (BF16, F32)
