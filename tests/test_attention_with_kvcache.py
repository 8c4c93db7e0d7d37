"""attention_with_kvcache: the append, and attention over what the cache then holds.

The op writes its input and has no backward, so that the families are written out for it here.
"""

import plain_attention
import pytest
import torch
from accuracy import assert_as_accurate_as_torch, cast
from cases import BF16, F32, F64, randn
from families import BackendReplaced, Recorder, assert_same_bits

import fastlm
from fastlm import ops

BATCH, CAPACITY, HEADS, KV_HEADS, HEAD_DIM = 3, 150, 4, 2, 24
LENGTHS = (0, 71, 130)  # an empty cache, and past one and two 64s
OPTIONS = {
    "GPT-2's": {},
    "everything": {"window_size": (40, 0), "softcap": 1.5, "softmax_scale": 0.7},
}
NEW = {"one token": 1, "a few, by the decoding kernel": 7, "many, by the block kernel": 20}


def lengths():
    """As the op takes them, on the default device."""
    return torch.tensor(LENGTHS, dtype=torch.int32)


def inputs(new, dtype):
    q = randn(BATCH, new, HEADS, HEAD_DIM)
    k, v = (randn(BATCH, new, KV_HEADS, HEAD_DIM) for _ in "kv")
    k_cache, v_cache = (randn(BATCH, CAPACITY, KV_HEADS, HEAD_DIM) for _ in "kv")
    for b, length in enumerate(LENGTHS):  # what lies past the keys in use must not be read
        k_cache[b, length:], v_cache[b, length:] = torch.nan, torch.nan
    return cast((q, k_cache, v_cache, k, v), dtype)


def plain(q, k_cache, v_cache, k, v, **options):
    """Each sequence alone, with its keys put together."""
    rows = []
    for b, length in enumerate(LENGTHS):
        keys, values = (
            torch.cat([cache[b, :length], new[b]])[None]
            for cache, new in ((k_cache, k), (v_cache, v))
        )
        options = {"causal": "window_size" not in options, **options}
        rows.append(plain_attention.attention(q[b : b + 1], keys, values, **options)[0])
    return torch.cat(rows)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("new", NEW.values(), ids=NEW)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_as_accurate_as_torch(dtype, new, options, backend, poisoned):
    given = inputs(new, dtype)
    theirs, truth = plain(*given, **options), plain(*cast(given, F64), **options)
    o = ops.attention_with_kvcache(*given, lengths(), **options)
    assert_as_accurate_as_torch(o, theirs, truth, "output")


def test_wide_heads(backend, poisoned):
    """Of 256 float32, the widest: a lane of the CUDA kernel has two packs of them."""
    q, k_cache, v_cache = randn(2, 2, 4, 256), randn(2, 100, 2, 256), randn(2, 100, 2, 256)
    given = cast((q, k_cache, v_cache), F32)
    theirs, truth = (
        plain_attention.attention(*t, causal=True)[0] for t in (given, cast(given, F64))
    )
    o = ops.attention_with_kvcache(*given, cache_seqlens=100)
    assert_as_accurate_as_torch(o, theirs, truth, "output")


def test_append_writes_its_place_and_nothing_else(backend):
    q, k_cache, v_cache, k, v = inputs(7, F32)
    k_cache, v_cache = torch.randn_like(k_cache), torch.randn_like(v_cache)
    before, versions = (k_cache.clone(), v_cache.clone()), (k_cache._version, v_cache._version)
    ops.attention_with_kvcache(q, k_cache, v_cache, k, v, lengths())
    for cache, old, new in zip((k_cache, v_cache), before, (k, v), strict=True):
        for b, length in enumerate(LENGTHS):
            old[b, length : length + 7] = new[b]
        assert torch.equal(cache, old)
    assert k_cache._version > versions[0] and v_cache._version > versions[1]


def test_inputs_are_not_modified(backend):
    given = inputs(3, F32)
    q, k, v, in_use = given[0].clone(), given[3].clone(), given[4].clone(), lengths()
    ops.attention_with_kvcache(*given, in_use)
    wanted = (given[0], given[3], given[4], lengths())
    assert_same_bits(dict(enumerate((q, k, v, in_use))), dict(enumerate(wanted)))


@pytest.mark.parametrize("new", [1, 5, 20])
def test_token_by_token_is_all_at_once(new, cpp):
    """What generation relies on, with other kernels for other numbers of queries."""
    q = torch.randn(2, 60, HEADS, HEAD_DIM)
    k, v = (torch.randn(2, 60, KV_HEADS, HEAD_DIM) for _ in "kv")
    k_cache, v_cache = (torch.full((2, 64, KV_HEADS, HEAD_DIM), torch.nan) for _ in "kv")
    steps = []
    for at in range(0, 60, new):
        now = slice(at, at + new)
        steps.append(
            ops.attention_with_kvcache(q[:, now], k_cache, v_cache, k[:, now], v[:, now], at)
        )
    truth = plain_attention.attention(q.double(), k.double(), v.double(), causal=True)[0]
    theirs = plain_attention.attention(q, k, v, causal=True)[0]
    assert_as_accurate_as_torch(torch.cat(steps, 1), theirs, truth, "all steps")


def test_full_cache_without_append(backend):
    q, k_cache, v_cache = inputs(1, F32)[:3]
    k_cache, v_cache = k_cache.nan_to_num(), v_cache.nan_to_num()
    o = ops.attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=CAPACITY)
    torch.testing.assert_close(o, ops.attention(q, k_cache, v_cache, causal=True))


def test_empty_cache_gives_zero(backend):
    q, k_cache, v_cache = inputs(1, F32)[:3]
    assert ops.attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=0).count_nonzero() == 0


def test_caches_of_any_layout(cpp):
    """(batch, heads, sequence, head_dim) in memory, seen as this op wants it."""
    q, k_cache, v_cache, k, v = inputs(3, F32)
    other = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k_cache, v_cache)]
    expected = ops.attention_with_kvcache(q, k_cache, v_cache, k, v, lengths())
    assert torch.equal(ops.attention_with_kvcache(q, *other, k, v, lengths()), expected)
    assert torch.equal(other[0].nan_to_num(), k_cache.nan_to_num())


def test_deterministic_with_any_number_of_threads(cpp, threads):
    found = []
    for count in (1, 2, 3, 2):
        threads(count)
        torch.manual_seed(0)
        found.append(ops.attention_with_kvcache(*inputs(20, F32), lengths()))
    assert all(torch.equal(o, found[0]) for o in found)


def test_opcheck():
    with Recorder() as recorder:
        ops.attention_with_kvcache(*(t.nan_to_num() for t in inputs(3, F32)), lengths())
    names = [op.name() for op, _ in recorder.calls]
    assert names == ["fastlm::cache_append", "fastlm::attention_forward"]
    for op, arguments in recorder.calls:
        torch.library.opcheck(op, arguments)


def test_compiled_whole_and_dynamic():
    torch._dynamo.reset()
    call = ops.attention_with_kvcache
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    given = inputs(3, F32)
    again = [t.clone() for t in given]
    expected = call(*given, lengths())
    assert torch.equal(compiled(*again, lengths()), expected)
    assert torch.equal(again[1].nan_to_num(), given[1].nan_to_num())


def test_meta_device():
    given = [t.to("meta") for t in inputs(3, BF16)]
    o = ops.attention_with_kvcache(*given, lengths().to("meta"))
    assert (o.shape, o.dtype) == (given[0].shape, BF16)


def test_backends_share_a_cache():
    """Appended by one, read by the other."""
    given = inputs(3, F32)
    expected = plain(*cast(given, F64))
    for name in ("torch", "cpp"):
        q, k_cache, v_cache, k, v = (t.clone() for t in given)
        other = {"torch": "cpp", "cpp": "torch"}[name]
        with fastlm.use(name):
            ops.attention_with_kvcache(q, k_cache, v_cache, k, v, lengths())
        with BackendReplaced(other):
            o = ops.attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths() + 3)
        assert_as_accurate_as_torch(o, plain(*given), expected, f"{name}, then {other}")


def test_no_backward():
    given = [t.requires_grad_() for t in inputs(1, F32)]
    assert not ops.attention_with_kvcache(*given, lengths()).requires_grad


Q, CACHE, K = torch.zeros(3, 2, 4, 8), torch.zeros(3, 10, 2, 8), torch.zeros(3, 2, 2, 8)
BAD = {
    "sequence 1 holds 9 keys and gets 2; the cache has room for 10": (
        IndexError,
        lambda f: f(Q, CACHE, CACHE, K, K, torch.tensor([0, 9, 0], dtype=torch.int32)),
    ),
    "sequence 2 holds -1 keys": (
        IndexError,
        lambda f: f(Q, CACHE, CACHE, K, K, torch.tensor([0, 0, -1], dtype=torch.int32)),
    ),
    "sequence 0 has 11 keys in use; accepted are 0 to 10": (
        IndexError,
        lambda f: f(Q, CACHE, CACHE, cache_seqlens=11),
    ),
    "cache_seqlens: expected int32 (3,), got torch.int64 (3,)": (
        ValueError,
        lambda f: f(Q, CACHE, CACHE, K, K, torch.zeros(3, dtype=torch.int64)),
    ),
    "k, v: expected both or neither": (ValueError, lambda f: f(Q, CACHE, CACHE, K)),
    "k: expected (batch, sequence, heads, head_dim) of torch.float32": (
        ValueError,
        lambda f: f(Q, CACHE, CACHE, K.double(), K.double()),
    ),
    "k: expected the cache's heads and head_dim": (
        ValueError,
        lambda f: f(Q, CACHE, CACHE, K[:, :, :1], K[:, :, :1]),
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, cpp):
    error, call = BAD[message]
    before = CACHE.clone()
    with pytest.raises(error) as found:
        call(ops.attention_with_kvcache)
    assert message in str(found.value)
    assert torch.equal(CACHE, before)
