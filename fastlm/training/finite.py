"""Stopping a run whose numbers have become inf or nan, before they reach a checkpoint."""

from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint


def read_recent(recent: list[Tensor], step: int, out_dir: Path) -> Tensor:
    """(n, 2) on the CPU: loss and gradient norm of the n steps up to `step`.

    Waits for the device. Raises FloatingPointError for the first step that is not finite.
    """
    if not recent:
        return torch.empty(0, 2)
    values = torch.stack(recent).cpu()
    wrong = (~values.isfinite().all(1)).nonzero().flatten().tolist()
    if wrong:
        loss, norm = values[wrong[0]].tolist()
        first = step - len(recent) + 1 + wrong[0]
        raise diverged(f"the loss is {loss}, the norm of its gradient {norm}", first, out_dir)
    return values


def first_not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of the first tensor with an inf or a nan; where there is none, waits once.

    With one in it a tensor's sum is not finite, and takes a twentieth of isfinite's time on a CPU.
    A sum may also overflow, hence the second look.
    """
    sums = torch.stack([tensor.sum().float() for tensor in tensors.values()]).isfinite().tolist()
    suspects = [name for name, finite in zip(tensors, sums, strict=True) if not finite]
    return next((name for name in suspects if not bool(tensors[name].isfinite().all())), None)


def diverged(what: str, step: int, out_dir: Path) -> FloatingPointError:
    good = checkpoint.every(out_dir)
    advice = (
        f"the last good checkpoint is {good[-1]}: go on from it with a smaller learning rate: "
        f"fastlm train --resume {out_dir} --learning-rate ..."
        if good
        else "there is no checkpoint from before: begin again with a smaller learning rate"
    )
    return FloatingPointError(f"train: step {step}: {what}; {advice}")
