"""Pre-training: text in, a model that continues it out."""

from fastlm.training.config import TrainingConfig
from fastlm.training.data import TokenData, tokenize
from fastlm.training.loop import Trainer

__all__ = ["TokenData", "Trainer", "TrainingConfig", "tokenize"]
