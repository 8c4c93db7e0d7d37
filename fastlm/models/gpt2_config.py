"""GPT2Config: Hugging Face's fields, defaults and aliases."""

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

from .. import checkpoint
from ..files import write_text
from ..hub import Source

# The names activation functions have in config.json, and the `approximate` that each is of GELU.
GELUS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


@dataclass(init=False)
class GPT2Config:
    """The shape of a GPT-2 and how it is trained; Hugging Face's fields, defaults and aliases.

    `GPT2Config(n_embd=64, n_head=4)` and `GPT2Config(hidden_size=64, num_attention_heads=4)` are
    the same. Raises TypeError for a name that is neither, ValueError for a value out of range.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # width of the MLP; None is 4 * n_embd
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    # Read and written, and needs no code: our attention always takes its softmax in float32.
    reorder_and_upcast_attn: bool = False
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True
    return_dict: bool = True
    output_attentions: bool = False
    output_hidden_states: bool = False
    # Of the heads that classify; problem_type None goes by num_labels and the labels' dtype.
    id2label: dict[int, str] = field(default_factory=lambda: {0: "LABEL_0", 1: "LABEL_1"})
    problem_type: str | None = None
    classifier_dropout: float | None = None  # None is 0.1
    # Of GPT2DoubleHeadsModel: which hidden state it classifies, and what it does with it.
    summary_type: str = "cls_index"
    summary_use_proj: bool = True
    summary_activation: str | None = None
    summary_proj_to_labels: bool = True
    summary_first_dropout: float = 0.1

    def __init__(self, **settings):
        for each in fields(self):
            fresh = each.default_factory
            setattr(self, each.name, each.default if fresh is MISSING else fresh())
        self.update(settings)

    def update(self, settings: dict) -> None:
        """Sets fields by name or alias; raises as the constructor does."""
        for name, value in settings.items():
            if name not in _accepted():
                raise TypeError(
                    f"GPT2Config: got an unknown setting {name!r}; accepted are "
                    f"{', '.join(_accepted())}"
                )
            setattr(self, name, value)
        self._check()

    def _check(self):
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            if getattr(self, name) < 1:
                raise ValueError(f"GPT2Config: {name}: got {getattr(self, name)}, accepted is >= 1")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"GPT2Config: n_embd: got {self.n_embd}, accepted is a multiple of "
                f"n_head ({self.n_head})"
            )
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"GPT2Config: {name}: got {getattr(self, name)}, accepted is 0 <= p < 1"
                )
        if self.activation_function not in GELUS:
            raise ValueError(
                f"GPT2Config: activation_function: got {self.activation_function!r}, "
                f"accepted are {', '.join(GELUS)}"
            )

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        if count != len(self.id2label):
            self.id2label = {number: f"LABEL_{number}" for number in range(count)}

    @property
    def label2id(self) -> dict[str, int]:
        return {label: number for number, label in self.id2label.items()}

    def __getattr__(self, name):  # called only for what is not a field
        if name in ALIASES:
            return getattr(self, ALIASES[name])
        raise AttributeError(f"GPT2Config has no {name!r}")

    def __setattr__(self, name, value):
        if name == "id2label":  # JSON's keys are strings
            value = {int(number): label for number, label in value.items()}
        super().__setattr__(ALIASES.get(name, name), value)

    def to_dict(self) -> dict:
        """Every field by name, with the entries by which Hugging Face knows the model."""
        known = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
        return {**known, **asdict(self), "label2id": self.label2id}

    @classmethod
    def from_dict(cls, settings: dict) -> "GPT2Config":
        """Takes what it knows; the other entries of a Hugging Face config.json are passed over."""
        return cls(**{name: value for name, value in settings.items() if name in _accepted()})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options) -> "GPT2Config":
        """The config.json of a folder or of a name on the hub; options as for a model's."""
        return checkpoint.load_config(cls, Source(pretrained_model_name_or_path, **options))

    def save_pretrained(self, folder: str | Path) -> None:
        write_text(Path(folder) / checkpoint.CONFIG, self.to_json())

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "GPT2Config":
        return cls.from_dict(json.loads(text))


def _accepted() -> list[str]:
    return [*(each.name for each in fields(GPT2Config)), *ALIASES, "num_labels"]
