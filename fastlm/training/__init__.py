"""Pre-training: text in, a model that continues it out."""

from .config import TrainingConfig
from .data import TokenData, tokenize
from .loop import Trainer

__all__ = ["TokenData", "Trainer", "TrainingConfig", "tokenize"]
