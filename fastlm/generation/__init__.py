"""Text from a model: the cache, the choice of the next token, streaming, and the loop."""

from fastlm.generation.cache import KVCache
from fastlm.generation.generate import generate
from fastlm.generation.streamers import TextStreamer

__all__ = ["KVCache", "TextStreamer", "generate"]
