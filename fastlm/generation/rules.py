"""What a generation goes by, whichever way it searches."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .config import GenerationConfig
from .rows import Rows
from .safety import WordFilter
from .sampling import Drawer


@dataclass
class Rules:
    """process: (rows, scores) to scores; stop: (rows, scores) to (R,) bool."""

    config: GenerationConfig
    process: Callable[[Rows, Tensor], Tensor]
    stop: Callable[[Rows, Tensor], Tensor]
    drawer: Drawer
    word_filter: WordFilter | None = None
