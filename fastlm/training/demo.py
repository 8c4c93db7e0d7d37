"""`make demo`: trains a small GPT on the text that every Python carries, in a few minutes.

The text is the standard library's documentation (pydoc_data.topics) and its top-level modules. Both
vary with the Python version, and so do the numbers. A second call goes on where the first stopped.
"""

import argparse
import sys
import sysconfig
from pathlib import Path
from pydoc_data import topics

from ..cli import reported
from ..files import write_text
from . import checkpoint
from .bigram import Bigram
from .command import start
from .log import can_plot

# One pass over the text: three to four minutes on two cores.
STEPS = 1150
SETTINGS = {
    "tokenizer": "train",
    "vocab_size": 2048,
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 192,
    "dropout": 0.0,  # no token is seen twice
    "seq_len": 128,
    "batch_size": 8,
    "learning_rate": 2e-3,
    "min_learning_rate": 1e-4,
    "eval_every": 150,
    "sample_every": 0,
    "save_every": 500,
    "sample_prompt": "def ",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out-dir", type=Path, default=Path("out/demo"))
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    trainer = _trainer(args.out_dir, args.steps)
    vocabulary = len(trainer.tokenizer)
    bigram = Bigram(trainer.data.train, vocabulary).loss(trainer.data.validation)
    trainer.baselines["bigram model"] = bigram
    print(f"{trainer.model.num_parameters():,} parameters, {vocabulary:,} tokens in the vocabulary")
    print(f"\nA sample after {trainer.step} steps:\n{trainer.sample()}\n")
    if not trainer.run():
        print("stopped and saved; `make demo` goes on from here")
        return 130
    print(f"\nA sample after {trainer.step} steps:\n{trainer.sample()}\n")
    loss = trainer.evaluate()
    print(
        f"validation loss, all {len(trainer.data.validation):,} tokens, nats per token:\n"
        f"  interpolated bigram model  {bigram:.3f}\n"
        f"  this GPT                   {loss:.3f}"
    )
    if can_plot():
        print(f"loss plot: {args.out_dir / 'loss.png'}")
    print(f"more from it: fastlm generate --model {args.out_dir} --prompt 'class '\n")
    return 0 if loss < bigram else 1


def _trainer(out_dir: Path, steps: int):
    if checkpoint.every(out_dir):
        return start({"resume": str(out_dir), "steps": steps})
    return start({**SETTINGS, "steps": steps, "out_dir": str(out_dir), "data": _text(out_dir)})


def _text(out_dir: Path) -> list[str]:
    """The files to train on; the documentation, which is a Python dict, becomes one a topic."""
    for name, text in topics.topics.items():
        write_text(out_dir / "text" / f"{name}.txt", text)
    library = Path(sysconfig.get_paths()["stdlib"])
    return [str(out_dir / "text"), *map(str, sorted(library.glob("*.py")))]


if __name__ == "__main__":
    sys.exit(reported(main))
