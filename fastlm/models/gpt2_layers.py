"""The layers of GPT-2 on our ops, with the names and layouts of its checkpoints.

A residual stream is carried as a pair (x, residual): `x` is the last sublayer's output, not yet
added. The next norm does dropout(x) + residual and the normalisation in one pass over memory.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..generation.cache import KVCache, refuse_backward
from .gpt2_config import GELUS, GPT2Config
from .packing import Packing


class Linear(nn.Linear):
    """torch's, on the kernel for few rows where that applies."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight, self.bias)


class Conv1D(nn.Module):
    """y = x @ weight + bias, with weight stored (in, out) as in every GPT-2 checkpoint."""

    def __init__(self, out_features: int, in_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight.t(), self.bias)


class ResidualLayerNorm(nn.Module):
    """(layer_norm(r), r) with r = dropout(x) + residual; r = x while there is no residual yet."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_embd))
        self.bias = nn.Parameter(torch.empty(config.n_embd))
        self.eps = config.layer_norm_epsilon
        self.dropout = config.resid_pdrop

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            return ops.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps), x
        x = x.to(residual.dtype)  # under autocast: bfloat16 products into a float32 stream
        dropout = self.dropout if self.training else 0.0
        return ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps, dropout_p=dropout)


class GPT2Attention(nn.Module):
    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.attn_pdrop
        self.softmax_scale = 1.0
        if config.scale_attn_weights:
            self.softmax_scale = (config.n_embd // config.n_head) ** -0.5
        if config.scale_attn_by_inverse_layer_idx:
            self.softmax_scale /= layer + 1
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def forward(
        self,
        x: Tensor,
        cache: KVCache | None = None,
        packing: Packing | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(y, weights): y like x; weights (B, heads, T, keys) if asked for, otherwise None."""
        batch, length, width = x.shape
        packed = self.c_attn(x).view(batch, length, 3, self.n_head, width // self.n_head)
        q, k, v = packed.unbind(2)
        weights = self._weights(q, k, cache, packing) if output_attentions else None
        if cache is None or cache.longest == 0:
            y = self._attend_to_itself(q, k, v, packing)
            if cache is not None:
                cache.write(self.layer, k, v, packing)
        else:
            y = refuse_backward(self._attend_to_cache(q, k, v, cache, packing), q)
        return self.c_proj(y.reshape(batch, length, width)), weights

    def _attend_to_itself(self, q, k, v, packing):
        options: dict[str, Any] = {"causal": True, "softmax_scale": self.softmax_scale}
        options["dropout_p"] = self.dropout if self.training else 0.0
        if packing is None:
            return ops.attention(q, k, v, **options)
        lengths = {"cu_seqlens_q": packing.cu_seqlens, "cu_seqlens_k": packing.cu_seqlens_k}
        longest = {"max_seqlen_q": packing.longest, "max_seqlen_k": packing.longest}
        return ops.attention(q[0], k[0], v[0], **lengths, **longest, **options)[None]

    def _attend_to_cache(self, q, k, v, cache, packing):
        options: dict[str, Any] = {"causal": True, "softmax_scale": self.softmax_scale}
        if packing is None:
            past = cache.keys[self.layer], cache.values[self.layer]
            return ops.attention_with_kvcache(q, *past, k, v, cache.lengths, **options)
        with torch.no_grad():
            cache.write(self.layer, k, v, packing)
            keys, values, cu_seqlens = cache.packed(self.layer, packing)
            lengths = {"cu_seqlens_q": packing.cu_seqlens, "cu_seqlens_k": cu_seqlens}
            return ops.attention(q[0], keys, values, **lengths, **options)[None]

    def _weights(self, q, k, cache, packing):
        """The softmax itself, which the kernels never hold: for looking at, in plain torch.

        Keys are the batch's columns; with a filled cache the cache's slots.
        """
        if packing is not None:
            q, k = packing.unpack(q), packing.unpack(k)
        length, device = q.shape[1], q.device
        query = torch.arange(length, device=device).expand(q.shape[0], -1)
        if cache is not None and cache.longest > 0:
            k, real = cache.with_new_keys(self.layer, k, packing), None
            query = query if packing is None else (packing.mask.cumsum(1) - 1).clamp_min(0)
            query = query + cache.lengths[:, None]
        else:
            real = None if packing is None else packing.mask
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.softmax_scale
        seen = torch.arange(k.shape[1], device=device) <= query[..., None]
        if real is not None:
            # A padding query would see nothing, and softmax of nothing is NaN.
            seen = (seen & real[:, None]) | ~real[..., None]
        return scores.float().masked_fill(~seen[:, None], -torch.inf).softmax(-1).to(q.dtype)


class GPT2MLP(nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Conv1D(inner, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, inner)
        self.approximate = GELUS[config.activation_function]

    def forward(self, x: Tensor) -> Tensor:
        # The bias of c_fc is added by the GELU, which reads the whole tensor anyway.
        hidden = ops.linear(x, self.c_fc.weight.t())
        bias = self.c_fc.bias.to(hidden.dtype)  # under autocast hidden is bfloat16
        return self.c_proj(ops.gelu(hidden, self.approximate, bias=bias))


class GPT2Block(nn.Module):
    """One layer. forward gives (x, residual, what came in as one tensor, attention weights)."""

    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.ln_1 = ResidualLayerNorm(config)
        self.attn = GPT2Attention(config, layer)
        self.ln_2 = ResidualLayerNorm(config)
        self.mlp = GPT2MLP(config)

    def forward(self, x, residual, cache=None, packing=None, output_attentions=False):
        normed, entered = self.ln_1(x, residual)
        attended, weights = self.attn(normed, cache, packing, output_attentions)
        normed, residual = self.ln_2(attended, entered)
        return self.mlp(normed), residual, entered, weights
