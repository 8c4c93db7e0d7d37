"""Registration of ops: torch.ops.fastlm.<name>, whose last argument is the backend's name."""

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch._ops import OpOverload

from .. import backend as backends

_library = torch.library.Library("fastlm", "DEF")
REFERENCES: dict[str, Callable] = {}  # of each registered op, by its name


def define(
    name: str,
    schema: str,
    *,
    op: str,
    reference: Callable,
    native: Callable,
    fake: Callable | None = None,
) -> OpOverload:
    """Register fastlm::<name> and return it.

    `schema` ends in `str backend`. Backend "torch" runs `reference`, which is also the fake kernel
    unless `fake` is given: tracing a long reference takes torch.compile seconds a call. Every other
    runs `native(module, *arguments)`, which allocates the results and calls the function of the
    module that op's table names.
    """
    _library.define(f"{name}{schema}")
    REFERENCES[name] = reference

    def implementation(*all_arguments):
        *arguments, backend = all_arguments
        if backend == "torch":
            return reference(*arguments)
        return native(backends.kernels(backend, op), *arguments)

    def without_backend(*arguments):
        return (fake or reference)(*arguments[:-1])

    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlm::{name}", without_backend, lib=_library)
    registered = getattr(torch.ops.fastlm, name).default
    torch.library.register_vmap(f"fastlm::{name}", _one_by_one(registered), lib=_library)
    return registered


def _one_by_one(registered: Callable) -> Callable:
    """torch.func.vmap's rule for an op: each sample by itself, so that it has the bits that it has
    alone.
    """

    def rule(info, in_dims, *args):
        samples = [
            registered(
                *(
                    a if dim is None else a.select(dim, i).contiguous()
                    for a, dim in zip(args, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        if isinstance(samples[0], Tensor):
            return torch.stack(samples), 0
        stacked = tuple(torch.stack(results) for results in zip(*samples, strict=True))
        return stacked, tuple(0 for _ in stacked)

    return rule


@backends.constant
def tell_dtensor() -> None:
    """DTensor's rules for the ops, where DTensor is in use: loading it takes a second."""
    if "torch.distributed.tensor" in sys.modules:
        from . import sharding

        sharding.register()


def draw_seed(x: Tensor) -> Tensor:
    """A seed for Philox from torch's generator, so that torch.manual_seed and saved RNG states
    cover dropout; on x's device, and for a DTensor the same on all of its devices.
    """
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=x.device)
    if "torch.distributed.tensor" not in sys.modules:
        return seed
    from .sharding import seed_for

    return seed_for(x, seed)


def check_floating(op: str, argument: str, x: Tensor) -> None:
    """Raises NotImplementedError, as torch's own functions do, unless x is of a floating-point
    dtype of 16 bits or more.
    """
    if not x.is_floating_point() or x.dtype.itemsize < 2:
        raise NotImplementedError(
            f"{op}: {argument}: expected a floating-point dtype of 16 bits or more, got {x.dtype}"
        )


def check_probability(op: str, argument: str, p: float) -> None:
    """Raises ValueError unless 0 <= p <= 1."""
    if not 0 <= p <= 1:
        raise ValueError(f"{op}: {argument}: expected a probability from 0 to 1, got {p}")


def checked_softcap(op: str, softcap: float | None) -> float:
    """The softcap, and 0 where None, 0 or infinity ask for none. Raises ValueError for a negative
    one and for NaN.
    """
    if softcap is None or softcap in (0, float("inf")):
        return 0.0
    if not softcap > 0:
        raise ValueError(f"{op}: softcap: expected a number of at least 0, or None, got {softcap}")
    return float(softcap)


def contiguous_like(x: Tensor) -> Tensor:
    """Uninitialised and contiguous, for fakes."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def statistics_like(x: Tensor, shape) -> Tensor:
    """Uninitialised float32, or float64 for float64 x."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty(shape, dtype=dtype, device=x.device)


def parameter_form(x: Tensor, *parameters: Tensor | None) -> str | None:
    """What keeps a call from the kernels: parameters of several dtypes, or of one that is neither
    x's nor the statistics'.
    """
    dtypes = {p.dtype for p in parameters if p is not None}
    accepted = {x.dtype, torch.float64 if x.dtype == torch.float64 else torch.float32}
    if len(dtypes) > 1 or not dtypes <= accepted:
        return f"parameters of {', '.join(sorted(str(d) for d in dtypes))} with {x.dtype} input"
    return None
