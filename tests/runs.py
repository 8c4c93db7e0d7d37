"""Small training runs for tests: their settings, and what two of them are compared by."""

from fastlm.training.command import start
from fastlm.training.log import read

SETTINGS = {
    "tokenizer": "train", "vocab_size": 270, "n_layer": 2, "n_head": 2, "n_embd": 16,
    "seq_len": 16, "batch_size": 4, "accumulate": 2, "steps": 10, "warmup_steps": 3,
    "learning_rate": 1e-2, "eval_every": 5, "eval_batches": 2, "sample_every": 0, "save_every": 5,
}  # fmt: skip
MEASURED = ("seconds", "tokens_per_second")


def new_run(text_folder, out_dir, **settings):
    return start({**SETTINGS, "data": [str(text_folder)], "out_dir": str(out_dir), **settings})


def weights(trainer):
    return trainer.model.state_dict()


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].equal(b[name]), name


def before_step(trainer, step, action):
    """Calls `action` once, when `trainer` is about to take `step`."""
    train_step = trainer.train_step

    def acting():
        if trainer.step + 1 == step:
            action()
        return train_step()

    trainer.train_step = acting


def logged(out_dir):
    """The rows of a run's log without what a clock has measured."""
    rows = read(out_dir / "log.csv")
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]
