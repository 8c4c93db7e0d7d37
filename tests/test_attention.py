"""attention against torch's scaled_dot_product_attention (math), or its plain composition."""

import plain_attention
import pytest
import torch
from accuracy import results
from cases import F32, Case, randn
from families import Families, assert_same_bits

from fastlm import ops

SEED = 2**62 + 12345  # more than 32 bits, so that both words of the key matter


def ours(q, k, v, seed=None, **options):
    return ops.attention(q, k, v, seed=seed, return_lse=True, **options)


def inputs(batch, queries, keys, heads, kv_heads, head_dim, scale, seed, value_head_dim=None):
    def make():
        q = randn(batch, queries, heads, head_dim, scale=scale)
        k = randn(batch, keys, kv_heads, head_dim)
        v = randn(batch, keys, kv_heads, value_head_dim or head_dim)
        return (q, k, v, torch.tensor(SEED)) if seed else (q, k, v)

    return make


def case(name, shape, why, scale=1.0, value_head_dim=None, **options):
    made = inputs(*shape, scale, "dropout_p" in options, value_head_dim)
    return Case(name, ours, plain_attention.attention, made, why, options)


def masked_case(name, shape, mask_shape, why, hide=None, value_head_dim=None, **options):
    """With a mask: bool, of normal numbers above `hide`, or those numbers. It gets no gradient."""
    made = inputs(*shape, 1.0, "dropout_p" in options, value_head_dim)

    generator = torch.Generator().manual_seed(3)
    mask = torch.randn(mask_shape, dtype=torch.float64, generator=generator).to(torch.bfloat16)

    def with_mask(function):
        def call(q, *others, **options):
            attn_mask = mask.to(q.device)
            attn_mask = attn_mask.to(q.dtype) if hide is None else attn_mask > hide
            return function(q, *others, attn_mask=attn_mask, **options)

        return call

    return Case(name, with_mask(ours), with_mask(plain_attention.attention), made, why, options)


def packed_case(name, lengths_q, lengths_k, why, **options):
    def offsets(lengths):
        return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)

    def make():
        tokens_q, tokens_k = sum(lengths_q), sum(lengths_k)
        q, k, v = randn(tokens_q, 4, 16), randn(tokens_k, 2, 16), randn(tokens_k, 2, 16)
        return q, k, v, offsets(lengths_q), offsets(lengths_k)

    slopes = torch.tensor([[0.5, 0.25, 0.125, 0.0625]]) * torch.arange(1, 4)[:, None]
    if options.pop("alibi", False):
        options["alibi_slopes"] = slopes

    def packed(q, k, v, cu_q, cu_k, **options):
        longest = {"max_seqlen_q": max(lengths_q), "max_seqlen_k": max(lengths_k)}
        offsets = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
        return ours(q, k, v, **offsets, **longest, **options)

    return Case(name, packed, plain_attention.packed, make, why, options)


# (batch, queries, keys, heads, kv_heads, head_dim); 70 is one block of 64 and some
SHAPE = (2, 70, 70, 4, 4, 24)
FORMS = (
    case("full", SHAPE, "no mask at all"),
    case("causal", SHAPE, "what GPT-2 runs", causal=True),
    case("grouped", (2, 70, 90, 4, 2, 24), "two query heads to a key head; bottom-right alignment",
         causal=True),
    case("window", (2, 70, 150, 2, 2, 24), "whole blocks of keys fall out on both sides",
         window_size=(9, 3)),
    case("softcap", SHAPE, "its derivative", causal=True, softcap=1.5, softmax_scale=0.7),
    case("dropout", (2, 70, 90, 4, 2, 24), "the mask comes again in backward", causal=True,
         dropout_p=0.1),
    packed_case("packed", (70, 3, 20), (70, 5, 90), "sequences of their own lengths", causal=True),
    masked_case("bool-mask", (2, 70, 90, 4, 2, 24), (2, 4, 70, 90), "keys hidden one by one", 0.5),
    masked_case("added-mask", (2, 70, 90, 4, 2, 24), (4, 70, 90), "a bias for each head, softcap "
                "before it, dropout after", softcap=5.0, causal=True, dropout_p=0.1),
    case("alibi", (2, 70, 90, 4, 2, 24), "a slope for each head", causal=True,
         alibi_slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625])),
    case("values", (2, 70, 90, 4, 2, 24), "values of another head_dim", value_head_dim=40,
         causal=True),
)  # fmt: skip
EDGES = (
    masked_case("padding", (2, 70, 90, 2, 2, 16), (2, 1, 1, 90), "keys hidden for all", 1.0),
    masked_case("hidden-rows", (1, 70, 6, 2, 2, 16), (1, 1, 70, 6), "queries that see no key", 1.0),
    masked_case("few-queries-masked", (2, 3, 100, 4, 2, 24), (2, 4, 3, 100), "the decoding kernel",
                value_head_dim=20, causal=True),
    case("few-queries-alibi", (2, 3, 100, 4, 2, 24), "the decoding kernel", causal=True,
         alibi_slopes=torch.tensor([[0.5, 0.25, 0.125, 0.0625]] * 2) * torch.tensor([[1], [2]])),
    packed_case("packed-alibi", (70, 3, 20), (70, 5, 90), "slopes of each sequence", alibi=True),
    case("wide-values", (1, 70, 70, 2, 2, 24), "values wider than keys", value_head_dim=130),
    case("no-head-dim", (1, 5, 70, 2, 2, 0), "scores of zero", value_head_dim=16),
    case("soft-cap-50", (1, 70, 70, 2, 2, 128), "large scores, whose lse is rounded in float32",
         scale=9.0, softcap=50.0),
    case("large-scores", (1, 70, 70, 2, 2, 64), "scores in the hundreds, without a softcap",
         scale=30.0),

    case("one-by-one", (1, 1, 1, 1, 1, 1), "one query, one key, one element"),
    case("wide-heads", (1, 70, 70, 2, 2, 130), "head_dim past two whole 64s", causal=True),
    case("narrow-heads", (1, 70, 70, 2, 2, 3), "head_dim shorter than any vector"),
    *(case(f"queries-{n}", (1, n, n, 2, 2, 16), "around a block of 64", causal=True)
      for n in (63, 64, 65, 129)),
    case("few-queries", (2, 3, 100, 4, 2, 24), "the decoding kernel", causal=True),
    case("few-queries-softcap", (2, 3, 100, 4, 2, 24), "the decoding kernel", causal=True,
         softcap=1.5, window_size=(40, 0)),
    case("more-queries-than-keys", (1, 90, 20, 2, 2, 16),
         "the first 70 queries see no key: 0, lse = -inf and gradients of 0", causal=True),
    case("one-head", (1, 200, 900, 1, 1, 16), "keys are sliced among threads, and dq is summed"),
    case("all-dropped", SHAPE, "p = 1 scales by 0, not by 1 / 0", dropout_p=1.0),
    case("half-dropped-softcap", SHAPE, "both derivatives at once", dropout_p=0.5, softcap=1.5),
    case("sharp", SHAPE, "scores to 20 apart: one key has nearly all", scale=5.0),
    case("no-batch", (0, 70, 70, 2, 2, 16), "an empty batch"),
    case("no-keys", (2, 70, 0, 2, 2, 16), "every query sees nothing"),
    case("no-queries", (2, 0, 70, 2, 2, 16), "dk and dv are zero, not what memory held"),
    packed_case("packed-empty", (70, 0, 20), (0, 5, 20), "sequences without queries or keys"),
    packed_case("packed-window", (100, 30), (100, 30), "windows end with their sequence",
                window_size=(20, 7)),
)  # fmt: skip


class TestFamilies(Families):
    forms, edges = FORMS, EDGES


@pytest.mark.parametrize("queries", [3, 150], ids=["decoding", "blocks"])
def test_future_tokens_do_not_change_the_past(queries, cpp):
    q, k, v = (torch.randn(2, n, 2, 24) for n in (queries, 150, 150))
    last = 150 - queries + 1  # the second query's position and all before it stay
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[:, last + 1 :], changed_v[:, last + 1 :] = 7.0, -7.0
    before, after = (ops.attention(q, *kv, causal=True) for kv in ((k, v), (changed_k, changed_v)))
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.equal(before[:, 2:], after[:, 2:])


def test_no_gradient_comes_from_the_future(cpp):
    q, k, v = (torch.randn(1, 150, 2, 24, requires_grad=True) for _ in range(3))
    ops.attention(q, k, v, causal=True)[:, :100].sum().backward()
    for t in (q, k, v):
        assert t.grad[:, 100:].count_nonzero() == 0
        assert t.grad[:, :100].abs().amin((0, 2, 3)).max() > 0


def test_sequences_of_a_pack_do_not_see_each_other(cpp):
    q, k, v = (torch.randn(90, 2, 16) for _ in range(3))
    offsets = torch.tensor([0, 70, 90], dtype=torch.int32)
    together = ops.attention(q, k, v, cu_seqlens_q=offsets, cu_seqlens_k=offsets)
    alone = torch.tensor([0, 20], dtype=torch.int32)
    last = ops.attention(q[70:], k[70:], v[70:], cu_seqlens_q=alone, cu_seqlens_k=alone)
    assert torch.equal(together[70:], last)


def test_longest_lengths_need_not_be_told(backend):
    q, k, v = (torch.randn(90, 2, 16) for _ in range(3))
    offsets = {name: torch.tensor([0, 70, 90], dtype=torch.int32)
               for name in ("cu_seqlens_q", "cu_seqlens_k")}  # fmt: skip
    told = ops.attention(q, k, v, **offsets, max_seqlen_q=70, max_seqlen_k=70)
    assert torch.equal(ops.attention(q, k, v, **offsets), told)


def test_seed_comes_from_torchs_generator():
    q, k, v = (torch.randn(1, 20, 2, 16) for _ in range(3))
    torch.manual_seed(5)
    first, second = (ops.attention(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(ops.attention(q, k, v, dropout_p=0.5), first)
    assert not torch.equal(first, second)


def test_heads_of_one_projection_need_no_copy(cpp):
    """q, k and v as GPT-2 has them: slices of one tensor, whose gradient comes back in one."""
    qkv = torch.randn(2, 70, 3 * 4 * 16)

    def sliced(qkv):
        q, k, v = qkv.view(2, 70, 3, 4, 16).unbind(2)
        return ops.attention(q, k, v, causal=True)

    def copied(qkv):
        q, k, v = (t.contiguous() for t in qkv.view(2, 70, 3, 4, 16).unbind(2))
        return ops.attention(q, k, v, causal=True)

    assert_same_bits(results(sliced, (qkv,), F32), results(copied, (qkv,), F32))


X, OFFSETS = torch.zeros(2, 5, 4, 8), torch.tensor([0, 5], dtype=torch.int32)
BAD = {
    "q: expected (batch, sequence, heads, head_dim)": lambda f: f(X[0], X, X),
    "k: expected (batch, sequence, heads, head_dim) of torch.float32": lambda f: f(
        X, X.double(), X
    ),
    "v: expected (batch, sequence, heads, head_dim) of torch.float32 on cpu": lambda f: f(
        X, X, X.to("meta")
    ),
    "k: expected q's head_dim 8, got 4": lambda f: f(X, X[..., :4], X[..., :4]),
    "k, v: expected equal shapes but for head_dim": lambda f: f(X, X, X[:, :3]),
    "softcap: expected a number of at least 0, or None, got -1": lambda f: f(X, X, X, softcap=-1),
    "softcap: expected a number of at least 0, or None, got nan": lambda f: f(
        X, X, X, softcap=float("nan")
    ),
    "attn_mask: expected bool or a floating-point dtype": lambda f: f(
        X, X, X, attn_mask=torch.zeros(5, 5).long()
    ),
    "attn_mask: expected a shape that broadcasts to (batch, heads, queries, keys)": lambda f: f(
        X, X, X, attn_mask=torch.zeros(5, 4)
    ),
    "attn_mask: expected None with cu_seqlens_q": lambda f: f(
        X[0], X[0], X[0], cu_seqlens_q=OFFSETS, cu_seqlens_k=OFFSETS, attn_mask=torch.zeros(5, 5)
    ),
    "alibi_slopes: expected (heads) = (4,) or (batch, heads) = (2, 4), got (3,)": lambda f: f(
        X, X, X, alibi_slopes=torch.zeros(3)
    ),
    "k: expected a number of heads that divides q's 4, got 3": lambda f: f(
        X, X[:, :, :3], X[:, :, :3]
    ),
    "k: expected q's batch 2, got 1": lambda f: f(X, X[:1], X[:1]),
    "dropout_p: expected a probability": lambda f: f(X, X, X, dropout_p=-1),
    "cu_seqlens_k: expected int32 (batch + 1) offsets, got None": lambda f: f(
        X[0], X[0], X[0], cu_seqlens_q=OFFSETS
    ),
    "cu_seqlens_q: expected offsets that rise from 0 to 5": lambda f: f(
        X[0], X[0], X[0], cu_seqlens_q=OFFSETS + 1, cu_seqlens_k=OFFSETS
    ),
    "cu_seqlens_q: expected offsets that rise from 0 to 5 by at most 4": lambda f: f(
        X[0], X[0], X[0], cu_seqlens_q=OFFSETS, cu_seqlens_k=OFFSETS, max_seqlen_q=4
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(ValueError) as found:
        BAD[message](ops.attention)
    assert f"attention: {message}" in str(found.value)
