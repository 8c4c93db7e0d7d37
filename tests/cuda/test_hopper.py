"""The kernels that only compute capability 9.0 has: their calls, their numbers, what they leave to
the kernels of every device, and under every detector."""

import plain_attention
import pytest
import torch
from accuracy import results
from cases import BF16, F16, Case, randn
from families import hold_to_rule

import fastlm
from fastlm import backend, emulator, ops

from . import resources

pytestmark = pytest.mark.skipif(resources.toolkit() is None, reason="nvcc is not on the PATH")
SEED = 2**40 + 7


def ours(q, k, v, seed=None, **options):
    return ops.attention(q, k, v, seed=seed, return_lse=True, **options)


def case(name, shape, why, scale=1.0, **options):
    batch, queries, keys, heads, kv_heads, head_dim = shape

    def make():
        q = randn(batch, queries, heads, head_dim, scale=scale)
        k, v = randn(batch, keys, kv_heads, head_dim), randn(batch, keys, kv_heads, head_dim)
        return (q, k, v, torch.tensor(SEED)) if "dropout_p" in options else (q, k, v)

    return Case(name, ours, plain_attention.attention, make, why, options)


# (batch, queries, keys, heads, kv_heads, head_dim). Tiles are of 128 queries and 128 keys, rings of
# four at head_dim 64 and two at 128; the emulated device has four multiprocessors.
CASES = (
    case("gpt2", (1, 200, 200, 3, 3, 64), "a tile and a ragged one", causal=True),
    case("wrapped", (1, 130, 800, 1, 1, 64), "seven tiles of keys: the ring comes round",
         causal=True),
    case("more-tiles-than-blocks", (2, 300, 300, 2, 1, 64), "a block takes tiles of other heads"),
    case("half", (1, 64, 64, 1, 1, 64), "the second warpgroup has no query, the first half a tile",
         causal=True),
    case("grouped", (1, 200, 330, 4, 2, 64), "bottom-right, at no multiple of a tile", causal=True),
    case("window", (1, 200, 700, 1, 1, 64), "tiles fall out on both sides", window_size=(150, 60)),
    case("no-key", (1, 300, 100, 1, 1, 64), "a tile whose queries see nothing", causal=True),
    case("narrow", (1, 150, 150, 2, 2, 24), "columns past the head are zeros", causal=True),
    case("wide", (1, 200, 600, 1, 1, 128), "two panels; the ring of two comes round", causal=True),
    case("between", (1, 150, 150, 2, 2, 96), "the second panel is not full"),
    case("dropout", (1, 150, 200, 2, 1, 64), "its mask", causal=True, dropout_p=0.1),
    case("sharp", (1, 150, 300, 1, 1, 64), "maxima rise far and output is rescaled", scale=9.0),
)  # fmt: skip


@pytest.fixture
def hopper():
    """The kernels' module, in force: of the emulator, or of a GPU of that kind."""
    if torch.cuda.is_available():
        if torch.cuda.get_device_capability()[0] != 9:
            pytest.skip("the GPU is not of compute capability 9.0")
        with fastlm.use("cuda"), torch.device("cuda"):
            yield None
        return
    with fastlm.use("emulated:cuda:90a"):
        yield backend.load("emulated:cuda:90a", "attention")


def launched(module):
    """Names of the last call's kernels; on a GPU nobody has counted."""
    return None if module is None else [resources.readable(s.kernel) for s in module.launches]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_accurate_as_torch(case, hopper, poisoned):
    hold_to_rule(results(case.run, case.make(BF16), BF16), case, BF16)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("gpt2", "grouped", "wide")], ids=str
)
def test_as_accurate_as_torch_in_float16(case, hopper, poisoned):
    hold_to_rule(results(case.run, case.make(F16), F16), case, F16)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_detectors_find_nothing(case, hopper):
    if hopper is None:
        pytest.skip("a GPU has no detectors")
    detectors = {"races": True, "uninitialized": True, "schedule": "random", "seed": 3}
    with emulator.defaults(late_wgmma=True, **detectors):
        found = results(case.run, case.make(BF16), BF16)
    assert all(t.isfinite().all() for name, t in found.items() if name != "output 1")


LEFT = {
    "float32": lambda: [torch.randn(1, 70, 1, 64) for _ in range(3)],
    "a head_dim of no whole pack": lambda: [torch.randn(1, 70, 1, 60).to(BF16) for _ in range(3)],
    "rows at no multiple of 16 bytes": lambda: [
        torch.randn(1, 70, 1, 68).to(BF16)[..., :64] for _ in range(3)
    ],
    "a start at no multiple of 16 bytes": lambda: [
        torch.randn(70 * 64 + 1).to(BF16)[1:].view(1, 70, 1, 64) for _ in range(3)
    ],
    "an expanded batch": lambda: [
        torch.randn(1, 70, 1, 64).to(BF16).expand(2, 70, 1, 64) for _ in range(3)
    ],
}


@pytest.mark.parametrize("make", LEFT.values(), ids=LEFT)
def test_other_calls_go_to_the_kernels_of_every_device(make, hopper):
    q, k, v = make()
    found = ops.attention(q, k, v, causal=True)
    names = launched(hopper)
    assert names is None or not any("hopper" in name for name in names)
    wanted = plain_attention.attention(q.double(), k.double(), v.double(), causal=True)[0]
    assert (found.double() - wanted).abs().max() <= 0.02 * wanted.abs().max()


def test_causal_attention_computes_little_that_is_masked(hopper):
    """At GPT-2's length nine tenths of what the tensor cores do is not masked out."""
    if hopper is None:
        pytest.skip("a GPU does not count")
    length, width = 1024, 64
    q, k, v = (torch.randn(1, length, 1, width).to(BF16) for _ in range(3))
    with emulator.defaults(counters=True):
        ops.attention(q, k, v, causal=True)
    (launch,) = hopper.launches
    assert "hopper" in launch.kernel
    useful = 2 * 2 * width * length * (length + 1) // 2
    assert useful / launch.counters.tensor_operations >= 0.9
