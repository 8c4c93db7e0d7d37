"""Fused operations with gradients. Each file holds one, in five parts: implementation, schema,
fake, autograd, public.
"""

import functools
import inspect
from collections.abc import Callable

from torch import Tensor

from ..backend import Needs

# The functions that share a name with their file are imported last, over the submodules of that
# name.
from . import attention as _attention
from . import attention_with_kvcache as _attention_with_kvcache
from . import cross_entropy as _cross_entropy
from . import dropout as _dropout
from . import gelu as _gelu
from . import layer_norm as _layer_norm
from . import linear as _linear
from . import linear_cross_entropy as _linear_cross_entropy
from . import rms_norm as _rms_norm
from . import scaled_dot_product_attention as _scaled_dot_product_attention

_FORMS = {
    function.__name__: (function, form)
    for module in (
        _attention,
        _attention_with_kvcache,
        _cross_entropy,
        _dropout,
        _gelu,
        _layer_norm,
        _linear,
        _linear_cross_entropy,
        _rms_norm,
        _scaled_dot_product_attention,
    )
    for function, form in module.FORMS.items()
}

_NEEDS: dict[str, Callable] = {
    function.__name__: needs
    for module in (_attention, _scaled_dot_product_attention)
    for function, needs in module.NEEDS.items()
}

from .attention import attention  # noqa: E402
from .attention_with_kvcache import attention_with_kvcache  # noqa: E402
from .cross_entropy import cross_entropy  # noqa: E402
from .dropout import dropout  # noqa: E402
from .gelu import gelu  # noqa: E402
from .layer_norm import add_layer_norm, layer_norm  # noqa: E402
from .linear import linear  # noqa: E402
from .linear_cross_entropy import linear_cross_entropy  # noqa: E402
from .rms_norm import rms_norm  # noqa: E402
from .scaled_dot_product_attention import scaled_dot_product_attention  # noqa: E402

__all__ = [
    "add_layer_norm",
    "attention",
    "attention_with_kvcache",
    "cross_entropy",
    "dropout",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "rms_norm",
    "scaled_dot_product_attention",
]


def describe_call(op: str, *args, **kwargs) -> tuple[Tensor, str | None, Needs | None]:
    """The tensor that a call is chosen by, what is special about its form, and what tells of its
    needs; for `explain`.
    """
    function, form = _FORMS[op]
    bound = inspect.signature(function).bind_partial(*args, **kwargs)
    x = next(iter(bound.arguments.values()))
    try:
        form = form(*args, **kwargs)
    except TypeError:  # fewer arguments than the op takes: explained by the tensor alone
        return x, None, None
    needs = _NEEDS.get(op)
    return x, form, None if needs is None else functools.partial(needs, *args, **kwargs)
