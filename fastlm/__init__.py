"""fastlm: fused kernels for GPT language models, and a GPT-2 that trains and generates on them."""

__version__ = "0.1.0"

import torch as _torch  # noqa: F401  first, so that fastlm._cpu shares torch's OpenMP

from . import memory, ops
from .backend import BackendUnavailable, explain, use

__all__ = ["BackendUnavailable", "explain", "memory", "ops", "use"]
