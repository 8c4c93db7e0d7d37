"""Which kernel runs an op: the table, the choice and its explanation. The only dispatch.

Every op has a short list of kernels, best first. fastlm takes the first that supports the tensor's
device, dtype and size and whose module is installed. `with fastlm.use("torch"):` or
FASTLM_BACKEND=torch replaces the list by that one name; if it cannot run you get an error that says
why, never a quiet substitute. `fastlm.explain("layer_norm", x)` prints each kernel and why it was
taken or passed over. The choice looks at device, dtype and static sizes only, never at values.

"emulated:cuda" (of compute capability 8.0), "emulated:cuda:90a", "emulated:triton" and
"emulated:gluon" are asked for by name alone: those kernels on CPU tensors, run instruction by
instruction by fastlm.emulator.
"""

import contextlib
import functools
import importlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

Needs = Callable[[], list[str]]
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


class BackendUnavailable(RuntimeError):
    """No kernel, or not the one that was asked for, can run an op on its tensors."""


@dataclass(frozen=True)
class Kernel:
    """One implementation of an op: its name, its module, and what it takes. None means anything.

    lacks: what a call may need that it does not take, by the names of the op's file. capability:
    of the only GPUs it runs on. verified: it has run on one; others must be asked for by name.
    """

    name: str
    module: str
    on: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    last_dim: int | None = None
    rows: int | None = None
    lacks: tuple[str, ...] = ()
    capability: tuple[int, int] | None = None
    verified: bool = True

    def why_not(
        self, x: Tensor, form: str | None = None, emulated: bool = False, needs: Needs | None = None
    ) -> str | None:
        """Why this kernel cannot run on a tensor like x and such a call; None if it can."""
        if self.name != "torch" and form is not None:
            return f"does not take {form}"
        on = "cpu" if emulated else self.on
        if on is not None and x.device.type not in (on, "meta"):
            return f"runs on {on} tensors, not on {x.device.type}"
        if self.dtypes is not None and x.dtype not in self.dtypes:
            return f"takes {names(self.dtypes)}, not {names((x.dtype,))}"
        if self.last_dim is not None and x.dim() and x.shape[-1] > self.last_dim:
            return f"takes a last dimension of at most {self.last_dim}, not {x.shape[-1]}"
        if self.rows is not None and x.dim() and x.numel() > self.rows * x.shape[-1]:
            return f"takes at most {self.rows} rows, not {x.numel() // x.shape[-1]}"
        lacking = [need for need in needs() if need in self.lacks] if needs and self.lacks else []
        if lacking:
            return f"does not take {lacking[0]}"
        if self.capability and x.device.type == "cuda":
            found = _capability(x.device.index)
            if found != self.capability:
                return f"is for GPUs of compute capability {self.capability}, not {found}"
        if not self.verified and _forced is None:
            return "has not yet run on a GPU: ask for it by name"
        return _cannot_emulate(self.name) if emulated else not_installed(self.module)


_GPU = (F32, BF16, F16)


def _cuda(last_dim: int | None = None) -> Kernel:
    return Kernel("cuda", "fastlm._cuda", "cuda", _GPU, last_dim)


def _triton(module: str, last_dim: int | None = None) -> Kernel:
    return Kernel("triton", f"fastlm.kernels.{module}", "cuda", _GPU, last_dim)


# Verified when `make gpu` has passed on sm_90 and its results are committed: then that word goes.
_GLUON = Kernel(
    "gluon", "fastlm.kernels.attention_hopper", "cuda", (BF16, F16), 128, capability=(9, 0),
    lacks=("softcap", "dropout", "packed sequences", "cache lengths", "an attention mask", "ALiBi",
           "values of another head_dim", "a softmax_scale that is not positive",
           "rows that do not begin at multiples of 16 bytes"), verified=False,
)  # fmt: skip
_CPP = Kernel("cpp", "fastlm._cpu", "cpu", (F32, F64, BF16))
_FEW_ROWS = Kernel("cpp", "fastlm._cpu", "cpu", (F32, BF16), rows=8)
_REFERENCE = Kernel("torch", "fastlm.reference")

KERNELS: dict[str, list[Kernel]] = {
    "layer_norm": [_cuda(65536), _triton("layer_norm", 65536), _CPP, _REFERENCE],
    "add_layer_norm": [_cuda(65536), _triton("layer_norm", 65536), _CPP, _REFERENCE],
    "rms_norm": [_cuda(65536), _triton("rms_norm", 65536), _CPP, _REFERENCE],
    "gelu": [_cuda(), _triton("gelu"), _CPP, _REFERENCE],
    "dropout": [_cuda(), _triton("dropout"), _CPP, _REFERENCE],
    "linear": [_FEW_ROWS, _REFERENCE],
    "cross_entropy": [_cuda(), _triton("cross_entropy"), _CPP, _REFERENCE],
    "linear_cross_entropy": [_cuda(), _triton("cross_entropy"), _CPP, _REFERENCE],
    "attention": [_cuda(256), _GLUON, _triton("attention", 256), _CPP, _REFERENCE],
    "attention_with_kvcache": [_cuda(256), _triton("attention", 256), _CPP, _REFERENCE],
}

BACKENDS = ("cuda", "gluon", "triton", "cpp", "torch")
_EMULATED = "emulated:"
EMULATED = ("emulated:cuda", "emulated:cuda:90a", "emulated:gluon", "emulated:triton")
CUDA_SOURCES = Path(__file__).parents[1] / "csrc"
# What use() or FASTLM_BACKEND asks for. A plain global and no context variable: torch.compile
# guards on the one, so that a compiled function follows use(), and cannot trace the other.
_forced = os.environ.get("FASTLM_BACKEND") or None


def constant(function):
    """torch.compiler.assume_constant_result, whose import of the compiler and of triton would
    double the time that `import fastlm` takes.
    """
    function._dynamo_marked_constant = True
    return function


@constant
def not_installed(module: str) -> str | None:
    """Why a kernel's module cannot be imported; None if it can."""
    return _import_error(module)


@functools.cache
def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module} cannot be imported ({error})"
    return None


# Told of every call of a kernel while fastlm.replay records.
_recorder: Callable | None = None


@contextlib.contextmanager
def recording(recorder: Callable) -> Iterator[None]:
    """Tells recorder(function, arguments) of each kernel that is called inside, by any thread."""
    global _recorder
    before, _recorder = _recorder, recorder
    try:
        yield
    finally:
        _recorder = before


def kernels(kernel_name: str, op: str):
    """The module of `load`, or while calls are recorded what stands for it."""
    module = load(kernel_name, op)
    return module if _recorder is None else _Recorded(module, _recorder)


class _Recorded:
    def __init__(self, module: ModuleType, recorder: Callable):
        self._module, self._recorder = module, recorder

    def __getattr__(self, name: str):
        function = getattr(self._module, name)
        if isinstance(function, type):
            return function

        def call(*args):
            function(*args)
            self._recorder(function, args)

        return call


@functools.cache
def load(kernel_name: str, op: str) -> ModuleType:
    """The module that holds an op's kernel of that name."""
    base, _, arch = kernel_name.removeprefix(_EMULATED).partition(":")
    module = next(k.module for k in KERNELS[op] if k.name == base)
    if base == kernel_name:
        return importlib.import_module(module)
    from . import emulated

    return emulated.module_of(base, module, arch)


@constant
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@constant
def _cannot_emulate(base: str) -> str | None:
    """Why no kernel of that kind can be emulated here; None if one can."""
    if base in ("triton", "gluon"):
        return not_installed("triton" if base == "triton" else _GLUON.module)
    if base != "cuda":
        return "only cuda, gluon and triton kernels are emulated"
    if not CUDA_SOURCES.is_dir():
        return f"needs the CUDA sources in {CUDA_SOURCES}, which are not installed: use a clone"
    return None if shutil.which("nvcc") else "needs nvcc, which is not on the PATH"


def forced() -> str | None:
    """The backend that use() or FASTLM_BACKEND asks for, or None."""
    return _forced


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Run every op inside on "cuda", "gluon", "triton", "cpp" or "torch", or fail saying why.

    "emulated:cuda", "emulated:cuda:90a", "emulated:gluon" and "emulated:triton" run those kernels
    on CPU tensors, slowly. It holds for all threads. Raises ValueError for another name. Backward
    runs on the backend that its forward ran on; gluon's, on triton's kernels.
    """
    global _forced
    _check_name(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _check_name(name: str) -> None:
    names = (*BACKENDS, *EMULATED)
    if name not in names:
        raise ValueError(f"use: name: expected one of {', '.join(names)}, got {name!r}")


def asked_for() -> tuple[str | None, str | None, bool]:
    """What is asked for, the kernel's name in it, and whether it is to be emulated."""
    wanted = forced()
    if wanted is None:
        return None, None, False
    _check_name(wanted)
    base = wanted.removeprefix(_EMULATED)
    return wanted, base.partition(":")[0], base != wanted


def choose(op: str, x: Tensor, form: str | None = None, needs: Needs | None = None) -> str:
    """Name of the kernel that will run `op` on a tensor like `x`.

    `form` names what is special about the call ("an attention mask") where only the reference takes
    it; `needs` tells what not every kernel takes, and is asked where one may lack it. Raises
    BackendUnavailable, with every kernel's reason, where nothing can.
    """
    wanted, base, emulated = asked_for()
    reasons: list[str] = []
    for kernel in KERNELS[op]:
        if base not in (None, kernel.name):
            continue
        reason = kernel.why_not(x, form, emulated, needs)
        if reason is None:
            if kernel.name == "torch" and wanted is None and x.device.type == "cuda":
                _warn_once(op, "; ".join(reasons))
            return wanted or kernel.name
        reasons.append(f"{kernel.name}: {reason}")
    if not reasons:
        reasons = [f"{wanted}: there is no such kernel for this op"]
    raise BackendUnavailable(
        f"{op}: nothing can run it on {describe(x)}\n  " + "\n  ".join(reasons)
    )


@functools.cache
def _warn_once(op: str, reasons: str) -> None:
    warnings.warn(f"fastlm: {op} runs on torch's own operations, slowly ({reasons})", stacklevel=4)


def where(x: Tensor) -> int:
    """What a kernel module takes last: the number of threads, or the CUDA stream's handle."""
    if x.device.type == "cpu":
        return torch.get_num_threads()
    return torch.cuda.current_stream(x.device).cuda_stream


def describe(x: Tensor) -> str:
    """Shape, dtype and device of a tensor, for messages."""
    return f"{tuple(x.shape)} {names((x.dtype,))} {x.device.type}"


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)
