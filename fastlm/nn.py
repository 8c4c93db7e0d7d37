"""Modules over the ops, and `accelerate`, which swaps them into a model that exists already.

transformers is imported when a function here that needs it is called, and never before.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ops
from .models.packing import Packing

ATTENTION = "fastlm"  # the name under which transformers knows our attention


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm, its arguments and state dict, on fastlm's kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class GELU(nn.GELU):
    """torch.nn.GELU on fastlm's kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.gelu(input, self.approximate)


class _TanhGELU(GELU):
    approximate = "tanh"  # of modules that have no such attribute


class _ExactGELU(GELU):
    approximate = "none"


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss on fastlm's kernels."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return ops.cross_entropy(
            input, target, self.weight,
            ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )  # fmt: skip


# By exact type: a subclass may compute something else. transformers' are named, not imported.
SWAPS: dict[type | str, type[nn.Module]] = {
    nn.LayerNorm: LayerNorm,
    nn.GELU: GELU,
    nn.CrossEntropyLoss: CrossEntropyLoss,
    "transformers.activations.NewGELUActivation": _TanhGELU,
    "transformers.activations.GELUTanh": _TanhGELU,
    "transformers.activations.GELUActivation": _ExactGELU,
}


@dataclass
class Acceleration:
    """What `accelerate` did: `swaps` lists (name, before, after); `undo()` takes it back."""

    swaps: list[tuple[str, str, str]] = field(default_factory=list)
    _undo: list[Callable[[], object]] = field(default_factory=list, repr=False)

    def add(self, name: str, before: str, after: str, undo: Callable[[], object]) -> None:
        self.swaps.append((name, before, after))
        self._undo.append(undo)

    def undo(self) -> None:
        """Makes the model what it was; its weights, trained since or not, stay."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        lines = [f"{name or 'model'}: {before} -> {after}" for name, before, after in self.swaps]
        return "\n".join(lines) or "nothing was found that fastlm has a kernel for"


def accelerate(model: nn.Module) -> Acceleration:
    """Swaps fastlm's kernels into `model`, in place: every nn.LayerNorm, GELU (transformers' too)
    and nn.CrossEntropyLoss, and of a transformers model the attention and the language modelling
    loss. Parameters, hooks and state dict stay.

    Returns what was swapped; print it, and call its `undo()` to have the old model back. Each op
    falls back to torch where it has no kernel, as `fastlm.explain` tells.
    """
    done = Acceleration()
    for name, module in model.named_modules():
        kind = type(module)
        new = SWAPS.get(kind) or SWAPS.get(f"{kind.__module__}.{kind.__qualname__}")
        if new is not None:
            module.__class__ = new
            done.add(name, kind.__name__, f"fastlm.nn.{new.__name__}", _Reset(module, kind))
    if hasattr(model, "set_attn_implementation"):
        _swap_attention(model, done)
    loss = getattr(model, "loss_function", None)
    if getattr(loss, "__name__", None) == "ForCausalLMLoss" and "_loss_function" not in vars(model):
        model.loss_function = causal_lm_loss  # type: ignore[assignment]
        done.add("loss_function", "ForCausalLMLoss", "ops.cross_entropy", _Unset(model))
    return done


@dataclass
class _Reset:
    module: nn.Module
    kind: type

    def __call__(self) -> None:
        self.module.__class__ = self.kind


@dataclass
class _Unset:
    model: nn.Module

    def __call__(self) -> None:
        vars(self.model).pop("_loss_function", None)


def _swap_attention(model: Any, done: Acceleration) -> None:
    before = model.config._attn_implementation
    if before == ATTENTION or getattr(model.config, "reorder_and_upcast_attn", False):
        return  # that option exists on the eager attention only
    register_attention()
    model.set_attn_implementation(ATTENTION)
    undo = lambda: model.set_attn_implementation(before)  # noqa: E731
    done.add("attention", before, "ops.attention", undo)


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch=None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **unused,
) -> Tensor:
    """transformers' loss of a language model, on `ops.cross_entropy`: float32, no copy of logits.

    logits (B, T, V), labels (B, T), shifted here, or shift_labels (B, T), shifted already; the mean
    over what is not ignored, or the sum over num_items_in_batch.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = ops.cross_entropy(
        logits.view(-1, vocab_size), shift_labels.to(logits.device).flatten(),
        ignore_index=ignore_index, reduction=reduction,
    )  # fmt: skip
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def register_attention() -> None:
    """Makes attn_implementation="fastlm" known to transformers, with masks to go with it.

    Raises ImportError without transformers.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, attention_interface)
    AttentionMaskInterface.register(ATTENTION, attention_mask_interface)


def attention_interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unused,
) -> tuple[Tensor, None]:
    """transformers' attention contract: (B, heads, tokens, head_dim) in, (B, tokens, heads,
    head_dim) out.

    attention_mask: None; (B, keys) bool, False for padding, which is then not computed; or a mask
    of four dimensions, with which torch's attention runs.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        y = ops.scaled_dot_product_attention(
            query, key, value, attention_mask, dropout, scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        return y.transpose(1, 2), None
    options: dict[str, Any] = {
        "causal": getattr(module, "is_causal", True) if is_causal is None else is_causal,
        "softmax_scale": scaling,
        "dropout_p": dropout,
        "window_size": (-1, -1) if sliding_window is None else (sliding_window - 1, 0),
        "softcap": softcap or 0.0,
    }
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    if attention_mask is None:
        return ops.attention(q, k, v, **options), None
    of_q, of_k = Packing.of(attention_mask[:, -q.shape[1] :]), Packing.of(attention_mask)
    y = ops.attention(
        of_q.pack(q)[0], of_k.pack(k)[0], of_k.pack(v)[0],
        cu_seqlens_q=of_q.cu_seqlens, cu_seqlens_k=of_k.cu_seqlens, **options,
    )  # fmt: skip
    return of_q.unpack(y[None]), None


def attention_mask_interface(
    *,
    mask_function: Callable,
    kv_length: int,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **rest,
) -> Tensor | None:
    """The mask that `attention_interface` gets: of padding alone (B, keys), or what SDPA gets."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    plain = mask_function is causal_mask_function and allow_is_causal_skip
    padded = attention_mask is not None and attention_mask.shape[1] == kv_length
    if plain and padded and not torch.compiler.is_compiling():
        mask = attention_mask.bool()  # type: ignore[union-attr]
        return None if bool(mask.all()) else mask
    return sdpa_mask(
        mask_function=mask_function, kv_length=kv_length, attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip, **rest,
    )  # fmt: skip
