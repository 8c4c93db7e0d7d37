"""The models: one file per family."""

from .gpt2 import GPT2LMHeadModel, GPT2Model
from .gpt2_config import GPT2Config

__all__ = ["GPT2Config", "GPT2LMHeadModel", "GPT2Model"]
