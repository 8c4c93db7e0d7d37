"""Text from a model: the cache, the choice of the next token, streaming, and the loop."""

from .cache import KVCache
from .config import GenerationConfig
from .generate import GenerationMixin, generate
from .output import GenerateOutput
from .safety import WordFilter
from .streamers import TextIteratorStreamer, TextStreamer

__all__ = [
    "GenerateOutput",
    "GenerationConfig",
    "GenerationMixin",
    "KVCache",
    "TextIteratorStreamer",
    "TextStreamer",
    "WordFilter",
    "generate",
]
