"""AdamW (Loshchilov & Hutter, 2019) with decay groups, and its learning rate over time."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import CheckpointError
from .config import TrainingConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Matrices and embeddings decay; biases and norms, which have one dimension, do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    # One pass over the weights in place of a dozen; torch has it for these devices.
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=fused
    )


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then half a cosine down to min_learning_rate at the last step.

    Loshchilov & Hutter, 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts".
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.min_learning_rate + cosine * (config.learning_rate - config.min_learning_rate)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def load_moments(optimizer: torch.optim.Optimizer, names: list[str], saved: Any, file: str) -> None:
    """Takes up what `optimizer.state_dict()` told of each parameter, named in order by `names`.

    Rates and decays stay as they are configured now. Raises CheckpointError, naming `file` and the
    entry, for what does not fit the parameters: torch looks at neither shape nor dtype, and its
    fused AdamW writes past the end of a moment that is too small.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = saved.get("state") if isinstance(saved, dict) else None
    # A checkpoint of step 0 has no entries.
    if not isinstance(state, dict) or set(state) not in (set(), set(range(len(parameters)))):
        got = list(state) if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(
            f"{file}: optimizer.state: expected one entry for each parameter, 0 to "
            f"{len(parameters) - 1}, got {got}"
        )
    for number, entries in state.items():
        place = f"{file}: optimizer.state[{number}] of {names[number]}"
        found = list(entries) if isinstance(entries, dict) else []
        if set(found) != {"step", *MOMENTS}:
            raise CheckpointError(f"{place}: expected step, {', '.join(MOMENTS)}, got {found}")
        _check_entry(f"{place}: step", entries["step"], torch.zeros(()))
        for name in MOMENTS:
            _check_entry(f"{place}: {name}", entries[name], parameters[number])
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _check_entry(place: str, entry: Any, like: Tensor) -> None:
    expected, got = _described(like), _described(entry)
    if got != expected:
        raise CheckpointError(f"{place}: expected {expected}, got {got}")
    if not bool(entry.isfinite().all()):
        raise CheckpointError(f"{place}: expected finite numbers, got inf or nan")


def _described(entry: Any) -> str:
    if not isinstance(entry, Tensor):
        return type(entry).__name__
    if entry.layout != torch.strided or not entry.is_contiguous():
        return f"a tensor that is not contiguous, {tuple(entry.shape)}"
    return f"{entry.dtype} {tuple(entry.shape)}"
