"""Every setting of a training run; the command line's flags are made from these fields."""

import math
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

# What a checkpoint's name, step-00001000, has digits for.
MOST_STEPS = 10**8 - 1
# What torch.manual_seed takes.
LARGEST_SEED = 2**64 - 1


def setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def require(settings: Any, name: str, holds: bool, expected: str) -> None:
    """Raises ValueError naming the field `name` of `settings` unless it `holds`."""
    if not holds:
        raise ValueError(f"train: {name}: expected {expected}, got {getattr(settings, name)!r}")


def check_types(settings: Any) -> None:
    """Raises ValueError for a field of another type than declared, inf, nan, and sizes of 2**31."""
    kinds: dict[Any, tuple[type, str]] = {
        int: (Integral, "an integer"),
        float: (Real, "a finite number"),
        str: (str, "text"),
    }
    for each in fields(settings):
        value, (kind, expected) = getattr(settings, each.name), kinds[each.type]
        if value is None and each.default is None:
            continue
        fits = isinstance(value, kind) and not isinstance(value, bool)
        require(settings, each.name, fits and (kind is not Real or math.isfinite(value)), expected)
        if kind is Integral and each.name != "seed":
            require(settings, each.name, value < 2**31, "less than 2**31")


@dataclass
class TrainingConfig:
    """How to train. Raises ValueError for a value out of range, naming it and what is expected.

    A setting that is None gets the value that its help states.
    """

    steps: int = setting(1000, "optimizer steps in all")
    batch_size: int = setting(16, "sequences in one forward pass of one process")
    accumulate: int = setting(1, "forward passes whose gradients make one step")
    seq_len: int = setting(256, "tokens in a sequence")
    learning_rate: float = setting(1e-3, "peak learning rate of AdamW")
    min_learning_rate: float = setting(
        None, "learning rate at the last step (a tenth of --learning-rate)"
    )
    warmup_steps: int = setting(
        None, "steps over which the rate rises to its peak (a tenth of --steps, at most 100)"
    )
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
        check_types(self)
        if self.min_learning_rate is None:
            self.min_learning_rate = self.learning_rate / 10
        if self.warmup_steps is None:
            self.warmup_steps = min(100, self.steps // 10)
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
        not_negative = ("learning_rate", "weight_decay", "clip", "sample_every")
        for name in at_least_one:
            require(self, name, getattr(self, name) >= 1, ">= 1")
        for name in not_negative:
            require(self, name, getattr(self, name) >= 0, ">= 0")
        for name in ("beta1", "beta2"):
            require(self, name, 0 <= getattr(self, name) < 1, "0 <= beta < 1")
        self._check_ranges()

    def _check_ranges(self):
        peak, steps = self.learning_rate, self.steps
        require(self, "steps", steps <= MOST_STEPS, f"at most {MOST_STEPS}")
        require(self, "seed", 0 <= self.seed <= LARGEST_SEED, "0 to 2**64 - 1")
        require(
            self,
            "min_learning_rate",
            0 <= self.min_learning_rate <= peak,
            f"0 to the peak, learning_rate = {peak}",
        )
        require(
            self, "warmup_steps", 0 <= self.warmup_steps <= steps, f"0 to the run's steps = {steps}"
        )
        require(self, "dtype", self.dtype in ("float32", "bfloat16"), "float32 or bfloat16")
