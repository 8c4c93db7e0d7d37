"""Every setting of a training run; the command line's flags are made from these fields."""

from dataclasses import dataclass, field
from typing import Any


def setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class TrainingConfig:
    """How to train. Raises ValueError for a value out of range, naming it and what is accepted."""

    steps: int = setting(1000, "optimizer steps in all")
    batch_size: int = setting(16, "sequences in one forward pass of one process")
    accumulate: int = setting(1, "forward passes whose gradients make one step")
    seq_len: int = setting(256, "tokens in a sequence")
    learning_rate: float = setting(1e-3, "peak learning rate of AdamW")
    min_learning_rate: float = setting(1e-4, "learning rate at the last step")
    warmup_steps: int = setting(100, "steps over which the learning rate rises to its peak")
    weight_decay: float = setting(0.1, "of matrices and embeddings; norms and biases have none")
    beta1: float = setting(0.9, "AdamW's decay of the gradient's average")
    beta2: float = setting(0.95, "AdamW's decay of the squared gradient's average")
    clip: float = setting(1.0, "largest gradient norm; 0 for no clipping")
    dtype: str = setting("float32", "float32, or bfloat16 for autocast")
    device: str = setting("cpu", "cpu, cuda, cuda:1, ...")
    seed: int = setting(0, "of the weights, the order of the data and dropout")
    eval_every: int = setting(200, "steps between evaluations")
    eval_batches: int = setting(20, "batches in one of them, spread over the validation tokens")
    sample_every: int = setting(500, "steps between samples; 0 for none")
    sample_prompt: str = setting("", "what samples continue; empty for the start of a text")
    save_every: int = setting(500, "steps between checkpoints")
    keep: int = setting(2, "checkpoints kept on disk, the newest")

    def __post_init__(self):
        at_least_one = (
            "steps",
            "batch_size",
            "accumulate",
            "seq_len",
            "eval_every",
            "eval_batches",
            "save_every",
            "keep",
        )
        not_negative = (
            "learning_rate",
            "min_learning_rate",
            "warmup_steps",
            "weight_decay",
            "clip",
            "sample_every",
        )
        for name in at_least_one:
            self._require(name, getattr(self, name) >= 1, ">= 1")
        for name in not_negative:
            self._require(name, getattr(self, name) >= 0, ">= 0")
        for name in ("beta1", "beta2"):
            self._require(name, 0 <= getattr(self, name) < 1, "0 <= beta < 1")
        self._require("dtype", self.dtype in ("float32", "bfloat16"), "float32 or bfloat16")

    def _require(self, name: str, holds: bool, accepted: str) -> None:
        if not holds:
            raise ValueError(f"train: {name}: got {getattr(self, name)!r}, accepted is {accepted}")
