"""What every model of this package has: loading, saving, embeddings, counting."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..hub import Source

# What transformers' from_pretrained takes and what needs no doing here: there is one attention,
# code is never fetched, and weights always go straight to their place.
PASSED_OVER = {"attn_implementation", "trust_remote_code", "low_cpu_mem_usage", "weights_only"}
OF_THE_SOURCE = {
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
}


class PreTrainedModel(nn.Module):
    """A module made from a config; a family names its own in `config_class`."""

    config_class: type

    def __init__(self, config):
        super().__init__()
        self.config = config

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config=None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        device_map: str | torch.device | dict | None = None,
        use_safetensors: bool | None = None,
        **options,
    ):
        """The model of a folder, or of a name on the Hugging Face hub, in eval mode.

        dtype (or torch_dtype): a torch.dtype or its name; None and "auto" keep the file's.
        device, or device_map with one device in it: where to; by default the CPU.
        use_safetensors: True and False insist on model.safetensors or pytorch_model.bin; both may
            be in shards.
        options: cache_dir, force_download, local_files_only, revision, subfolder and token as
            huggingface_hub takes them (it also honours HF_HUB_OFFLINE), and fields of the config.
        A head that the file lacks is initialised anew, with a warning. Raises FileNotFoundError for
        a missing file, CheckpointError for one that is damaged or does not fit the config, naming
        the tensors, TypeError for an unknown option.
        """
        taken = {name: options.pop(name) for name in OF_THE_SOURCE & set(options)}
        source = Source(pretrained_model_name_or_path, **taken)
        settings = {name: value for name, value in options.items() if name not in PASSED_OVER}
        if config is None:
            config = source
        if not isinstance(config, cls.config_class):
            where = config if isinstance(config, Source) else Source(config)
            config = checkpoint.load_config(cls.config_class, where)
        config.update(settings)
        return checkpoint.load_model(
            cls, source, config,
            dtype=_dtype(dtype if dtype is not None else torch_dtype),
            device=device if device is not None else _device(device_map),
            use_safetensors=use_safetensors,
        )  # fmt: skip

    def save_pretrained(
        self, folder: str | Path, *, max_shard_size: int | str = "50GB", **passed_over
    ) -> None:
        """Writes config.json and model.safetensors, each replaced whole or left as it was.

        More than max_shard_size (bytes, or "200MB", "5GB") is split into several files with an
        index. Other arguments of transformers' are passed over.
        """
        checkpoint.save_model(self, folder, max_shard_size)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def base_model(self) -> Any:
        """The trunk, without a head."""
        return getattr(self, "transformer", self)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.base_model.wte

    def set_input_embeddings(self, embeddings: nn.Embedding) -> None:
        self.base_model.wte = embeddings

    def get_output_embeddings(self) -> Any:
        return getattr(self, "lm_head", None)

    def set_output_embeddings(self, embeddings: nn.Module) -> None:
        self.lm_head = embeddings

    def tie_weights(self) -> None:
        """Makes the language modelling head, where there is one, share the embedding's weight."""
        if self.config.tie_word_embeddings and self.get_output_embeddings() is not None:
            self.lm_head.weight = self.get_input_embeddings().weight

    @torch.no_grad()
    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """The token embedding with that many rows (None: as many as now), kept ones unchanged.

        New rows are the mean of the old, so that no new token is likely before it is trained
        (Hewitt, 2021, "Initializing New Word Embeddings for Pretrained Language Models"), or
        N(0, initializer_range) without mean_resizing. The head and config.vocab_size follow.
        """
        embeddings = self.get_input_embeddings()
        rows = embeddings.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            rows = -(-rows // pad_to_multiple_of) * pad_to_multiple_of
        if rows != embeddings.num_embeddings:
            self.set_input_embeddings(self._resized(embeddings, rows, mean_resizing))
            head = self.get_output_embeddings()
            if isinstance(head, nn.Linear):
                self.set_output_embeddings(self._resized(head, rows, mean_resizing))
            self.config.vocab_size = rows
            self.tie_weights()
        return self.get_input_embeddings()

    def _resized(self, module, rows: int, mean_resizing: bool):
        old: Tensor = module.weight
        new = old.new_empty(rows, old.shape[1])
        kept = min(rows, old.shape[0])
        new[:kept] = old[:kept]
        new[kept:].normal_(0.0, self.config.initializer_range)
        if mean_resizing:
            new[kept:] = old.float().mean(0).to(old.dtype)
        module.weight = nn.Parameter(new, requires_grad=old.requires_grad)
        count = "num_embeddings" if isinstance(module, nn.Embedding) else "out_features"
        setattr(module, count, rows)
        return module

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None):
        """In training, keeps each layer's input only and computes the rest again in backward."""
        self.base_model.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.base_model.gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.base_model.gradient_checkpointing

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Numbers to learn; a tied head counts once."""
        left_out = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
        return sum(
            parameter.numel()
            for parameter in self.parameters()
            if (parameter.requires_grad or not only_trainable)
            and not (exclude_embeddings and id(parameter) in left_out)
        )


def _dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    if given is None or isinstance(given, torch.dtype):
        return given
    found = None if given == "auto" else getattr(torch, given.removeprefix("torch."), given)
    if found is not None and not isinstance(found, torch.dtype):
        raise ValueError(
            f"from_pretrained: dtype: got {given!r}, accepted are torch's dtypes, their names and "
            "'auto'"
        )
    return found


def _device(device_map) -> str | torch.device:
    if isinstance(device_map, dict):
        devices = set(device_map.values())
        if len(devices) != 1:
            raise ValueError(
                f"from_pretrained: device_map: got {device_map}, accepted is one device for all"
            )
        device_map = devices.pop()
    if device_map in ("auto", "balanced", "sequential"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cpu" if device_map is None else device_map
