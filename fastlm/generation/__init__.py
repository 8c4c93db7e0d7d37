"""Text from a model: the cache, the choice of the next token, streaming, and the loop."""

from .cache import KVCache
from .generate import generate
from .streamers import TextStreamer

__all__ = ["KVCache", "TextStreamer", "generate"]
