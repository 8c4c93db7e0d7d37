"""What every model of this package has: loading, saving, counting."""

from pathlib import Path

import torch
from torch import nn

from .. import checkpoint


class PreTrainedModel(nn.Module):
    """A module made from a config; a family names its own in `config_class`."""

    config_class: type

    def __init__(self, config):
        super().__init__()
        self.config = config

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        config=None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ):
        """The model of `folder` (config.json and model.safetensors), in eval mode.

        dtype None keeps the file's. Raises FileNotFoundError for a missing file, CheckpointError
        for one that is damaged or does not fit the config, naming the tensors.
        """
        if config is None:
            config = checkpoint.load_config(cls.config_class, folder)
        return checkpoint.load_model(cls, folder, config, dtype=dtype, device=device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors, each replaced whole or left as it was."""
        checkpoint.save_model(self, folder)

    def tie_weights(self) -> None:
        """Shares what is one tensor under two names; without such, nothing is to be done."""

    def num_parameters(self) -> int:
        """Numbers to learn; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())
