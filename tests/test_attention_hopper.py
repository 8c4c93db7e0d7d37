"""attention in Gluon for Hopper: its numbers, its pipeline under the detectors, and how little of
what it computes is masked out. On a GPU of compute capability 9.0, and in the emulator elsewhere.

What the kernel does not take is in test_backend.py and, by name, in REFUSED here.
"""

import pytest
import torch
from accuracy import forward, results
from cases import BF16, F16
from families import hold_to_rule
from fastlm.kernels import attention_hopper, launch
from fastlm.kernels.attention_hopper_forward import attention_hopper_forward_kernel
from test_attention import EDGES, FORMS, case

import fastlm
from fastlm import emulator, ops

# Through tiles of 128 queries and 128 keys, of which three (two in wide heads) are in flight.
LONG = (
    case("five-tiles", (1, 600, 600, 2, 2, 64), "every stage comes twice; a ragged end of each "
         "side; both warpgroups' ends of the diagonal", causal=True),
    case("window", (1, 300, 700, 2, 1, 64), "tiles fall out at both ends, and the two warpgroups "
         "begin and end in different ones", window_size=(150, 40)),
    case("grouped", (2, 200, 333, 4, 2, 64), "no mask but the end of the keys"),
    case("wide", (1, 300, 550, 2, 1, 128), "one q and two tiles of keys are in flight",
         causal=True),
)  # fmt: skip
FORWARD = {
    c.name: c for c in EDGES
    if c.name in ("queries-63", "queries-64", "queries-65", "queries-129", "few-queries",
                  "more-queries-than-keys", "sharp", "no-batch", "no-keys", "no-queries")
}  # fmt: skip
# With gradients, of which Triton's kernels take care, from this forward's residuals.
BACKWARD = {c.name: c for c in FORMS if c.name in ("full", "causal", "grouped", "window")}
DTYPES = pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])


def output(case, dtype):
    outputs, _ = forward(case.run, case.make(dtype))
    return {f"output {i}": o.detach() for i, o in enumerate(outputs)}


@DTYPES
@pytest.mark.parametrize("name", FORWARD)
def test_as_accurate_as_torch(name, dtype, gluon, poisoned):
    hold_to_rule(output(FORWARD[name], dtype), FORWARD[name], dtype)


@pytest.mark.parametrize("long", LONG, ids=str)
def test_long_sequences(long, gluon, poisoned):
    hold_to_rule(output(long, BF16), long, BF16)


@pytest.mark.parametrize("name", BACKWARD)
def test_gradients(name, gluon, poisoned):
    form = BACKWARD[name]
    hold_to_rule(results(form.run, form.make(BF16), BF16), form, BF16)


def test_one_query_and_one_key(gluon):
    q, k, v = (torch.randn(1, 1, 1, 64).bfloat16() for _ in range(3))
    o, lse = ops.attention(q, k, v, return_lse=True)
    assert torch.equal(o, v)
    assert lse.item() == pytest.approx((q.double() * k.double()).sum().item() / 8, abs=1e-6)


def test_heads_of_one_projection_need_no_copy(gluon):
    """q, k and v as GPT-2 has them: slices of one tensor, described with its strides."""
    q, k, v = torch.randn(2, 70, 3, 4, 64).bfloat16().unbind(2)
    sliced = ops.attention(q, k, v, causal=True)
    assert torch.equal(sliced, ops.attention(*(t.clone() for t in (q, k, v)), causal=True))


def test_a_sequence_does_not_read_its_neighbours(gluon):
    """Rows past its end belong to the next sequence, and are zero in a tile all the same."""
    q, k, v = (torch.randn(2, 70, 2, 64).bfloat16() for _ in range(3))
    alone = ops.attention(q[:1], k[:1], v[:1])
    for t in (q, k, v):
        t[1] = torch.inf
    assert torch.equal(ops.attention(q, k, v)[:1], alone)


def sixteen(*shape):
    return torch.zeros(*shape).bfloat16()


REFUSED = {
    "softcap": lambda: ops.attention(*[sixteen(1, 4, 2, 64)] * 3, softcap=2.0),
    "dropout": lambda: ops.attention(*[sixteen(1, 4, 2, 64)] * 3, dropout_p=0.5),
    "packed sequences": lambda: ops.attention(
        *[sixteen(4, 2, 64)] * 3, cu_seqlens_q=OFFSETS, cu_seqlens_k=OFFSETS
    ),
    "cache lengths": lambda: ops.attention_with_kvcache(*[sixteen(1, 4, 2, 64)] * 3),
    "a softmax_scale that is not positive": lambda: ops.attention(
        *[sixteen(1, 4, 2, 64)] * 3, softmax_scale=0.0
    ),
    "rows that do not begin at multiples of 16 bytes": lambda: ops.attention(
        *[sixteen(1, 4, 2, 68)[..., :64]] * 3
    ),
}
OFFSETS = torch.tensor([0, 4], dtype=torch.int32)


@pytest.mark.parametrize("need", REFUSED)
def test_what_it_does_not_take_is_an_error(need):
    with fastlm.use("emulated:gluon"), pytest.raises(fastlm.BackendUnavailable) as refused:
        REFUSED[need]()
    assert f"gluon: does not take {need}" in str(refused.value)


def test_an_odd_address_is_an_error():
    """A tensor cannot tell where its memory begins while it is traced; at the launch it can."""
    t = sixteen(4 * 2 * 64 + 1)
    odd = torch.frombuffer(bytearray(t.nbytes), dtype=BF16, offset=2).view(1, 4, 2, 64)
    assert odd.data_ptr() % 16
    with fastlm.use("emulated:gluon"), pytest.raises(ValueError, match="attention: k: on gluon"):
        ops.attention(sixteen(1, 4, 2, 64), odd, odd)


def in_emulator(monkeypatch, **options):
    """A launcher through which every launch of the kernel goes, on a device of one multiprocessor:
    it goes through all tiles in one block.
    """
    launcher = emulator.triton_launcher(
        attention_hopper_forward_kernel, arch=90, late_wgmma=True, **options
    )
    monkeypatch.setattr(launch, "emulate", lambda kernel: launcher)
    monkeypatch.setattr(attention_hopper, "_EMULATED_MULTIPROCESSORS", 1)
    return launcher


def run_emulated(q, k, v):
    o = torch.full_like(q, torch.nan)
    lse = torch.zeros(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float64)
    options = attention_hopper.AttentionOptions(*[None] * 6, 0, 0, 0.125, 0.0, -1, 0, 0.0)
    attention_hopper.attention_forward(o, lse, q, k, v, options, 0)
    return {"output 0": o, "output 1": lse}


PIPELINED = (
    case("long", (1, 300, 700, 2, 1, 64), "six tiles of keys through three stages, and six tiles "
         "of queries through two", causal=True),
    case("short", (1, 600, 100, 1, 1, 64), "one tile of keys to a tile of queries: those are "
         "loaded far ahead", causal=True),
)  # fmt: skip


@pytest.mark.parametrize("pipelined", PIPELINED, ids=str)
def test_detectors_find_nothing(pipelined, monkeypatch):
    """What a product or a copy is still to bring is NaN, and what is overwritten too early shows in
    the numbers.
    """
    in_emulator(monkeypatch, races=True, uninitialized=True, schedule="random", seed=3)
    hold_to_rule(run_emulated(*pipelined.make(BF16)), pipelined, BF16)


def test_little_is_computed_that_is_masked_and_all_is_read_by_tma(monkeypatch):
    launcher = in_emulator(monkeypatch, counters=True)
    length, width = 1024, 64
    q, k, v = (torch.randn(1, length, 1, width).bfloat16() for _ in range(3))
    run_emulated(q, k, v)
    c = launcher.counters
    useful = 2 * 2 * width * length * (length + 1) // 2
    assert useful / c.tensor_operations >= 0.85
    assert (c.global_read, c.global_written) == (0, 8 * length)  # lse; TMA is not counted
    assert c.shared_conflicts == c.matrix_conflicts == 0
