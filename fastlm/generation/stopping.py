"""When a row is finished: functions of (rows, scores) to (R,) bool."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from .config import GenerationConfig
from .rows import Rows

Criterion = Callable[[Rows, Tensor], Tensor]


def stop_rule(
    config: GenerationConfig, ends: Tensor, custom=None, tokenizer=None
) -> Callable[[Rows, Tensor], Tensor]:
    """True where any of what `config` asks for says so, or one of transformers' criteria, which
    are functions of (input_ids, scores) to a bool or (R,) bools.
    """
    criteria: list[Criterion] = [
        lambda rows, scores: rows.limits <= rows.made,
        lambda rows, scores: torch.isin(rows.last, ends),
    ]
    if config.max_time is not None:
        criteria.append(_out_of_time(config.max_time))
    if config.stop_strings is not None:
        strings = config.stop_strings
        criteria.append(
            _stop_strings([strings] if isinstance(strings, str) else strings, tokenizer)
        )
    for each in custom or ():
        criteria.append(_of_input_ids(each))

    def finished(rows: Rows, scores: Tensor) -> Tensor:
        result = torch.zeros(rows.count, dtype=torch.bool, device=rows.ids.device)
        for each in criteria:
            result = result | each(rows, scores)
        return result

    return finished


def _out_of_time(seconds: float) -> Criterion:
    began = time.monotonic()
    return lambda rows, scores: torch.full_like(
        rows.last, time.monotonic() - began > seconds, dtype=torch.bool
    )


def _stop_strings(strings: list[str], tokenizer) -> Criterion:
    """A row ends with the token that completes one of the strings; it may bring more text along."""
    if tokenizer is None:
        raise ValueError("generate: stop_strings: got no tokenizer, accepted is tokenizer=... too")
    # A token holds a byte at least: no string reaches further back than its bytes.
    longest = max(len(s.encode()) for s in strings)

    def run(rows: Rows, scores: Tensor) -> Tensor:
        done = []
        for row in range(rows.count):
            tail = rows.tokens(row)[-longest - 1 :].tolist()
            text, before = tokenizer.decode(tail), tokenizer.decode(tail[:-1])
            done.append(any(text.find(s, max(0, len(before) - len(s) + 1)) >= 0 for s in strings))
        return torch.tensor(done, device=rows.ids.device)

    return run


def _of_input_ids(criterion: Callable) -> Criterion:
    def run(rows: Rows, scores: Tensor) -> Tensor:
        told = criterion(rows.history, scores)
        return torch.as_tensor(told, device=rows.ids.device).expand(rows.count).bool()

    return run
