"""What rounding does to a computation: Monte Carlo arithmetic (Parker, 1997) on torch's operations.

Every result of an operation that rounds, and every partial sum of a plain loop over the terms of a
sum or product, is changed by one unit of roundoff, up or down at random. The spread of the results
is the error that a plain computation makes at that precision. It is known without a run at that
precision, which for few numbers may be exact by luck.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_map_only

from fastlm.ops.define import REFERENCES

_aten = torch.ops.aten
_FUSED = torch._decomp.get_decompositions([
    _aten.native_layer_norm, _aten.native_layer_norm_backward, _aten._fused_rms_norm,
    _aten._fused_rms_norm_backward, _aten._softmax, _aten._softmax_backward_data,
    _aten._log_softmax, _aten._log_softmax_backward_data, _aten.gelu, _aten.gelu_backward,
    _aten.logsumexp, _aten.tanh_backward,
])  # fmt: skip
_ROUNDS = {
    "add", "sub", "rsub", "mul", "div", "sqrt", "pow", "reciprocal", "addcmul", "addcdiv",
    "var_mean",
}  # fmt: skip
# Libraries of mathematical functions (Sleef, CUDA's) have these right to 1 or 2 units in the last
# place: up to 4 units of roundoff.
_FUNCTIONS = {"exp", "log", "tanh", "erf", "rsqrt"}
_SUMS = {"sum", "mean"}
_PRODUCTS = {"mm", "bmm", "mv", "dot", "addmm", "baddbmm"}


class RandomRounding(TorchDispatchMode):
    """Inside, floating-point operations err by `roundoff`, relative to each result; what is kept in
    a narrower dtype, by `stored`.
    """

    def __init__(self, roundoff: float, stored: float, seed: int):
        super().__init__()
        self.roundoff, self.stored = roundoff, stored
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        with self:
            if function in _FUSED:
                return _FUSED[function](*args, **kwargs)
            if function._can_decompose():
                return function.decompose(*args, **kwargs)
            if function.namespace == "fastlm":
                return self._of_fastlm(name, *args)
        if name == "var_mean":
            args = tree_map_only(Tensor, self.rounded, args)
        result = function(*args, **kwargs)
        if name in _SUMS and result.is_floating_point():
            dims = args[1] if len(args) > 1 else kwargs.get("dim")
            parts = 1 if name == "sum" else args[0].numel() / max(result.numel(), 1)
            return result + self._of_a_sum(args[0], dims).view(result.shape) / parts
        if name in _PRODUCTS:
            result = result + self._of_a_product(*args[-2:])
        elif name.removesuffix("_") not in _ROUNDS | _FUNCTIONS:
            return result
        units = 4 if name.removesuffix("_") in _FUNCTIONS else 1
        if name.endswith("_"):
            return result.add_(self.error(result, units * self.roundoff))
        return tree_map_only(Tensor, lambda t: self.rounded(t, units), result)

    def error(self, t: Tensor, roundoff: float) -> Tensor:
        up = torch.randint(2, t.shape, dtype=t.dtype, generator=self.generator)
        return (t * (roundoff * (2 * up - 1))).masked_fill(~t.isfinite(), 0)

    def rounded(self, t: Tensor, units: int = 1) -> Tensor:
        return t + self.error(t, units * self.roundoff) if t.is_floating_point() else t

    def _of_a_sum(self, terms: Tensor, dims: list[int] | None) -> Tensor:
        """The error of the sum over `dims`, None or empty for all of them."""
        dims = [d % max(terms.dim(), 1) for d in dims or range(terms.dim())]
        rest = [d for d in range(terms.dim()) if d not in dims]
        terms = terms.permute([*rest, *dims])
        terms = terms.flatten(len(rest)) if dims else terms[..., None]
        return self.error(terms.cumsum(-1), self.roundoff).sum(-1)

    def _of_a_product(self, a: Tensor, b: Tensor) -> Tensor:
        if a.dim() == 3:
            each = [self._of_a_product(*pair) for pair in zip(a, b, strict=True)]
            return torch.stack(each) if each else torch.bmm(a, b)
        terms = a * b if b.dim() == 1 else a[:, None] * b.mT
        return self.error(terms.cumsum(-1), self.roundoff).sum(-1)

    def _of_fastlm(self, name: str, *args):
        *args, _ = args  # the backend
        if name == "attention_backward":
            args = self._with_stored_output(*args)
        result = REFERENCES[name](*args)
        if result is None:
            return None
        if isinstance(result, Tensor):
            return result + self.error(result, self.stored)
        return result[0] + self.error(result[0], self.stored), *result[1:]

    def _with_stored_output(self, dout, dlse, q, k, v, o, *rest):
        """Kernels sum dout * o of the output as it was stored, the reference of a wider one: the
        difference, in dlse, which is subtracted from that sum.
        """
        away = (dout * self.error(o, self.stored)).sum(-1).transpose(-1, -2)
        return dout, away if dlse is None else dlse + away, q, k, v, o, *rest


class _Stored(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t):
        return _as_stored(t)

    @staticmethod
    def backward(ctx, grad):
        return _as_stored(grad)


def stored(t: Tensor) -> Tensor:
    """`t`, which kernels keep in the dtype of their inputs, as its gradient."""
    return _Stored.apply(t)


def _as_stored(t: Tensor) -> Tensor:
    mode = _get_current_dispatch_mode()
    return t + mode.error(t, mode.stored) if isinstance(mode, RandomRounding) else t.view_as(t)
