"""Each op in plain torch: the oracle of the tests, the fallback on any device, the fake kernel of
torch.compile, and the definition that every kernel is documented by.

Arguments and results are those of the registered ops (fastlm/ops). Statistics and losses are
float32, or float64 for float64 inputs. Nothing here depends on values for its shapes, so that all
of it runs on the meta device.
"""

from .attention import attention_backward, attention_forward, cache_append
from .cross_entropy import (
    cross_entropy_backward,
    cross_entropy_forward,
    linear_cross_entropy_backward,
    linear_cross_entropy_forward,
    linear_cross_entropy_gradients,
)
from .elementwise import dropout, gelu_backward, gelu_forward
from .linear import linear
from .norms import (
    add_layer_norm_backward,
    add_layer_norm_forward,
    layer_norm_backward,
    layer_norm_forward,
    rms_norm_backward,
    rms_norm_forward,
)
from .precision import accumulation_dtype

__all__ = [
    "accumulation_dtype",
    "add_layer_norm_backward",
    "add_layer_norm_forward",
    "attention_backward",
    "attention_forward",
    "cache_append",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "dropout",
    "gelu_backward",
    "gelu_forward",
    "layer_norm_backward",
    "layer_norm_forward",
    "linear",
    "linear_cross_entropy_backward",
    "linear_cross_entropy_forward",
    "linear_cross_entropy_gradients",
    "rms_norm_backward",
    "rms_norm_forward",
]
