"""Random calls of every public op, and what torch has for each."""

from dataclasses import dataclass, field, fields
from functools import partial
from math import prod

import philox
import plain_attention
import torch
from cases import F64, LAYOUTS, randn
from hypothesis import strategies as st
from rounding import stored
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastlm import ops

INF, NAN = float("inf"), float("nan")


# ---- a call ----


@dataclass(frozen=True)
class Input:
    """One tensor. Its numbers follow from these words and the seed of its call."""

    shape: tuple[int, ...] = ()
    fill: str = "normal"
    layout: str = "contiguous"
    values: int | tuple[int, ...] | None = None  # integers; takes the place of `shape` and `fill`
    limit: int = 0  # the classes, where `fill` is "classes"; some rows hold `ignored`
    ignored: int = -100
    grad: bool = True

    def __repr__(self) -> str:
        given = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]
        words = [f"{name}={value!r}" for name, value, usual in given if value != usual]
        return f"Input({', '.join(words)})"


@dataclass(frozen=True)
class Call:
    op: str
    dtype: str
    inputs: dict[str, Input]
    options: dict = field(default_factory=dict)
    upstream: str = "random"  # or "transposed"; or "ones", expanded, as sum() gives it
    seed: int = 0

    def make(self) -> dict[str, Tensor]:
        """The inputs in the call's dtype, each in its layout."""
        dtype = getattr(torch, self.dtype)
        with torch.random.fork_rng([]), torch.device("cpu"):
            torch.default_generator.manual_seed(self.seed)
            return {name: _made(given, dtype) for name, given in self.inputs.items()}

    def ours(self, **inputs):
        result = getattr(ops, self.op)(**inputs, **self.options)
        if self.op == "attention_with_kvcache":
            return result, inputs["k_cache"], inputs["v_cache"]
        return result

    def theirs(self, **inputs):
        """The same in torch's ops, in the dtype of `inputs`: float64 for the truth."""
        return TORCH[self.op](**inputs, **self.options)


def _made(given: Input, dtype: torch.dtype) -> Tensor:
    if given.values is not None:
        whole = isinstance(given.values, int)
        return torch.tensor(given.values, dtype=torch.int64 if whole else torch.int32)
    t = _FILLS[given.fill](given)
    t = t.to(dtype) if t.is_floating_point() else t
    if given.fill == "nan" and t.numel() and dtype == torch.float32:
        payload = (0x7FC00000, 0x7FC00001, 0x7FFFFFFF, -0x3FFFFF)[t.numel() % 4]
        t.view(torch.int32).view(-1)[_somewhere(t)] = payload
    return _LAYOUTS[given.layout](t)


def _somewhere(t: Tensor) -> int:
    return int(torch.randint(t.numel(), ()))


def _one(value: float, given: Input) -> Tensor:
    t = randn(*given.shape)
    if t.numel():
        t.view(-1)[_somewhere(t)] = value
    return t


def _some(value: float, given: Input) -> Tensor:
    """But not the first of a row: a row of -inf alone is NaN."""
    chosen = torch.rand(given.shape) < 0.3
    chosen[..., :1] = False
    return randn(*given.shape).masked_fill_(chosen, value)


def _classes(given: Input) -> Tensor:
    t = torch.randint(given.limit, given.shape)
    return torch.where(torch.rand(given.shape) < 0.2, given.ignored, t)


def _probabilities(given: Input) -> Tensor:
    return randn(*given.shape).softmax(1 if len(given.shape) > 1 else 0)


_FILLS = {
    "normal": lambda given: randn(*given.shape),
    "large": lambda given: randn(*given.shape, scale=30.0),
    "huge": lambda given: randn(*given.shape, scale=1e30),
    "tiny": lambda given: randn(*given.shape, scale=1e-20),
    "denormal": lambda given: randn(*given.shape, scale=1e-40),
    "far": lambda given: randn(*given.shape, shift=1000.0),
    "constant": lambda given: randn(*given.shape[:-1], 1, scale=1000.0).expand(given.shape),
    "zero": lambda given: torch.zeros(given.shape, dtype=F64),
    "nan": partial(_one, NAN),
    "inf": partial(_one, INF),
    "-inf": partial(_one, -INF),
    "masked": partial(_some, -INF),
    "lowest": partial(_some, -1e9),
    "hidden": lambda given: randn(*given.shape).masked_fill_(
        torch.arange(given.shape[-1]) < given.shape[-1] // 2, -INF
    ),
    "slopes": lambda given: torch.randint(256, given.shape).double() / 256,
    "seen": lambda given: torch.rand(given.shape) < 0.7,
    "classes": _classes,
    "kept": lambda given: torch.randint(given.limit, given.shape),
    "probabilities": _probabilities,
}
_LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    **{layout.__name__: layout for layout in LAYOUTS},
    # Every index of the first dimension is the same memory.
    "expanded": lambda t: t[:1].contiguous().expand(t.shape) if t.dim() > 1 else t,
}


# ---- what torch has for it: in the call's dtype and, for the truth, in float64 ----


def _add_layer_norm(x, residual, weight=None, bias=None, seed=None, eps=1e-5, dropout_p=0.0):
    wide = torch.promote_types(x.dtype, torch.float32)
    kept = _dropout(x.to(wide), seed=seed, p=dropout_p) if dropout_p else x.to(wide)
    added = stored((kept + residual.to(wide)).to(x.dtype))  # rounded once
    return F.layer_norm(added, x.shape[-1:], weight, bias, eps), added


def _dropout(input, seed, p):
    columns = input.shape[-1]
    rows = input.numel() // max(columns, 1)
    return input * philox.factors(seed, rows, columns, p).view(input.shape).to(input.dtype)


def _gelu(input, bias=None, approximate="none"):
    return F.gelu(input if bias is None else input + bias, approximate=approximate)


def _cross_entropy(
    input, target, weight=None, softcap=None, lse_square_scale=0.0, inplace_backward=False,
    **options,
):  # fmt: skip
    wide = torch.promote_types(input.dtype, torch.float32)
    input, weight = input.to(wide), None if weight is None else weight.to(wide)
    target = target.to(wide) if target.is_floating_point() else target
    z = plain_attention.capped(input, softcap)
    loss = F.cross_entropy(z, target, weight, **options)
    if not lse_square_scale:
        return loss
    ignored = target == options.get("ignore_index", -100)
    squares = z.logsumexp(min(z.dim() - 1, 1)).square().masked_fill(ignored, 0)
    if options.get("reduction", "mean") == "none":
        return loss + lse_square_scale * squares
    if options.get("reduction", "mean") == "mean":
        classes = z.shape[1] if z.dim() > 1 else z.shape[0]
        weights = z.new_ones(classes) if weight is None else weight
        kept = weights[target.masked_fill(ignored, 0)].masked_fill(ignored, 0)
        return loss + lse_square_scale * squares.sum() / kept.sum()
    return loss + lse_square_scale * squares.sum()


def _linear_cross_entropy(input, linear_weight, target, linear_bias=None, **options):
    logits = stored(F.linear(input, linear_weight, linear_bias))
    loss = _cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1), **options)
    return loss.view(target.shape) if options.get("reduction") == "none" else loss


def _attention(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, return_lse=False, **options):
    if cu_seqlens_q is None:
        o, lse = plain_attention.attention(q, k, v, **options)
    else:
        slopes = options.pop("alibi_slopes", None)
        if slopes is not None:
            options["alibi_slopes"] = slopes.expand(cu_seqlens_q.numel() - 1, q.shape[1])
        o, lse = plain_attention.packed(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)
    return (o, lse) if return_lse else o


def _attention_with_kvcache(
    q, k_cache, v_cache, cache_seqlens, k=None, v=None, attn_mask=None, alibi_slopes=None, **options
):  # fmt: skip
    """Sequence by sequence."""
    heads = q.shape[2]
    shape = (q.shape[0], heads, q.shape[1], k_cache.shape[1])
    mask = None if attn_mask is None else attn_mask.expand(shape)
    slopes = None if alibi_slopes is None else alibi_slopes.expand(q.shape[0], heads)
    outputs = []
    for b, length in enumerate(cache_seqlens.tolist()):
        if k is not None:
            k_cache[b, length : length + k.shape[1]] = k[b]
            v_cache[b, length : length + k.shape[1]] = v[b]
            length += k.shape[1]
        o, _ = plain_attention.attention(
            q[b : b + 1], k_cache[b : b + 1, :length], v_cache[b : b + 1, :length],
            attn_mask=None if mask is None else mask[b : b + 1, :, :, :length],
            alibi_slopes=None if slopes is None else slopes[b : b + 1],
            **{"causal": True, **options},
        )  # fmt: skip
        outputs.append(o)
    o = torch.cat(outputs) if outputs else q.new_zeros(*q.shape[:-1], v_cache.shape[-1])
    return o, k_cache, v_cache


def _sdpa(query, key, value, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )


TORCH = {
    "layer_norm": F.layer_norm,
    "add_layer_norm": _add_layer_norm,
    "rms_norm": F.rms_norm,
    "gelu": _gelu,
    "dropout": _dropout,
    "linear": F.linear,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "attention": _attention,
    "attention_with_kvcache": _attention_with_kvcache,
    "scaled_dot_product_attention": _sdpa,
}


# ---- what is drawn ----

_SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 255,
          256, 257, 511, 768, 1000, 2047, 2049, 4097)  # fmt: skip
_HEAD_DIMS = (1, 2, 3, 8, 16, 20, 32, 40, 64, 72, 80, 96, 128, 192, 256, 0)
_RARE = ("large", "huge", "tiny", "denormal", "far", "constant", "zero", "nan", "inf", "-inf")
_FINITE = _RARE[:-3]
# A query and a key of 1e30 have a score of 1e60.
_SCORED = tuple(fill for fill in _FINITE if fill != "huge")
_LOGITS = ("masked", "lowest", "hidden", *_RARE)


class Draw:
    """What the strategies share. `most` bounds the elements of one tensor."""

    def __init__(self, draw, most: int):
        self.of, self.most = draw, most

    def one(self, *values):
        return self.of(st.sampled_from(values))

    def often(self, usual, *others):
        """`usual` in two draws of three."""
        return self.of(st.sampled_from((usual, usual, None))) or self.one(*others)

    def chance(self) -> bool:
        return self.of(st.booleans())

    def size(self, room: int, sizes=_SIZES) -> int:
        return self.one(*[n for n in sizes if n <= max(room, 1)])

    def input(self, *shape: int, rare=_RARE, layouts=tuple(_LAYOUTS), **more) -> Input:
        layout = self.often("contiguous", *layouts)
        return Input(shape, self.often("normal", *rare), layout, **more)

    def parameter(self, *shape: int) -> Input:
        return self.input(*shape, rare=("large", "tiny", "zero"))

    def maybe(self, inputs: dict, **optional: Input) -> dict:
        """`inputs` with each of the optional ones, or without."""
        return inputs | {name: given for name, given in optional.items() if self.chance()}

    def rows(self, columns: int) -> tuple[int, ...]:
        """Dimensions in front of that many columns."""
        room = self.most // max(columns, 1)
        leading = []
        for _ in range(self.one(1, 1, 0, 2, 3)):
            leading.append(self.size(room))
            room //= max(leading[-1], 1)
        return tuple(leading)

    def seed(self) -> Input:
        return Input(values=self.one(0, 1, 2**31, 2**63 - 1, -1, 12345))


def _draw_layer_norm(d: Draw):
    sizes = (d.size(d.most),)
    if d.chance() and sizes[0] <= 64:
        sizes = (d.one(1, 2, 3, 5), *sizes)
    inputs = {"input": d.input(*d.rows(prod(sizes)), *sizes)}
    inputs = d.maybe(inputs, weight=d.parameter(*sizes), bias=d.parameter(*sizes))
    return inputs, {"normalized_shape": sizes, "eps": d.one(1e-5, 1e-12, 0.1)}


def _draw_rms_norm(d: Draw):
    inputs, options = _draw_layer_norm(d)
    inputs.pop("bias", None)
    return inputs, options


def _draw_add_layer_norm(d: Draw):
    columns = d.size(d.most)
    shape = (*d.rows(columns), columns)
    # A sum that bfloat16 rounds to a constant row has a gradient of another size than its truth.
    rare = tuple(fill for fill in _RARE if fill not in ("constant", "far"))
    inputs = {"x": d.input(*shape, rare=rare), "residual": d.input(*shape, rare=rare)}
    inputs = d.maybe(inputs, weight=d.parameter(columns), bias=d.parameter(columns))
    p = d.often(0.0, 0.1, 0.5, 0.99)
    if p:
        inputs["seed"] = d.seed()
    return inputs, {"eps": d.one(1e-5, 1e-12), "dropout_p": p}


def _draw_gelu(d: Draw):
    columns = d.size(d.most)
    inputs = {"input": d.input(*d.rows(columns), columns)}
    inputs = d.maybe(inputs, bias=d.parameter(columns))
    return inputs, {"approximate": d.one("none", "tanh")}


def _draw_dropout(d: Draw):
    columns = d.size(d.most)
    return (
        {"input": d.input(*d.rows(columns), columns, rare=_FINITE), "seed": d.seed()},
        {"p": d.one(0.1, 0.5, 0.9, 1.0, 1e-9)},
    )


def _draw_linear(d: Draw):
    columns = d.size(min(d.most, 1000))
    outputs = d.size(d.most // max(columns, 1))
    grad = d.chance()
    inputs = {
        "input": d.input(*d.rows(max(columns, outputs)), columns, grad=grad),
        "weight": d.input(outputs, columns, rare=("large", "tiny", "nan"), grad=grad),
    }
    bias = d.input(outputs, rare=("large", "lowest", "inf"), grad=grad)
    return d.maybe(inputs, bias=bias), {}


def _loss_options(d: Draw, classes: int) -> dict:
    options = {"reduction": d.one("mean", "sum", "none")}
    rare = {
        "label_smoothing": d.one(0.1, 1.0),
        "softcap": d.one(30.0, 1.0, None),
        "lse_square_scale": d.one(1e-4, 0.1),
        "ignore_index": d.one(0, classes - 1, -1),
    }
    return options | {name: value for name, value in rare.items() if d.often(False, True)}


def _target(batch: tuple[int, ...], classes: int, options: dict, *beside: Input) -> Input:
    """Classes. The gradient of an ignored row is 0 here, and 0 * NaN in torch."""
    fill = "classes"
    if any(given.fill in ("nan", "inf", "-inf") for given in beside):
        fill = "kept"
        options.pop("ignore_index", None)
    ignored = options.get("ignore_index", -100)
    return Input(batch, fill, limit=classes, ignored=ignored, grad=False)


def _without_extras(options: dict) -> dict:
    """With probabilities as targets there are neither."""
    extras = ("softcap", "lse_square_scale", "ignore_index")
    return {name: value for name, value in options.items() if name not in extras}


def _draw_cross_entropy(d: Draw):
    classes = max(d.size(d.most), 1)
    rows = d.size(d.most // classes)
    batch = d.one((rows,), (rows,), (rows, 1), (rows, 2), ())
    options = _loss_options(d, classes)
    probabilities = d.often(False, True)
    inputs = {"input": d.input(*batch[:1], classes, *batch[1:], rare=_LOGITS)}
    if probabilities:
        options = _without_extras(options)
        inputs["target"] = Input((*batch[:1], classes, *batch[1:]), "probabilities", grad=False)
    else:
        inputs["target"] = _target(batch, classes, options, *inputs.values())
        options["inplace_backward"] = d.often(False, True)
    return d.maybe(inputs, weight=Input((classes,), "slopes", grad=False)), options


def _draw_linear_cross_entropy(d: Draw):
    classes = max(d.size(d.most), 1)
    features = d.size(min(d.most // classes, 1000))
    rows = d.size(d.most // max(features, classes, 1))
    batch = d.one((rows,), (rows,), (rows, 1), (1, rows), ())
    options = _loss_options(d, classes)
    inputs = {
        "input": d.input(
            *batch, features, rare=("large", "far", "tiny", "zero", "nan", "constant")
        ),
        "linear_weight": d.input(
            classes, features, rare=("large", "tiny", "zero", "inf"), grad=d.often(True, False)
        ),
    }  # fmt: skip
    inputs["target"] = _target(batch, classes, options, *inputs.values())
    bias = d.input(classes, rare=("lowest", "masked", "large", "hidden"))
    weight = Input((classes,), "slopes", grad=False)
    return d.maybe(inputs, linear_bias=bias, weight=weight), options


def _heads(d: Draw) -> tuple[int, int]:
    """Of queries, and of keys."""
    kv_heads = d.one(1, 1, 2, 3)
    return kv_heads * d.one(1, 1, 2, 4), kv_heads


def _attention_options(d: Draw, scores: tuple[int, ...]) -> tuple[dict, dict]:
    """Masks and slopes, and the other arguments, for (batch, heads, queries, keys)."""
    inputs, options = {}, {"causal": d.chance()}
    batch, heads, queries, keys = scores
    shape = d.one(scores, (queries, keys), (batch, 1, queries, keys), (1, heads, 1, keys))
    mask = d.often(None, "seen", "normal", "masked")
    if mask:
        inputs["attn_mask"] = Input(shape, mask, d.one("contiguous", "every_other"), grad=False)
    slopes = d.often(None, (heads,), (batch, heads))
    if slopes:
        inputs["alibi_slopes"] = Input(slopes, "slopes", grad=False)
    rare = {
        "window_size": (d.one(-1, 0, 1, 5, 70), d.one(-1, 0, 1, 5)),
        "softcap": d.one(30.0, 1.0),
        "softmax_scale": d.one(0.3, 1.0, 0.0, -0.5),
    }
    return inputs, options | {name: v for name, v in rare.items() if d.often(False, True)}


def _draw_attention(d: Draw):
    head_dim, (heads, kv_heads) = d.one(*_HEAD_DIMS), _heads(d)
    value_dim = d.often(head_dim, *_HEAD_DIMS)
    room = d.most // max(head_dim, value_dim, 1) // heads
    batch = d.one(1, 1, 2, 3, 0)
    queries, keys = (d.size(min(room // max(batch, 1), 257)) for _ in range(2))
    if d.often(False, True):
        return _packed(d, head_dim, value_dim, heads, kv_heads, queries, keys)
    if batch * heads * queries * keys > 8 * d.most:
        queries = min(queries, 9)
    masks, options = _attention_options(d, (batch, heads, queries, keys))
    # What a query does not see and is not finite is 0 * inf in torch, and not looked at by kernels.
    hides = masks or options["causal"] or "window_size" in options
    special = () if hides else ("nan", "inf", "-inf")
    inputs = {
        "q": d.input(batch, queries, heads, head_dim, rare=_SCORED + special),
        "k": d.input(batch, keys, kv_heads, head_dim, rare=_SCORED + special),
        "v": d.input(batch, keys, kv_heads, value_dim, rare=_FINITE + special),
    } | masks
    p = d.often(0.0, 0.1, 0.5)
    if p:
        inputs["seed"] = d.seed()
    return inputs, options | {"dropout_p": p, "return_lse": d.chance()}


def _packed(d: Draw, head_dim, value_dim, heads, kv_heads, queries, keys):
    sequences = d.one(1, 2, 3)
    offsets = [
        (0, *sorted(d.of(st.integers(0, total)) for _ in range(sequences - 1)), total)
        for total in (queries, keys)
    ]
    inputs = {
        "q": d.input(queries, heads, head_dim, rare=_SCORED),
        "k": d.input(keys, kv_heads, head_dim, rare=_SCORED),
        "v": d.input(keys, kv_heads, value_dim, rare=_FINITE),
        "cu_seqlens_q": Input(values=offsets[0]),
        "cu_seqlens_k": Input(values=offsets[1]),
    }
    masks, options = _attention_options(d, (sequences, heads, queries, keys))
    masks.pop("attn_mask", None)
    return inputs | masks, options | {"return_lse": d.chance()}


def _draw_attention_with_kvcache(d: Draw):
    head_dim, (heads, kv_heads) = d.one(*_HEAD_DIMS), _heads(d)
    value_dim = d.often(head_dim, *_HEAD_DIMS)
    batch = d.one(1, 1, 2, 3)
    room = d.most // max(head_dim, value_dim, 1) // heads // batch
    capacity = max(d.size(min(room, 1000)), 1)
    queries = max(min(d.one(1, 1, 2, 8, 9, 33), capacity), 1)
    masks, options = _attention_options(d, (batch, heads, queries, capacity))
    new = d.one(0, queries)
    lengths = tuple(d.of(st.integers(0, capacity - new)) for _ in range(batch))
    inputs = {
        "q": d.input(batch, queries, heads, head_dim, rare=_SCORED, grad=False),
        "k_cache": Input((batch, capacity, kv_heads, head_dim), grad=False),
        "v_cache": Input((batch, capacity, kv_heads, value_dim), grad=False),
        "cache_seqlens": Input(values=lengths),
    } | masks
    if new:
        inputs["k"] = d.input(batch, new, kv_heads, head_dim, rare=_SCORED, grad=False)
        inputs["v"] = d.input(batch, new, kv_heads, value_dim, rare=_FINITE, grad=False)
    return inputs, options


def _draw_sdpa(d: Draw):
    head_dim, (heads, kv_heads) = d.one(*_HEAD_DIMS[:-1]), _heads(d)
    value_dim = d.often(head_dim, *_HEAD_DIMS[:-1])
    batch = d.one(1, 1, 2, 3)
    room = d.most // max(head_dim, value_dim) // heads // batch
    queries, keys = (max(d.size(min(room, 257)), 1) for _ in range(2))
    mask = d.often(None, "seen", "normal", "masked")
    options = {"is_causal": mask is None and d.chance(), "enable_gqa": heads != kv_heads}
    if d.often(False, True):
        options["scale"] = d.one(0.3, 1.0)
    inputs = {
        "query": d.input(batch, heads, queries, head_dim, rare=_SCORED),
        "key": d.input(batch, kv_heads, keys, head_dim, rare=_SCORED),
        "value": d.input(batch, kv_heads, keys, value_dim, rare=_FINITE),
    }
    if mask:
        shape = d.one((batch, heads, queries, keys), (queries, keys), (1, 1, 1, keys))
        inputs["attn_mask"] = Input(shape, mask, grad=False)
    return inputs, options


_DRAWN = {
    "layer_norm": _draw_layer_norm,
    "add_layer_norm": _draw_add_layer_norm,
    "rms_norm": _draw_rms_norm,
    "gelu": _draw_gelu,
    "dropout": _draw_dropout,
    "linear": _draw_linear,
    "cross_entropy": _draw_cross_entropy,
    "linear_cross_entropy": _draw_linear_cross_entropy,
    "attention": _draw_attention,
    "attention_with_kvcache": _draw_attention_with_kvcache,
    "scaled_dot_product_attention": _draw_sdpa,
}


@st.composite
def calls(draw, dtypes: dict[str, tuple[str, ...]], most: int) -> Call:
    """A call of one of the ops in `dtypes`, in one of that op's dtypes; no tensor has more than
    about `most` elements.
    """
    d = Draw(draw, most)
    op = d.one(*dtypes)
    inputs, options = _DRAWN[op](d)
    upstream = d.often("random", "ones", "transposed")
    return Call(op, d.one(*dtypes[op]), inputs, options, upstream, d.of(st.integers(0, 2**16)))
