"""fastlm: fused kernels for GPT language models, and a GPT-2 that trains and generates on them."""

__version__ = "0.1.0"

import torch as _torch  # noqa: F401  first, so that fastlm._cpu shares torch's OpenMP

from . import memory, ops
from .backend import BackendUnavailable, use
from .explanation import explain
from .generation import GenerationConfig, TextIteratorStreamer, TextStreamer
from .models import (
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)
from .nn import accelerate
from .tokenizer import GPT2Tokenizer

__all__ = [
    "BackendUnavailable",
    "GPT2Config",
    "GPT2DoubleHeadsModel",
    "GPT2ForQuestionAnswering",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2LMHeadModel",
    "GPT2Model",
    "GPT2Tokenizer",
    "GenerationConfig",
    "TextIteratorStreamer",
    "TextStreamer",
    "accelerate",
    "explain",
    "memory",
    "ops",
    "use",
]
