"""The C++ kernels for the CPU. Outputs come first and are allocated by the caller; `threads` comes
last (csrc/bindings.h).
"""

from typing import Any

from torch import Tensor

class AttentionOptions:
    def __init__(
        self,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        seqlens_k: Tensor | None,
        attn_mask: Tensor | None,
        alibi_slopes: Tensor | None,
        seed: Tensor | None,
        max_queries: int,
        max_keys: int,
        softmax_scale: float,
        softcap: float,
        window_left: int,
        window_right: int,
        dropout_p: float,
    ) -> None: ...

def layer_norm_forward(
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    threads: int,
) -> None: ...
def layer_norm_backward(
    dx: Tensor,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    threads: int,
) -> None: ...
def add_layer_norm_forward(
    y: Tensor,
    residual_out: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    threads: int,
) -> None: ...
def add_layer_norm_backward(
    dx: Tensor | None,
    dresidual: Tensor,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dy: Tensor,
    dresidual_out: Tensor | None,
    residual_out: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    threads: int,
) -> None: ...
def rms_norm_forward(
    y: Tensor, rstd: Tensor, x: Tensor, weight: Tensor | None, eps: float, threads: int
) -> None: ...
def rms_norm_backward(
    dx: Tensor,
    dweight: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    threads: int,
) -> None: ...
def gelu_forward(
    y: Tensor, x: Tensor, bias: Tensor | None, tanh_form: bool, threads: int
) -> None: ...
def gelu_backward(
    dx: Tensor,
    dbias: Tensor | None,
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    tanh_form: bool,
    threads: int,
) -> None: ...
def dropout(y: Tensor, x: Tensor, seed: Tensor, p: float, threads: int) -> None: ...
def cross_entropy_forward(
    loss: Tensor,
    lse: Tensor,
    dlogits: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    lse_square_scale: float,
    softcap: float,
    dloss: float,
    threads: int,
) -> None: ...
def cross_entropy_backward(
    dlogits: Tensor,
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    lse_square_scale: float,
    softcap: float,
    threads: int,
) -> None: ...
def linear(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, in_major: bool, threads: int
) -> None: ...
def linear_cross_entropy(
    loss: Tensor | None,
    lse: Tensor,
    dx: Tensor | None,
    dlinear_weight: Tensor | None,
    dlinear_bias: Tensor | None,
    dloss: Tensor | None,
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    lse_square_scale: float,
    softcap: float,
    threads: int,
) -> None: ...
def attention_forward(
    o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, threads: int
) -> None: ...
def attention_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    threads: int,
) -> None: ...
def cache_append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor, threads: int
) -> None: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def traffic(kind: str, target: Tensor, source: Tensor, threads: int) -> None: ...
def empty(shape: list[int], code: int, bits: int) -> Any: ...
def empty_cache() -> None: ...
def set_memory_limit(bytes: int) -> None: ...
def memory_stats() -> dict[str, int]: ...
