"""Which calls are drawn: shapes at the edges of blocks, rare values, layouts, options of each op.
Longer than 300 lines: one function an op.
"""

from math import prod

from fuzz_calls import LAYOUT_NAMES, Call, Input
from hypothesis import strategies as st

_SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 255,
          256, 257, 511, 768, 1000, 2047, 2049, 4097)  # fmt: skip
_HEAD_DIMS = (1, 2, 3, 8, 16, 20, 32, 40, 64, 72, 80, 96, 128, 192, 256, 0)
_RARE = ("large", "huge", "tiny", "denormal", "far", "constant", "zero", "nan", "inf", "-inf")
_FINITE = _RARE[:-3]
# Scores of 10^6 and more, whose rounding is larger than 1, have probabilities that mean nothing.
_SCORED = tuple(fill for fill in _FINITE if fill not in ("huge", "far", "constant"))
# Nor can lse, in float64, hold 1e30 and the logarithm of how many are as large.
_LOGITS = ("masked", "lowest", "hidden", *(fill for fill in _RARE if fill != "huge"))
# Beside logits in float64, lse has no more digits than they: for logits near 0.
_LOGITS_IN_FLOAT64 = tuple(
    fill for fill in _LOGITS if fill not in ("large", "far", "constant", "lowest")
)


class Draw:
    """What the strategies share. `most` bounds the elements of one tensor."""

    def __init__(self, draw, most: int, dtype: str):
        self.of, self.most, self.dtype = draw, most, dtype

    def one(self, *values):
        return self.of(st.sampled_from(values))

    def often(self, usual, *others):
        """`usual` in two draws of three."""
        return self.one(*others) if self.of(st.integers(0, 2)) == 2 else usual

    def chance(self) -> bool:
        return self.of(st.booleans())

    def size(self, room: int, sizes=_SIZES) -> int:
        return self.one(*[n for n in sizes if n <= max(room, 1)])

    def input(self, *shape: int, rare=_RARE, layouts=LAYOUT_NAMES, **more) -> Input:
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
        # Not 1: of uniform logits' gradients only what probabilities are rounded by is left.
        "label_smoothing": d.one(0.1, 0.5),
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
    # The fills of logits are by the last dimension.
    rare = _LOGITS_IN_FLOAT64 if d.dtype == "float64" else _LOGITS
    if len(batch) > 1:
        rare = tuple(fill for fill in rare if fill not in ("masked", "hidden"))
    inputs = {"input": d.input(*batch[:1], classes, *batch[1:], rare=rare)}
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
    rare = () if d.dtype == "float64" else ("large", "far", "constant")
    inputs = {
        "input": d.input(*batch, features, rare=("tiny", "zero", "nan", *rare)),
        # Not equal rows: of the gradients of their logits only what each is rounded by is left.
        "linear_weight": d.input(
            classes, features, rare=("tiny", "zero", "inf", *rare), layouts=LAYOUT_NAMES[:-1],
            grad=d.often(True, False),
        ),
    }  # fmt: skip
    inputs["target"] = _target(batch, classes, options, *inputs.values())
    bias = d.input(classes, rare=("masked", "hidden", *rare))
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
    # Of a score of inf, whose output is NaN, lse is NaN too, and inf in torch.
    return_lse = d.chance()
    special = () if hides or keys == 0 else ("nan",) if return_lse else ("nan", "inf", "-inf")
    inputs = {
        "q": d.input(batch, queries, heads, head_dim, rare=_SCORED + special),
        "k": d.input(batch, keys, kv_heads, head_dim, rare=_SCORED + special),
        "v": d.input(batch, keys, kv_heads, value_dim, rare=_FINITE + special),
    } | masks
    p = d.often(0.0, 0.1, 0.5)
    if p:
        inputs["seed"] = d.seed()
    return inputs, options | {"dropout_p": p, "return_lse": return_lse}


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
    op = draw(st.sampled_from(list(dtypes)))
    d = Draw(draw, most, draw(st.sampled_from(dtypes[op])))
    inputs, options = _DRAWN[op](d)
    upstream = d.often("random", "ones", "transposed")
    return Call(op, d.dtype, inputs, options, upstream, d.of(st.integers(0, 2**16)))
