"""GPT-2 (Radford et al., 2019, "Language Models are Unsupervised Multitask Learners") on our ops.

Module names, state dict, config and forward follow Hugging Face's `transformers.models.gpt2`, so
that checkpoints and code written for it work here. What differs is what runs: every norm, GELU,
attention, dropout and loss is one of `fastlm.ops`.

A residual stream is carried as a pair (x, residual): `x` is the last sublayer's output, not yet
added. The next norm does dropout(x) + residual and the normalisation in one pass over memory.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..generation import KVCache, generate
from .gpt2_config import GELUS, GPT2Config
from .inputs import (
    check_labels,
    check_length,
    check_mask,
    check_token_ids,
    check_tokens,
    positions,
    real_tokens_first,
    reorder,
    restore_order,
)
from .outputs import CausalLMOutput, TrunkOutput
from .pretrained import PreTrainedModel


class Conv1D(nn.Module):
    """y = x @ weight + bias, with weight stored (in, out) as in every GPT-2 checkpoint."""

    def __init__(self, out_features: int, in_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], self.weight.shape[1])


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

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        batch, length, width = x.shape
        packed = self.c_attn(x).view(batch, length, 3, self.n_head, width // self.n_head)
        q, k, v = packed.unbind(2)
        if cache is None:
            dropout = self.dropout if self.training else 0.0
            y = ops.attention(
                q, k, v, causal=True, softmax_scale=self.softmax_scale, dropout_p=dropout
            )
        else:
            past = cache.keys[self.layer], cache.values[self.layer]
            y = ops.attention_with_kvcache(
                q, *past, k, v, cache.lengths, causal=True, softmax_scale=self.softmax_scale
            )
        return self.c_proj(y.reshape(batch, length, width))


class GPT2MLP(nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Conv1D(inner, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, inner)
        self.approximate = GELUS[config.activation_function]

    def forward(self, x: Tensor) -> Tensor:
        # The bias of c_fc is added by the GELU, which reads the whole tensor anyway.
        hidden = x @ self.c_fc.weight
        bias = self.c_fc.bias.to(hidden.dtype)  # under autocast hidden is bfloat16
        return self.c_proj(ops.gelu(hidden, self.approximate, bias=bias))


class GPT2Block(nn.Module):
    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.ln_1 = ResidualLayerNorm(config)
        self.attn = GPT2Attention(config, layer)
        self.ln_2 = ResidualLayerNorm(config)
        self.mlp = GPT2MLP(config)

    def forward(self, x, residual, cache):
        normed, residual = self.ln_1(x, residual)
        normed, residual = self.ln_2(self.attn(normed, cache), residual)
        return self.mlp(normed), residual


class GPT2PreTrainedModel(PreTrainedModel):
    config_class = GPT2Config

    @torch.no_grad()
    def init_weights(self) -> None:
        """N(0, 0.02); projections back into the residual stream 1/sqrt(2 * n_layer) of that.

        There are 2 * n_layer such additions, and the stream's variance is their sum (section 2.3
        of the paper).
        """
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif ".ln_" in f".{name}":
                parameter.fill_(1.0)
            elif name.endswith("c_proj.weight"):
                parameter.normal_(0.0, std / math.sqrt(2 * self.config.n_layer))
            else:
                parameter.normal_(0.0, std)


class GPT2Model(GPT2PreTrainedModel):
    """The trunk: token ids in, normalised hidden states out."""

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(GPT2Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = ResidualLayerNorm(config)
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool = True,
    ):
        """Hidden states (B, T, n_embd) of `input_ids` (B, T), or of `inputs_embeds` (B, T, n_embd).

        attention_mask: (B, T) or, with a cache, (B, past + T); 0 marks padding, on either side.
        position_ids: (B, T); by default counted over the real tokens, so padding does not shift
        them. past_key_values: the cache of an earlier call, written in place; use_cache=True starts
        one. A cache has no backward. Raises ValueError for shapes and lengths, IndexError for ids
        outside the vocabulary.
        """
        tokens = self._embed_tokens(input_ids, inputs_embeds, token_type_ids)
        batch, length = tokens.shape[:2]
        if use_cache and past_key_values is None:
            past_key_values = KVCache.for_model(self, batch, self.config.n_positions)
        cache = past_key_values
        check_length(length, cache, self.config.n_positions)
        mask = check_mask(attention_mask, batch, length)
        if position_ids is None:
            position_ids = positions(mask, length, cache, tokens.device)
        order = real_tokens_first(mask)
        x = reorder(tokens + self.wpe(position_ids), order)
        x = ops.dropout(x, self.config.embd_pdrop, self.training)
        residual = None
        for block in self.h:
            x, residual = block(x, residual, cache)
        x, _ = self.ln_f(x, residual)
        if cache is not None:
            cache.advance(length, mask)
        output = TrunkOutput(restore_order(x, order), cache)
        return output if return_dict else output.to_tuple()

    def _embed_tokens(self, input_ids, inputs_embeds, token_type_ids):
        check_tokens(input_ids, inputs_embeds, self.config)
        tokens = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is None:
            return tokens
        check_token_ids("token_type_ids", token_type_ids, self.config.vocab_size)
        return tokens + self.wte(token_type_ids)


class GPT2LMHeadModel(GPT2PreTrainedModel):
    """GPT-2 with its language modelling head, which shares the token embedding's weight."""

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        self.transformer = GPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights()
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool = True,
        *,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ):
        """CausalLMOutput(loss, logits, past_key_values); the arguments of GPT2Model and:

        labels: (B, T) int64, position t is predicted from those before it; -100 is left out.
        shift_labels: the same, moved left by the caller, so that position t predicts entry t.
        num_items_in_batch: divides the summed loss, in place of the mean over this call's tokens.
        logits_to_keep: logits of the last so many positions only; 0 for all.
        Raises what GPT2Model raises, and for a label outside the vocabulary what
        `ops.cross_entropy` raises.
        """
        rest = token_type_ids, position_ids, inputs_embeds, use_cache
        trunk = self.transformer(input_ids, past_key_values, attention_mask, *rest)
        logits = self.lm_head(trunk.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            check_labels(labels, logits)
            # The labels move, not the logits: those would be copied, and are vocab_size as large.
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        if shift_labels is not None:
            check_labels(shift_labels, logits)
            loss = causal_lm_loss(logits, shift_labels, num_items_in_batch)
        output = CausalLMOutput(loss, logits, trunk.past_key_values)
        return output if return_dict else output.to_tuple()

    def generate(self, input_ids: Tensor, *args, **options) -> Tensor:
        """The prompt and its continuation, (B, T): see `fastlm.generation.generate`."""
        return generate(self, input_ids, *args, **options)


def causal_lm_loss(logits: Tensor, targets: Tensor, num_items_in_batch=None) -> Tensor:
    """Cross-entropy of logits (B, T, V) at targets (B, T): mean, or sum / num_items_in_batch."""
    flat = logits.view(-1, logits.shape[-1]), targets.reshape(-1)
    if num_items_in_batch is None:
        return ops.cross_entropy(*flat)
    return ops.cross_entropy(*flat, reduction="sum") / num_items_in_batch
