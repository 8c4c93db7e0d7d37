"""The dtypes that references compute in."""

import torch
from torch import Tensor


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """What statistics and losses of x are in: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """x in the dtype that it is computed in."""
    return x.to(accumulation_dtype(x))


def sum_of_rows(t: Tensor) -> Tensor:
    # [None]: a single row may come without a dimension of rows
    return t[None].flatten(0, -2).sum(0)
