"""GPT-2 (Radford et al., 2019, "Language Models are Unsupervised Multitask Learners") on our ops.

Module names, state dict, config and forward follow Hugging Face's `transformers.models.gpt2`, so
that checkpoints and code written for it work here. What differs is what runs: every norm, GELU,
attention, dropout and loss is one of `fastlm.ops`.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..generation import GenerationConfig, GenerationMixin
from ..generation.cache import KVCache
from .gpt2_config import GPT2Config
from .gpt2_layers import GPT2Block, Linear, ResidualLayerNorm
from .inputs import (
    check_cache,
    check_labels,
    check_length,
    check_mask,
    check_token_ids,
    check_tokens,
    positions,
)
from .outputs import CausalLMOutput, DeferredLogits, TrunkOutput
from .packing import Packing
from .pretrained import PreTrainedModel

SPARE_SLOTS = 64  # tokens for which a cache that forward starts has room before it grows


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
        self.gradient_checkpointing = False
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
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ):
        """Hidden states (B, T, n_embd) of `input_ids` (B, T), or of `inputs_embeds` (B, T, n_embd).

        attention_mask: (B, T) or, with a cache, (B, past + T); 0 marks padding, on either side.
            Padding is not computed; its hidden states are 0.
        position_ids: (B, T); by default counted over the real tokens, so padding does not shift
            them.
        past_key_values: the cache of an earlier call, written in place. use_cache=True starts one;
            by default config.use_cache says so, where no gradient is wanted. The tokens of a cache
            have no backward, and asking for it is a RuntimeError.
        output_attentions: softmax of each layer (B, n_head, T, keys), in plain torch.
        output_hidden_states: the embeddings, each layer's result, and last the normalised one.
        Raises ValueError for shapes and lengths, IndexError for ids outside the vocabulary.
        """
        config = self.config
        tokens = self._embed_tokens(input_ids, inputs_embeds, token_type_ids)
        batch, length = tokens.shape[:2]
        cache = self._cache(check_cache(past_key_values), use_cache, batch, length)
        check_length(length, cache, config.n_positions)
        mask = check_mask(attention_mask, batch, length, cached=cache is not None)
        if position_ids is None:
            position_ids = positions(mask, length, cache, tokens.device)
        packing = None if mask is None else Packing.of(mask)
        x = tokens + self.wpe(position_ids)
        x = x if packing is None else packing.pack(x)
        x = ops.dropout(x, config.embd_pdrop, self.training)
        if cache is not None:
            cache.make_room(length)
        attend = _asked(output_attentions, config.output_attentions)
        x, entered, weights = self.run_layers(x, cache, packing, attend)
        if cache is not None:
            cache.advance(length, packing)
        if packing is not None:
            x, entered = packing.unpack(x), [packing.unpack(states) for states in entered]
        show = _asked(output_hidden_states, config.output_hidden_states)
        output = TrunkOutput(
            x, cache, (*entered, x) if show else None, tuple(weights) if attend else None
        )
        return output if _asked(return_dict, config.return_dict) else output.to_tuple()

    def _embed_tokens(self, input_ids, inputs_embeds, token_type_ids):
        check_tokens(input_ids, inputs_embeds, self.config)
        tokens = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is None:
            return tokens
        check_token_ids("token_type_ids", token_type_ids, self.config.vocab_size)
        return tokens + self.wte(token_type_ids)

    def _cache(self, cache, use_cache, batch, length):
        if self.gradient_checkpointing and self.training:
            if cache is not None:
                raise ValueError(
                    "GPT2Model: past_key_values: got one with gradient checkpointing, accepted is "
                    "None: layers that run twice would fill it twice"
                )
            return None
        if cache is not None or use_cache is False:
            return cache
        if use_cache is None and (torch.is_grad_enabled() or not self.config.use_cache):
            return None
        capacity = min(length + SPARE_SLOTS, self.config.n_positions)
        return KVCache.for_model(self, batch, capacity)

    def run_layers(self, x, cache=None, packing=None, output_attentions=False):
        """(normalised states, what entered each layer, each layer's attention weights) of embedded
        tokens (B, T, n_embd), or packed ones (1, N, n_embd).
        """
        residual, entered, weights = None, [], []
        for block in self.h:
            arguments = x, residual, cache, packing, output_attentions
            if self.gradient_checkpointing and self.training:
                outputs = checkpoint(block, *arguments, use_reentrant=False)
            else:
                outputs = block(*arguments)
            x, residual = outputs[:2]
            entered.append(outputs[2])
            weights.append(outputs[3])
        return self.ln_f(x, residual)[0], entered, weights


def _asked(argument: bool | None, default: bool) -> bool:
    return default if argument is None else argument


class GPT2LMHeadModel(GPT2PreTrainedModel, GenerationMixin):
    """GPT-2 with its language modelling head, which shares the token embedding's weight."""

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        self.transformer = GPT2Model(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.generation_config = GenerationConfig.of_model(config)
        self.init_weights()
        self.tie_weights()

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
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ):
        """CausalLMOutput(loss, logits, past_key_values, ...); the arguments of GPT2Model and:

        labels: (B, T) int64, position t is predicted from those before it; -100 is left out.
        shift_labels: the same, moved left by the caller, so that position t predicts entry t.
        num_items_in_batch: divides the summed loss, in place of the mean over this call's tokens.
        Padding predicts nothing: its positions are left out of the loss whatever the labels are.
        logits_to_keep: logits of the last so many positions only, 0 for all; or the positions.
        With labels no cache is started unless asked for, and the logits are computed when
        `output.logits` is first read. Raises what GPT2Model raises, and for a label outside the
        vocabulary what `ops.linear_cross_entropy` raises.
        """
        targets = shift_labels if labels is None else shifted(labels)
        if targets is not None and use_cache is None:
            use_cache = False
        rest = token_type_ids, position_ids, inputs_embeds, use_cache
        trunk = self.transformer(
            input_ids, past_key_values, attention_mask, *rest,
            output_attentions, output_hidden_states, return_dict=True,
        )  # fmt: skip
        hidden, loss = trunk.last_hidden_state, None
        if targets is not None:
            check_labels(targets, hidden)
            targets = left_out_at_padding(targets, attention_mask)
            loss = causal_lm_loss(self.lm_head, hidden, targets, num_items_in_batch)
        kept = kept_positions(hidden, logits_to_keep)
        logits = self.lm_head(kept) if loss is None else DeferredLogits(self.lm_head, kept)
        output = CausalLMOutput(
            loss, logits, trunk.past_key_values, trunk.hidden_states, trunk.attentions
        )
        return output if _asked(return_dict, self.config.return_dict) else output.to_tuple()


def kept_positions(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The states (B, kept, n_embd) of the last so many positions (0: all), or of those given."""
    if isinstance(logits_to_keep, Tensor):
        return hidden[:, logits_to_keep]
    return hidden[:, -logits_to_keep:]


def shifted(labels: Tensor) -> Tensor:
    """(B, T) targets of each position. The labels move, and not the states, which are larger."""
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def left_out_at_padding(targets: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Left padding would otherwise be asked for the first token of its row."""
    if attention_mask is None:
        return targets
    return targets.masked_fill(attention_mask[:, -targets.shape[1] :] == 0, -100)


def causal_lm_loss(
    head: nn.Module, hidden: Tensor, targets: Tensor, num_items_in_batch=None
) -> Tensor:
    """Cross-entropy of head(hidden) at targets: mean, or sum / num_items_in_batch.

    hidden (B, T, C), targets (B, T); -100 is left out. A plain Linear is not applied: the loss
    is taken without the logits in memory.
    """
    reduction = "mean" if num_items_in_batch is None else "sum"
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    if type(head) is Linear:
        loss = ops.linear_cross_entropy(
            hidden, head.weight, targets, linear_bias=head.bias, reduction=reduction
        )
    else:
        loss = ops.cross_entropy(head(hidden), targets, reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch
