"""What a run leaves to look at: log.csv, loss.png drawn from it, and samples.txt."""

import csv
import io
from importlib.util import find_spec
from pathlib import Path

from ..files import replacing, write_text

LOG, PLOT, SAMPLES = "log.csv", "loss.png", "samples.txt"
COLUMNS = (
    "step",
    "tokens",
    "train_loss",
    "validation_loss",
    "learning_rate",
    "gradient_norm",
    "tokens_per_second",
    "seconds",
)
HEADING = "--- step "


class Log:
    """Rows of COLUMNS in `path`, one a line; ValueError if it holds anything else.

    A value that was not measured is left empty.
    """

    def __init__(self, path: Path):
        self.path = path
        read(path)

    def begin(self, last_step: int) -> None:
        """Keeps the rows up to `last_step`: a resumed run writes the later ones again."""
        kept = [row for row in read(self.path) if int(row["step"]) <= last_step]
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        write_text(self.path, text.getvalue())

    def write(self, **values) -> None:
        row = io.StringIO()
        csv.DictWriter(row, COLUMNS, lineterminator="\n").writerow(values)
        _append(self.path, row.getvalue())


class Samples:
    """Texts in `path`, each under its step; ValueError if it holds anything else."""

    def __init__(self, path: Path):
        self.path = path
        # The bytes that this run has written; None for all that there are.
        self.size: int | None = 0
        if path.is_file():
            with open(path, encoding="utf-8", errors="replace") as file:
                start = file.read(len(HEADING))
            if start not in ("", HEADING):
                raise _foreign(path, f"the heading {HEADING!r}", start)

    def begin(self) -> None:
        """Keeps the first `size` bytes: a resumed run writes the later ones again."""
        text = self.path.read_bytes() if self.path.is_file() else b""
        kept = text[: self.size]
        if kept != text:
            with replacing(self.path) as temporary:
                temporary.write_bytes(kept)
        self.size = len(kept)

    def write(self, step: int, text: str) -> str:
        entry = f"{HEADING}{step}\n{text}\n"
        _append(self.path, entry)
        self.size = self.path.stat().st_size
        return entry


def _append(path: Path, text: str) -> None:
    try:
        with open(path, "a", encoding="utf-8", newline="") as file:
            file.write(text)
    except OSError as error:
        raise OSError(f"{path}: could not be written: {error}") from error


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a log; ValueError for a file that is none."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        lines = file.readlines()
    if lines and lines[0] != ",".join(COLUMNS) + "\n":
        raise _foreign(path, f"the columns {','.join(COLUMNS)}", lines[0])
    # A process that was killed, or a full disk, may have left part of a row.
    rows = list(csv.DictReader(line for line in lines if line.endswith("\n")))
    for row in rows:
        if None in row or None in row.values() or not row["step"].isdecimal():
            raise ValueError(f"{path}: expected a step and {len(COLUMNS)} columns, got {row}")
    return rows


def _foreign(path: Path, expected: str, got: str) -> ValueError:
    return ValueError(
        f"{path}: expected {expected} of a run at its start, got {got[:80].strip()!r}: a run would "
        "overwrite it: move it away, or choose another --out-dir"
    )


def can_plot() -> bool:
    return find_spec("matplotlib") is not None


def plot(log: Path, image: Path, baselines: dict[str, float] | None = None) -> None:
    """Draws the losses of `log` over steps into `image` (PNG), with baselines as level lines."""
    from matplotlib.figure import Figure  # an optional dependency, and slow to import

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    for column, style in (("train_loss", "-"), ("validation_loss", "o-")):
        points = [(int(row["step"]), float(row[column])) for row in read(log) if row[column]]
        if points:
            axes.plot(
                *zip(*points, strict=True), style, markersize=3, label=column.removesuffix("_loss")
            )
    for number, (name, loss) in enumerate((baselines or {}).items()):
        axes.axhline(loss, linestyle="--", color=f"C{2 + number}", label=f"{name}: {loss:.2f}")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    with replacing(image) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
