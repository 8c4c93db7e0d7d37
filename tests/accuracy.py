"""The one accuracy rule of fastlm, and what a call gives: its results and its gradients."""

from collections.abc import Callable

import torch
from torch import Tensor


def assert_as_accurate_as_torch(
    ours: Tensor, torch_same_dtype: Tensor, truth: Tensor, what: str, least_scale: float = 1e-30
) -> None:
    """error(ours) <= 2 * error(torch at the same dtype) + 4 * eps(dtype of ours).

    Errors are in max norm, relative to the truth's scale. Where the truth is not finite ours must
    be the same. A truth of zero, from large terms that cancel, has their size for `least_scale`.
    """
    assert ours.shape == truth.shape, f"{what}: shape {ours.shape}, expected {truth.shape}"
    if truth.numel() == 0:
        return
    wide, truth = ours.cpu().double(), truth.cpu().double()
    finite = truth.isfinite()
    torch.testing.assert_close(
        wide[~finite], truth[~finite], equal_nan=True, msg=f"{what}: where the truth is not finite"
    )
    if not finite.any():
        return
    scale = truth[finite].abs().max().clamp_min(least_scale)

    def error(result: Tensor) -> float:
        return ((result.cpu().double() - truth)[finite].abs().max() / scale).item()

    allowed = 2 * error(torch_same_dtype) + 4 * torch.finfo(ours.dtype).eps
    assert error(ours) <= allowed, f"{what}: error {error(ours):.2e}, allowed {allowed:.2e}"


def cast(inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The inputs with the floating-point ones in `dtype`."""
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in inputs)


def results(function: Callable, inputs: tuple[Tensor, ...], rounding: torch.dtype) -> dict:
    """Every output of function(*inputs), and the gradient of every floating-point input.

    The gradients that go in are random, and representable in `rounding`: the same in any dtype.
    """
    outputs, leaves = forward(function, inputs)
    named = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return named | gradients(outputs, leaves, rounding)


def forward(function: Callable, inputs: tuple[Tensor, ...]) -> tuple[tuple, list[Tensor]]:
    """The outputs, always a tuple, and the leaves that they depend on."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    outputs = function(*leaves)
    return (outputs if isinstance(outputs, tuple) else (outputs,)), leaves


def gradients(outputs: tuple, leaves: list[Tensor], rounding: torch.dtype, **options) -> dict:
    differentiable = [output for output in outputs if output.requires_grad]
    wanted = {f"gradient {i}": leaf for i, leaf in enumerate(leaves) if leaf.requires_grad}
    if not differentiable:
        return {}
    upstream = [_upstream(output, i, rounding) for i, output in enumerate(differentiable)]
    found = torch.autograd.grad(
        differentiable, list(wanted.values()), upstream, materialize_grads=True, **options
    )
    return dict(zip(wanted, found, strict=True))


def _upstream(output: Tensor, seed: int, rounding: torch.dtype) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    random = torch.randn(output.shape, dtype=torch.float64, generator=generator, device="cpu")
    return random.to(rounding).to(output.dtype).to(output.device)
