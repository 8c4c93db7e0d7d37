"""What a run leaves to look at: log.csv, and loss.png drawn from it."""

import csv
import io
from importlib.util import find_spec
from pathlib import Path

from ..checkpoint import replacing, write_text

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


class Log:
    """Rows of COLUMNS in `path`, one a line; a value that was not measured is left empty."""

    def __init__(self, path: Path, last_step: int = 0):
        """Keeps the rows up to `last_step`: a resumed run writes the later ones again."""
        self.path = path
        kept = [row for row in read(path) if int(row["step"]) <= last_step]
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        write_text(path, text.getvalue())

    def write(self, **values) -> None:
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(values)


def read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


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
