"""The arguments of linear_cross_entropy: which are refused."""

import torch
from torch import Tensor


def autocasts(input: Tensor) -> bool:
    """Whether autocast is on where input lies, and takes its dtype."""
    device = input.device.type
    known = device in ("cpu", "cuda") and input.dtype != torch.float64
    return known and torch.is_autocast_enabled(device)


def check_shapes(input, linear_weight, linear_bias, target) -> None:
    """Raises RuntimeError or ValueError, naming the argument that does not fit."""
    op = "linear_cross_entropy"
    if linear_weight.dim() != 2 or input.dim() == 0 or input.shape[-1] != linear_weight.shape[1]:
        raise RuntimeError(
            f"{op}: linear_weight: expected (classes, features) with input's features, "
            f"got {tuple(linear_weight.shape)} for input {tuple(input.shape)}"
        )
    if linear_weight.shape[0] == 0:
        raise RuntimeError(f"{op}: linear_weight: expected one class or more, got none")
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        raise RuntimeError(
            f"{op}: linear_bias: expected shape {tuple(linear_weight.shape[:1])}, "
            f"got {tuple(linear_bias.shape)}"
        )
    for name, t in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if t is not None and t.dtype != input.dtype:
            raise RuntimeError(f"{op}: {name}: expected input's {input.dtype}, got {t.dtype}")
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"{op}: target: expected shape {tuple(input.shape[:-1])} for input "
            f"{tuple(input.shape)}, got {tuple(target.shape)}"
        )
    if target.dtype not in (torch.int64, torch.int32, torch.uint8):
        raise RuntimeError(
            f"{op}: target: expected class indices of int64, int32 or uint8, got {target.dtype}"
        )
