"""PTX to C++: one module in, one C++ source out. Each class of instruction has its own file."""

from . import (  # noqa: F401  (importing registers their instructions)
    arithmetic,
    atomic,
    control,
    conversion,
    copies,
    floating,
    logic,
    memory,
    movement,
    tensor,
    warp,
)
from .module import kernel_groups, parameter_layout, restrict, source_lines, translate
from .registry import instruction_class

__all__ = [
    "instruction_class",
    "kernel_groups",
    "parameter_layout",
    "restrict",
    "source_lines",
    "translate",
]
