"""Runs a recorded sequence of kernel calls again: what a CUDA graph is, on any device.

Between two kernels of a decoding step lie Python, autograd and two dispatchers, which on a CPU take
as long as a third of the step. A step that does the same work on the same memory needs them once.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import backend

# The ops whose work is kernel calls alone; what others do in torch would not be recorded.
_OPS = {
    "add_layer_norm_forward",
    "attention_forward",
    "cache_append",
    "gelu_forward",
    "layer_norm_forward",
    "linear_forward",
    "rms_norm_forward",
}
_DEPENDS_ON_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_ALLOCATIONS = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided")


class NotReplayable(RuntimeError):
    """The function did something that depends on more than the memory it was recorded on."""


class Replay:
    """One run of function(*args), whose result is `result`; `run()` computes it again, in place.

    function: runs without gradients; everything it reads that changes between runs must be in
    tensors that exist before, and be written there. Its results, and every tensor on the way, keep
    their memory. Kernels are called again as they were; of torch's own ops those that make tensors
    are run again and copied to where their results were.
    Raises NotReplayable for an op that reads values back to Python, and for one of fastlm's that
    runs on torch or does more than call kernels.
    """

    def __init__(self, function, *args):
        self._steps: list = []
        self._kept: list = []
        with torch.no_grad(), backend.recording(self._record), _Watch(self):
            self.result = function(*args)

    def run(self):
        """The result of the function on what its tensors hold now."""
        with torch.no_grad():
            for function, args in self._steps:
                function(*args)
        return self.result

    def _record(self, function, args) -> None:
        self._steps.append((function, args))

    def _watch(self, func, args, kwargs, out) -> None:
        """Of one dispatched op: keep its memory, and record it where the kernels' calls do not."""
        self._kept.append(out)
        name = func._schema.name
        namespace, _, short = name.partition("::")
        if namespace == "fastlm":
            if short not in _OPS or args[-1] == "torch":
                raise NotReplayable(f"{name} on {args[-1]}: does more than call kernels")
            return
        returns, arguments = func._schema.returns, func._schema.arguments
        if any(a.alias_info is not None and a.alias_info.is_write for a in arguments):
            self._record(_again, (func, args, kwargs))
        elif _DEPENDS_ON_VALUES & set(func.tags):
            raise NotReplayable(f"{name}: what it returns depends on values")
        elif name not in _ALLOCATIONS and any(r.alias_info is None for r in returns):
            self._record(_again_into, (out, func, args, kwargs))


class _Watch(TorchDispatchMode):
    def __init__(self, replay: Replay):
        super().__init__()
        self.replay = replay

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.replay._watch(func, args, kwargs or {}, out)
        return out


def _again(func, args, kwargs) -> None:
    func(*args, **kwargs)


def _again_into(out, func, args, kwargs) -> None:
    found = func(*args, **kwargs)
    if isinstance(out, torch.Tensor):
        out.copy_(found)
        return
    for old, new in zip(out, found, strict=True):
        old.copy_(new)
