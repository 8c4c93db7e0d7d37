"""`fastlm train`."""

import json
from argparse import SUPPRESS, ArgumentParser, Namespace
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from ..checkpoint import write_text
from ..models import GPT2Config, GPT2LMHeadModel
from ..text import find_files
from ..tokenizer import GPT2Tokenizer
from . import checkpoint
from .config import TrainingConfig, setting
from .data import TokenData, tokenize, training_texts
from .distributed import World
from .log import can_plot
from .loop import Trainer

SETTINGS = "run.json"


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
        if not 0 <= self.validation < 1:
            raise ValueError(f"train: validation: got {self.validation}, accepted is 0 <= v < 1")


def add_arguments(parser: ArgumentParser) -> None:
    """One flag for each setting. A flag not given is absent, so that --resume can tell."""
    parser.add_argument("data", nargs="*", default=SUPPRESS, help="text files, or folders of them")
    parser.add_argument(
        "--out-dir", default="out/run", help="where the run's files go (%(default)s)"
    )
    parser.add_argument(
        "--resume",
        metavar="OUT_DIR",
        help="continue the run in this folder; its settings apply where no flag says otherwise",
    )
    for owner in (ModelSettings, TrainingConfig):
        for field in fields(owner):
            shown = f" ({field.default})" if field.default != "" else ""
            parser.add_argument(
                f"--{field.name.replace('_', '-')}",
                type=type(field.default),
                default=SUPPRESS,
                metavar=type(field.default).__name__.upper(),
                help=field.metadata["help"] + shown,
            )
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    trainer = start(vars(args))
    finished = trainer.run()
    if trainer.world.leads:
        _say_where(trainer, finished)
    trainer.world.leave()
    return 0 if finished else 130  # the shell's status for an interrupted command


def start(given: dict) -> Trainer:
    """A Trainer, new or restored, from settings by name; those not given have their defaults.

    Raises FileNotFoundError, TextError, CheckpointError or ValueError: what `fastlm train` prints.
    """
    out_dir = Path(given.get("resume") or given["out_dir"])
    previous = checkpoint.every(out_dir)
    saved = _settings_of(out_dir) if given.get("resume") else {}
    if previous and not given.get("resume"):
        raise ValueError(
            f"train: {out_dir} holds a run already: continue it with --resume "
            f"{out_dir}, or choose another --out-dir"
        )
    settings = saved | {
        name: value for name, value in given.items() if name == "data" or name in _names()
    }
    if not settings.get("data"):
        raise ValueError("train: data: got nothing, accepted are text files and folders")
    settings["data"] = [str(Path(path).absolute()) for path in settings["data"]]
    what, how = _take(ModelSettings, settings), _take(TrainingConfig, settings)
    world = World.join(how.device)
    origin = previous[-1] if previous else Path(what.init_from) if what.init_from else None
    tokenizer, data = _prepare(what, settings["data"], out_dir, origin, world)
    trainer = Trainer(_model(what, how, tokenizer, origin), tokenizer, data, how, out_dir, world)
    if previous:
        trainer.restore(previous[-1])
    if world.leads:
        write_text(out_dir / SETTINGS, json.dumps(settings, indent=2) + "\n")
    return trainer


def _names() -> set[str]:
    return {field.name for owner in (ModelSettings, TrainingConfig) for field in fields(owner)}


def _take(owner, settings: dict):
    return owner(**{f.name: settings[f.name] for f in fields(owner) if f.name in settings})


def _settings_of(out_dir: Path) -> dict:
    path = out_dir / SETTINGS
    if not path.is_file() or not checkpoint.every(out_dir):
        raise FileNotFoundError(
            f"train: --resume: {out_dir} has no {SETTINGS} and checkpoints/; "
            "accepted is the --out-dir of an earlier run"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _prepare(
    what: ModelSettings, paths: list[str], out_dir: Path, origin: Path | None, world: World
) -> tuple[GPT2Tokenizer, TokenData]:
    """The tokenizer and the tokens; the leading process makes them, the others find them made."""
    if not world.leads:
        world.wait()
    files = find_files(paths)
    trained = out_dir / "tokenizer"
    if origin is not None:
        tokenizer = GPT2Tokenizer.from_pretrained(origin)
    elif what.tokenizer == "gpt2":
        tokenizer = GPT2Tokenizer.gpt2()
    elif what.tokenizer != "train":
        tokenizer = GPT2Tokenizer.from_pretrained(what.tokenizer)
    elif world.leads:
        tokenizer = GPT2Tokenizer.train(training_texts(files, what.validation), what.vocab_size)
        tokenizer.save_pretrained(trained)
    else:
        tokenizer = GPT2Tokenizer.from_pretrained(trained)
    cache = Path(what.cache_dir) if what.cache_dir else out_dir / "tokens"
    data = tokenize(files, tokenizer, cache, what.validation)
    if world.leads:
        world.wait()
        print(
            f"{len(files)} files: {len(data.train):,} tokens to train on, "
            f"{len(data.validation):,} to validate"
        )
    return tokenizer, data


def _model(
    what: ModelSettings, how: TrainingConfig, tokenizer: GPT2Tokenizer, origin: Path | None
) -> GPT2LMHeadModel:
    if origin is not None:
        # Whatever precision the file has, training keeps its weights in float32.
        return GPT2LMHeadModel.from_pretrained(origin, dtype=torch.float32)
    torch.manual_seed(how.seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=how.seq_len,
            n_embd=what.n_embd,
            n_layer=what.n_layer,
            n_head=what.n_head,
            resid_pdrop=what.dropout,
            embd_pdrop=what.dropout,
            attn_pdrop=what.dropout,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _say_where(trainer: Trainer, finished: bool) -> None:
    out_dir = trainer.out_dir
    if finished:
        print(f"done after {trainer.step} steps; text from it: fastlm generate --model {out_dir}")
    else:
        print(
            f"stopped after step {trainer.step} and saved; go on with: "
            f"fastlm train --resume {out_dir}"
        )
    if can_plot():
        print(f"losses: {out_dir / 'loss.png'} and {out_dir / 'log.csv'}")
    else:
        print(
            f"losses: {out_dir / 'log.csv'} (no plot: pip install 'fastlm[train]' brings "
            "matplotlib)"
        )
