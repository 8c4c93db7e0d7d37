"""dropout: its mask against Philox in numpy, and what a mask must be."""

import math

import numpy as np
import philox
import pytest
import torch
from accuracy import results
from cases import F32, F64, Case, randn
from families import Families
from torch.nn import functional as F

from fastlm import ops
from fastlm.philox import dropout_factors

SEED = 2**62 + 12345  # more than 32 bits, so that both words of the key matter


def masked(x, seed, p):
    columns = x.shape[-1] if x.dim() else 1
    factors = philox.factors(seed, x.numel() // max(columns, 1), columns, p)
    return x * factors.view(x.shape).to(x.dtype)


def case(name, shape, why, p=0.1, seed=SEED):
    return Case(
        name,
        lambda x, seed, p: ops.dropout(x, p, seed=seed),
        masked,
        lambda: (randn(*shape), torch.tensor(seed)),
        why,
        options={"p": p},
    )


FORMS = (
    case("tenth", (48, 769), "GPT-2's rate; 769 is not a multiple of Philox's four words"),
    case("half", (48, 769), "torch's default rate; a negative seed", p=0.5, seed=-SEED),
)
EDGES = (
    case("scalar", (), "no dimension at all", p=0.5),
    case("no-rows", (0, 768), "an empty batch"),
    case("three-columns", (5, 3), "fewer than Philox's four words", p=0.5),
    case("one-row", (1, 768), "fewer rows than threads"),
    case("all-dropped", (4, 33), "p = 1 scales by 0, not by 1 / 0", p=1.0),
)


LARGE = (case("streamed", (5520, 768), "rows that are all aligned, so that all are streamed"),)


class TestFamilies(Families):
    forms, edges, large = FORMS, EDGES, LARGE


def test_philox_in_numpy_meets_the_published_vectors():
    """The 10-round vectors of Random123's known-answer file kat_vectors."""
    vectors = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, expected in vectors:
        assert tuple(philox.philox4x32(np.array(counter), key, rounds=10)) == expected


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("seed", [0, -1, SEED])
def test_mask_is_philox_bit_for_bit(seed, p, backend):
    x = torch.ones(70, 37)
    expected = philox.factors(torch.tensor(seed), 70, 37, p) != 0
    kept = ops.dropout(x, p, seed=torch.tensor(seed)) != 0
    assert torch.equal(kept.cpu(), expected)


def test_rows_past_32_bits_count_on():
    """Attention's rows are batch * heads * queries, which passes 2^32 before memory ends."""
    row, seed = 2**32 - 1, torch.tensor(SEED)
    found = dropout_factors(seed, torch.arange(row, row + 2), 9, 0.5)
    assert torch.equal(found != 0, philox.factors(seed, 2, 9, 0.5, first_row=row) != 0)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_keep_rate_is_binomial(p, cpp):
    """Six standard deviations: a right generator fails once in 500 million runs."""
    n = 512 * 512
    kept = (ops.dropout(torch.ones(512, 512), p) != 0).sum().item()
    assert abs(kept - n * (1 - p)) <= 6 * math.sqrt(n * p * (1 - p))


def test_backward_drops_what_forward_dropped(backend):
    x = torch.ones(30, 41)
    found = results(lambda x: ops.dropout(x, 0.5), (x,), F32)
    assert torch.equal(found["output 0"] == 0, found["gradient 0"] == 0)


def test_seed_comes_from_torchs_generator():
    x = torch.ones(8, 100)
    torch.manual_seed(5)
    first, second = ops.dropout(x), ops.dropout(x)
    torch.manual_seed(5)
    assert torch.equal(ops.dropout(x), first)
    assert not torch.equal(first, second)


def test_drawn_seed_under_compile():
    compiled = torch.compile(ops.dropout, fullgraph=True, backend="aot_eager")
    x = torch.ones(8, 100)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    assert set(first.unique().tolist()) == {0.0, 2.0}


def test_nothing_dropped_is_the_input_itself():
    x = torch.randn(3, 4)
    assert ops.dropout(x, 0.0) is x
    assert ops.dropout(x, 0.5, training=False) is x


def test_all_dropped_is_zero_as_in_torch(backend):
    x = torch.randn(3, 7)
    assert torch.equal(ops.dropout(x, 1.0), F.dropout(x, 1.0))


@pytest.mark.parametrize("p", [-0.1, 1.1])
def test_bad_probability_raises_what_torch_raises(p):
    with pytest.raises(Exception) as theirs:
        F.dropout(torch.ones(2), p)
    with pytest.raises(theirs.type, match="dropout: p: expected a probability from 0 to 1, got"):
        ops.dropout(torch.ones(2), p)


def test_bad_seed():
    with pytest.raises(ValueError, match="seed: expected 1 elements of int64, got"):
        ops.dropout(torch.ones(2), 0.5, seed=torch.tensor(1.0, dtype=F64))
