"""`fastlm train`."""

import shlex
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import CheckpointError
from ..files import remove_leftovers
from ..models import GPT2Config, GPT2LMHeadModel
from ..text import find_files
from ..tokenizer import GPT2Tokenizer
from . import checkpoint, lock, settings
from .config import TrainingConfig
from .data import TokenData, tokenize, training_texts
from .distributed import World
from .finite import first_not_finite
from .log import can_plot
from .loop import Trainer
from .settings import ModelSettings
from .signals import exit_on_sigterm

OUT_DIR = "out/run"


def add_arguments(parser: ArgumentParser) -> None:
    """One flag for each setting. A flag not given is absent, so that --resume can tell."""
    parser.add_argument("data", nargs="*", default=SUPPRESS, help="text files, or folders of them")
    parser.add_argument("--out-dir", default=SUPPRESS, help=f"where the run's files go ({OUT_DIR})")
    parser.add_argument(
        "--resume",
        metavar="OUT_DIR",
        help="continue the run in this folder; its settings apply where no flag says otherwise",
    )
    for owner in (ModelSettings, TrainingConfig):
        for field in fields(owner):
            kind: Any = field.type
            shown = f" ({field.default})" if field.default not in ("", None) else ""
            parser.add_argument(
                f"--{field.name.replace('_', '-')}",
                type=kind,
                default=SUPPRESS,
                metavar=kind.__name__.upper(),
                help=field.metadata["help"] + shown,
            )
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    trainer = start(vars(args))
    if trainer.world.leads:
        _warn(trainer, vars(args))
    finished = trainer.run()
    if trainer.world.leads:
        _say_where(trainer, finished)
    trainer.world.leave()
    return 0 if finished else 130  # the shell's status for an interrupted command


def start(given: dict) -> Trainer:
    """A Trainer, new or restored, from settings by name; those not given have their defaults.

    Its folder is locked until it has run. Raises FileNotFoundError, OSError, TextError,
    CheckpointError or ValueError: what `fastlm train` prints.
    """
    resumed = given.get("resume") is not None
    out_dir = _out_dir(given, resumed)
    wanted = settings.merged(given, _settings_of(out_dir) if resumed else {})
    what = settings.take(ModelSettings, wanted)
    how = settings.take(TrainingConfig, wanted)
    files = find_files(wanted["data"])
    world = World.join(how.device)
    if world.leads:
        if not resumed:
            settings.refuse_foreign_files(out_dir, wanted)
        lock.hold(out_dir)
    try:
        # The others write nothing, and wait where Python cannot act on a signal.
        with exit_on_sigterm() if world.leads else nullcontext():
            previous = _previous(out_dir, resumed, wanted)
            if world.leads:
                for folder in (out_dir, *_written_to(what, out_dir)):
                    remove_leftovers(folder)
                if not resumed:
                    settings.write(out_dir, wanted)
            origin = Path(what.init_from) if previous is None and what.init_from else previous
            tokenizer, data = _prepare(what, files, out_dir, origin, world)
            model = _model(what, how, tokenizer, origin)
            trainer = Trainer(model, tokenizer, data, how, out_dir, world)
            if previous is not None:
                trainer.restore(previous)
                if world.leads:
                    settings.write(out_dir, wanted)
    except BaseException:
        lock.release(out_dir)
        raise
    return trainer


def _out_dir(given: dict, resumed: bool) -> Path:
    out_dir = Path(given["resume"] if resumed else given.get("out_dir", OUT_DIR))
    if resumed and Path(given.get("out_dir", out_dir)) != out_dir:
        raise ValueError(
            f"train: out_dir: expected none with --resume {out_dir}, which is that folder, got "
            f"{given['out_dir']!r}"
        )
    return out_dir


def _settings_of(out_dir: Path) -> dict:
    if not (out_dir / settings.FILE).is_file():
        raise FileNotFoundError(
            f"train: --resume: {out_dir} has no {settings.FILE}: expected the --out-dir of an "
            "earlier run"
        )
    return settings.read(out_dir)


def _previous(out_dir: Path, resumed: bool, wanted: dict) -> Path | None:
    """The checkpoint to resume from, where one is resumed."""
    found = checkpoint.every(out_dir)
    if found and not resumed:
        raise ValueError(
            f"train: {out_dir} holds a run already: continue it with --resume "
            f"{out_dir}, or choose another --out-dir"
        )
    if resumed and not found:
        flags = [f"--{name.replace('_', '-')}={wanted[name]}" for name in wanted if name != "data"]
        command = ["fastlm", "train", *wanted["data"], f"--out-dir={out_dir}", *flags]
        raise FileNotFoundError(
            f"train: --resume: {out_dir} has no checkpoint, as the run ended before its first: "
            f"repeat the command that began it: {shlex.join(command)}"
        )
    return found[-1] if found else None


def _written_to(what: ModelSettings, out_dir: Path) -> tuple[Path, ...]:
    return out_dir / "checkpoints", out_dir / "tokenizer", _cache(what, out_dir)


def _cache(what: ModelSettings, out_dir: Path) -> Path:
    return Path(what.cache_dir) if what.cache_dir else out_dir / "tokens"


def _prepare(
    what: ModelSettings, files: list[Path], out_dir: Path, origin: Path | None, world: World
) -> tuple[GPT2Tokenizer, TokenData]:
    """The tokenizer and the tokens; the leading process makes them, the others find them made."""
    if not world.leads:
        world.wait()
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
    data = tokenize(files, tokenizer, _cache(what, out_dir), what.validation)
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
        model = GPT2LMHeadModel.from_pretrained(origin, dtype=torch.float32)
        wrong = first_not_finite(model.state_dict())
        if wrong is not None:
            raise CheckpointError(f"{origin}: {wrong}: expected finite numbers, got inf or nan")
        return model
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


def _warn(trainer: Trainer, given: dict) -> None:
    """Tells what will not be done."""
    held_out, seq_len = len(trainer.data.validation), trainer.config.seq_len
    warnings = []
    if "sample_prompt" in given and trainer.config.sample_every == 0:
        warnings.append("--sample-prompt has no effect with --sample-every 0")
    if 0 < held_out <= seq_len:
        warnings.append(
            f"no validation loss: {held_out} tokens are held out, it takes more than seq_len = "
            f"{seq_len}"
        )
    for warning in warnings:
        print(f"fastlm: warning: {warning}", file=sys.stderr)


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
