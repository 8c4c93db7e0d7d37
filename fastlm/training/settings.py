"""What a run is asked for, by name, and how it is kept in run.json for --resume."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..files import write_text
from . import log
from .config import TrainingConfig, check_types, require, setting

FILE = "run.json"


@dataclass
class ModelSettings:
    """What is trained, and on what; TrainingConfig says how."""

    tokenizer: str = setting("gpt2", "gpt2, train (a new one, from the data) or a folder")
    vocab_size: int = setting(4096, "tokens of a new tokenizer")
    init_from: str = setting("", "folder of a model to start from, with its tokenizer")
    n_layer: int = setting(6, "layers of a new model")
    n_head: int = setting(6, "attention heads of a new model")
    n_embd: int = setting(384, "width of a new model")
    dropout: float = setting(0.1, "dropout of a new model, wherever GPT-2 has one")
    validation: float = setting(0.05, "fraction of the text held out")
    cache_dir: str = setting("", "where tokenised text is kept; empty for OUT_DIR/tokens")

    def __post_init__(self):
        check_types(self)
        for name in ("n_layer", "n_head", "n_embd"):
            require(self, name, getattr(self, name) >= 1, ">= 1")
        multiple = self.n_embd % self.n_head == 0
        require(self, "n_embd", multiple, f"a multiple of n_head = {self.n_head}")
        for name in ("dropout", "validation"):
            require(self, name, 0 <= getattr(self, name) < 1, f"0 <= {name} < 1")


DEFAULTS = {
    field.name: field.default for c in (ModelSettings, TrainingConfig) for field in fields(c)
}
OF_A_NEW_MODEL = ("tokenizer", "vocab_size", "n_layer", "n_head", "n_embd", "dropout")
# What the weights, and the order of the text, depend on from the first step.
FIXED = (*OF_A_NEW_MODEL, "init_from", "validation", "seq_len", "seed")


def take(owner, settings: dict[str, Any]):
    return owner(**{f.name: settings[f.name] for f in fields(owner) if f.name in settings})


def merged(given: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run: those given over those saved of the run that is resumed.

    Raises ValueError for one that would have no effect.
    """
    chosen = {name: value for name, value in given.items() if name == "data" or name in DEFAULTS}
    settings = saved | chosen
    for name in FIXED if saved else ():
        began_with = saved.get(name, DEFAULTS[name])
        if chosen.get(name, began_with) != began_with:
            raise ValueError(
                f"train: {name}: expected {began_with!r}, with which the resumed run began, got "
                f"{chosen[name]!r}: it cannot change; --init-from starts another run from its model"
            )
    for name in OF_A_NEW_MODEL:
        if name in chosen and settings.get("init_from"):
            raise ValueError(
                f"train: {name}: expected none with --init-from, whose model and tokenizer are "
                f"taken as they are, got {chosen[name]!r}"
            )
    if "vocab_size" in chosen and settings.get("tokenizer") != "train":
        raise ValueError(
            f"train: vocab_size: expected none without --tokenizer train, which alone makes a new "
            f"vocabulary, got {chosen['vocab_size']!r}"
        )
    for name in ("eval_every", "eval_batches"):
        if name in chosen and settings.get("validation") == 0:
            raise ValueError(
                f"train: {name}: expected none with --validation 0, which holds out no text, got "
                f"{chosen[name]!r}"
            )
    if not settings.get("data"):
        raise ValueError("train: data: expected text files and folders, got nothing")
    return settings | {"data": [str(Path(path).absolute()) for path in settings["data"]]}


def read(out_dir: Path) -> dict[str, Any]:
    """The settings of a run; ValueError if run.json is not what `write` writes."""
    path = out_dir / FILE
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected the settings of a run, got {error}") from error
    unknown = sorted(set(settings) - {*DEFAULTS, "data"}) if isinstance(settings, dict) else []
    if unknown or not isinstance(settings, dict) or not isinstance(settings.get("data"), list):
        got = f"the unknown {', '.join(unknown)}" if unknown else "no data in it"
        raise ValueError(f"{path}: expected the settings of a run, got {got}")
    return settings


def write(out_dir: Path, settings: dict[str, Any]) -> None:
    write_text(out_dir / FILE, json.dumps(settings, indent=2) + "\n")


def refuse_foreign_files(out_dir: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError for a file that a run would overwrite and that no run has written."""
    names = [log.LOG, log.SAMPLES, log.PLOT] + ["tokenizer"] * (
        settings.get("tokenizer") == "train"
    )
    if (out_dir / FILE).exists():
        read(out_dir)
        names = []
    for path in (out_dir / name for name in names):
        if path.exists():
            raise ValueError(
                f"{path}: expected no such file or one of a run, got one without a {FILE} beside "
                "it: move it away, or choose another --out-dir"
            )
    log.Log(out_dir / log.LOG)
    log.Samples(out_dir / log.SAMPLES)
