"""GPT-2 under other heads than the language model's, with transformers' names and results."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..generation import GenerationConfig, GenerationMixin
from .gpt2 import (
    GPT2Model,
    GPT2PreTrainedModel,
    causal_lm_loss,
    left_out_at_padding,
    shifted,
)
from .gpt2_config import GPT2Config
from .gpt2_layers import Linear
from .outputs import (
    ClassifierOutput,
    DeferredLogits,
    DoubleHeadsOutput,
    ModelOutput,
    QuestionAnsweringOutput,
    TrunkOutput,
)

PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


class _HeadedModel(GPT2PreTrainedModel):
    """What these models share: a trunk, and outputs that carry what the trunk gave."""

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = GPT2Model(config)

    def _finish(self, output: ModelOutput, trunk: TrunkOutput, return_dict: bool | None):
        for name in ("past_key_values", "hidden_states", "attentions"):
            if hasattr(output, name):
                setattr(output, name, getattr(trunk, name))
        whole = self.config.return_dict if return_dict is None else return_dict
        return output if whole else output.to_tuple()


class GPT2ForSequenceClassification(_HeadedModel):
    """Logits (B, num_labels) of each row's last token that is not config.pad_token_id."""

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        self.score = nn.Linear(config.n_embd, self.num_labels, bias=False)
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values=None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **outputs: bool,
    ):
        """ClassifierOutput; the arguments of GPT2Model and labels.

        labels: (B,) int64 classes; (B,) or (B, num_labels) floats for regression; (B, num_labels)
            floats for several labels at once. Raises ValueError for several rows where
            config.pad_token_id is None: nobody could tell where they end.
        """
        rest = token_type_ids, position_ids, inputs_embeds, use_cache
        outputs["return_dict"] = True
        trunk = self.transformer(input_ids, past_key_values, attention_mask, *rest, **outputs)
        hidden = trunk.last_hidden_state
        row = torch.arange(hidden.shape[0], device=hidden.device)
        logits = self.score(hidden[row, self._last(input_ids, hidden)])
        loss = None if labels is None else self._loss(logits, labels)
        return self._finish(ClassifierOutput(loss, logits), trunk, return_dict)

    def _last(self, input_ids: Tensor | None, hidden: Tensor) -> Tensor | int:
        pad = self.config.pad_token_id
        if pad is None and hidden.shape[0] != 1:
            raise ValueError(
                f"GPT2ForSequenceClassification: got {hidden.shape[0]} rows and no "
                "config.pad_token_id, accepted is one row, or a config that names the padding"
            )
        if pad is None or input_ids is None:
            return -1
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        return torch.where(input_ids != pad, place, 0).amax(1)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        problem = self.config.problem_type
        if problem is None:
            several = PROBLEMS[2] if labels.is_floating_point() else PROBLEMS[1]
            problem = PROBLEMS[0] if self.num_labels == 1 else several
        if problem == "regression":
            return F.mse_loss(logits.view(labels.shape), labels)
        if problem == "single_label_classification":
            return ops.cross_entropy(logits, labels.view(-1))
        if problem == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels)
        raise ValueError(
            f"GPT2ForSequenceClassification: problem_type: got {problem!r}, accepted are {PROBLEMS}"
        )


class GPT2ForTokenClassification(_HeadedModel):
    """Logits (B, T, num_labels) of every token."""

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        dropout = config.classifier_dropout
        self.dropout = 0.1 if dropout is None else dropout
        self.classifier = nn.Linear(config.n_embd, self.num_labels)
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values=None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **outputs: bool,
    ):
        """ClassifierOutput; the arguments of GPT2Model and labels (B, T), -100 left out."""
        rest = token_type_ids, position_ids, inputs_embeds, use_cache
        outputs["return_dict"] = True
        trunk = self.transformer(input_ids, past_key_values, attention_mask, *rest, **outputs)
        hidden = ops.dropout(trunk.last_hidden_state, self.dropout, self.training)
        logits, loss = self.classifier(hidden), None
        if labels is not None:
            loss = ops.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return self._finish(ClassifierOutput(loss, logits), trunk, return_dict)


class GPT2ForQuestionAnswering(_HeadedModel):
    """start_logits and end_logits (B, T): where in the text the answer begins and ends."""

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.n_embd, 2)
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        return_dict: bool | None = None,
        **outputs: bool,
    ):
        """QuestionAnsweringOutput; positions (B,) beyond the text are left out of the loss."""
        rest = token_type_ids, position_ids, inputs_embeds, False
        outputs["return_dict"] = True
        trunk = self.transformer(input_ids, None, attention_mask, *rest, **outputs)
        start, end = self.qa_outputs(trunk.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            pairs = (start, start_positions), (end, end_positions)
            loss = torch.stack([self._loss(*pair) for pair in pairs]).mean()
        return self._finish(QuestionAnsweringOutput(loss, start, end), trunk, return_dict)

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        beyond = logits.shape[1]
        target = target.flatten().clamp(0, beyond)
        return ops.cross_entropy(logits.contiguous(), target, ignore_index=beyond)


class SequenceSummary(nn.Module):
    """One vector, or its projection to a score, of the states (..., T, n_embd) of a sequence."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.kind = config.summary_type
        if self.kind not in ("last", "first", "mean", "cls_index"):
            raise ValueError(
                f"GPT2DoubleHeadsModel: summary_type: got {self.kind!r}, accepted are last, first, "
                "mean and cls_index"
            )
        width = 1 if config.summary_proj_to_labels else config.n_embd
        self.summary = nn.Linear(config.n_embd, width) if config.summary_use_proj else nn.Identity()
        self.activation = torch.tanh if config.summary_activation == "tanh" else nn.Identity()
        self.first_dropout = config.summary_first_dropout

    def forward(self, hidden: Tensor, cls_index: Tensor | None = None) -> Tensor:
        """cls_index (...): the token to take; None is the last."""
        if self.kind == "mean":
            state = hidden.mean(-2)
        elif self.kind == "first":
            state = hidden[..., 0, :]
        elif self.kind == "last" or cls_index is None:
            state = hidden[..., -1, :]
        else:
            state = hidden.take_along_dim(cls_index[..., None, None], -2).squeeze(-2)
        state = ops.dropout(state, self.first_dropout, self.training)
        return self.activation(self.summary(state))


class GPT2DoubleHeadsModel(_HeadedModel, GenerationMixin):
    """A language model and a scorer of choices at once; inputs are (B, choices, T)."""

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.multiple_choice_head = SequenceSummary(config)
        self.generation_config = GenerationConfig.of_model(config)
        self.init_weights()
        self.tie_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values=None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mc_token_ids: Tensor | None = None,
        labels: Tensor | None = None,
        mc_labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **outputs: bool,
    ):
        """DoubleHeadsOutput; the arguments of GPT2Model with any dimensions before T, and:

        mc_token_ids: (B, choices), the token whose state is scored; None is the last.
        labels: like input_ids, shifted inside. mc_labels: (B,), the right choice.
        """
        leading = _shape(input_ids, inputs_embeds)[:-1]
        flat = [
            None if t is None else t.flatten(0, len(leading) - 1)
            for t in (attention_mask, token_type_ids, position_ids, inputs_embeds, input_ids)
        ]
        *rest, ids = flat
        outputs["return_dict"] = True
        trunk = self.transformer(ids, past_key_values, *rest, use_cache, **outputs)
        hidden = trunk.last_hidden_state
        states = hidden.unflatten(0, leading)
        mc_logits = self.multiple_choice_head(states, mc_token_ids).squeeze(-1)
        loss = mc_loss = None
        if mc_labels is not None:
            mc_loss = ops.cross_entropy(mc_logits.view(-1, mc_logits.shape[-1]), mc_labels.view(-1))
        if labels is not None:
            targets = left_out_at_padding(shifted(labels.flatten(0, -2)), rest[0])
            loss = causal_lm_loss(self.lm_head, hidden, targets)
        logits = self.lm_head(states) if loss is None else DeferredLogits(self.lm_head, states)
        return self._finish(DoubleHeadsOutput(loss, mc_loss, logits, mc_logits), trunk, return_dict)


def _shape(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> torch.Size:
    """(B, choices, T), of whichever there is."""
    if input_ids is None and inputs_embeds is None:
        raise ValueError("GPT2DoubleHeadsModel: got neither input_ids nor inputs_embeds")
    return inputs_embeds.shape[:-1] if input_ids is None else input_ids.shape  # type: ignore[union-attr]
