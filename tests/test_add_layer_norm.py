"""add_layer_norm, layer_norm of dropout(x) + residual, against those operations of torch."""

import philox
import pytest
import torch
from accuracy import results
from cases import BF16, F32, Case, randn
from families import Families, assert_same_bits
from torch.nn import functional as F

from fastlm import ops

SEED = 2**62 + 12345  # more than 32 bits, so that both words of the key matter


def composition(x, residual, seed, *parameters, eps=1e-5, dropout_p=0.0):
    rows = x.numel() // max(x.shape[-1], 1)
    factors = philox.factors(seed, rows, x.shape[-1], dropout_p).view(x.shape)
    residual_out = x * factors.to(x.dtype) + residual
    return F.layer_norm(residual_out, x.shape[-1:], *parameters, eps=eps), residual_out


def seeded(x, residual, seed, *parameters, **options):
    return ops.add_layer_norm(x, residual, *parameters, seed=seed, **options)


def inputs(shape, parameters):
    return lambda: (
        randn(*shape),
        randn(*shape),
        torch.tensor(SEED),
        *(randn(shape[-1]) for _ in range(parameters)),
    )


def case(name, shape, why, parameters=2, pick=lambda outputs: outputs, **options):
    def call(function):
        return lambda *arguments, **options: pick(function(*arguments, **options))

    return Case(
        name, call(seeded), call(composition), inputs(shape, parameters), why, options=options
    )


FORMS = (
    case("add", (48, 769), "no dropout: generation and evaluation"),
    case("dropout", (48, 769), "GPT-2's rate; 769 is not a multiple of Philox's four words",
         dropout_p=0.1),
    case("plain", (48, 769), "without parameters", parameters=0, dropout_p=0.5),
    case("weight", (48, 769), "without a bias; eps that shows", parameters=1, eps=0.5),
    case("y-only", (48, 769), "the last layer: the residual has no gradient of its own",
         pick=lambda outputs: outputs[0], dropout_p=0.1),
    case("residual-only", (48, 769), "the normalised result is not used",
         pick=lambda outputs: outputs[1], dropout_p=0.1),
)  # fmt: skip
EDGES = (
    case("no-rows", (0, 768), "an empty batch", dropout_p=0.1),
    case("three-columns", (5, 3), "fewer than Philox's four words", dropout_p=0.5),
    case("one-dimension", (768,), "no dimension of rows at all", dropout_p=0.1),
    case("one-row", (1, 768), "fewer rows than threads", dropout_p=0.1),
    case("long-rows", (2, 45001), "longer than the L1 cache, and in float32 than shared memory",
         dropout_p=0.1),
    case("all-dropped", (4, 33), "p = 1 scales by 0, not by 1 / 0", dropout_p=1.0),
)  # fmt: skip


LARGE = (case("streamed", (5520, 769), "rows at every alignment", dropout_p=0.1),)


class TestFamilies(Families):
    forms, edges, large = FORMS, EDGES, LARGE


def test_three_dimensions_are_rows(backend):
    x, residual = torch.randn(2, 3, 20), torch.randn(2, 3, 20)
    seed = torch.tensor(7)
    y, z = ops.add_layer_norm(x, residual, dropout_p=0.5, seed=seed)
    flat = ops.add_layer_norm(x.view(6, 20), residual.view(6, 20), dropout_p=0.5, seed=seed)
    assert_same_bits({"y": y.view(6, 20), "z": z.view(6, 20)}, dict(zip("yz", flat, strict=True)))


def test_seed_comes_from_torchs_generator():
    x, zero = torch.ones(8, 100), torch.zeros(8, 100)

    def dropped():
        return ops.add_layer_norm(x, zero, dropout_p=0.5)[1]

    torch.manual_seed(5)
    first, second = dropped(), dropped()
    torch.manual_seed(5)
    assert torch.equal(dropped(), first)
    assert not torch.equal(first, second)


def test_backward_drops_what_forward_dropped(cpp):
    x, residual = torch.randn(8, 100), torch.randn(8, 100)
    form = next(f for f in FORMS if f.name == "residual-only")
    found = results(form.run, (x, residual, torch.tensor(SEED), *map(torch.ones, (100, 100))), F32)
    dropped = found["output 0"] == residual
    assert torch.equal(found["gradient 0"] == 0, dropped)
    assert 0 < dropped.sum() < dropped.numel()


BAD = {
    "residual: expected x's": (RuntimeError, lambda x: ops.add_layer_norm(x, torch.randn(3, 9))),
    "residual: expected x's (3, 8) torch.float32": (
        RuntimeError,
        lambda x: ops.add_layer_norm(x, x.bfloat16()),
    ),
    "weight: expected shape": (RuntimeError, lambda x: ops.add_layer_norm(x, x, torch.randn(7))),
    "dropout_p: expected a probability": (
        ValueError,
        lambda x: ops.add_layer_norm(x, x, dropout_p=1.5),
    ),
    "seed: expected": (
        ValueError,
        lambda x: ops.add_layer_norm(x, x, dropout_p=0.5, seed=torch.tensor([1, 2])),
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    error, call = BAD[message]
    with pytest.raises(error) as found:
        call(torch.randn(3, 8))
    assert message in str(found.value)


def test_autocast_gives_bfloat16_with_float32_parameters():
    linear, norm, residual = torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.randn(4, 16)
    with torch.autocast("cpu", dtype=BF16):
        x = linear(torch.randn(4, 8))
        y, z = ops.add_layer_norm(x, residual.to(x.dtype), norm.weight, norm.bias)
    y.float().sum().backward()
    assert (y.dtype, z.dtype, norm.weight.grad.dtype) == (BF16, BF16, F32)
