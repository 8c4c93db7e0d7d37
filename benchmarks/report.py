"""Results as a table for the terminal, as Markdown between the markers of README.md, and as
JSON.
"""

import json
from dataclasses import asdict
from pathlib import Path

from .harness import Result

README = Path(__file__).parent.parent / "README.md"
RESULTS = Path(__file__).parent / "results"
ALWAYS = ("torch", "torch, pooled", "torch.compile")  # baselines with a column of their own
HEADERS = (
    "op",
    "shape",
    "dtype",
    "ours ms",
    "of floor",
    *ALWAYS,
    "others",
    "error (torch's)",
    "peak MB (torch's)",
)


def cells(r: Result) -> list[str]:
    """One row; a ratio short of its goal names the goal."""

    def ratio(name: str) -> str:
        if name not in r.ratios:
            return "-"
        goal = r.short_of().get(name)
        return f"{r.ratios[name]:.2f}x" + (f" (goal {goal:g})" if goal else "")

    return [
        f"{r.op} {r.phase}", r.shape, r.dtype,
        f"{r.ours_ms:.2f} ±{50 * r.spread:.0f}%", f"{100 * r.floor_ms / r.ours_ms:.0f}%",
        *(ratio(name) for name in ALWAYS),
        "; ".join(f"{name}: {ratio(name)}" for name in r.ratios if name not in ALWAYS),
        f"{r.error:.0e} ({r.torch_error:.0e})", f"{r.peak_mb:.0f} ({r.torch_peak_mb:.0f})",
    ]  # fmt: skip


def heading(environment: dict[str, str], rates: dict[str, float]) -> str:
    """Where and against what the rows were measured."""
    machine = (
        "{processor} ({isa}), {threads} threads, torch {torch}, fastlm {commit}, {date}".format(
            **environment
        )
    )
    measured = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    return f"{machine}\nmeasured in this run: {measured} (GB/s; gemm: GFLOP/s)"


def table(results: list[Result], style: str = "simple") -> str:
    from tabulate import tabulate  # not where only JSON is written, as on a machine with a GPU

    return tabulate([cells(r) for r in results], HEADERS, tablefmt=style)


def document(results: list[Result], environment: dict[str, str], rates: dict[str, float]) -> dict:
    return {"environment": environment, "rates": rates, "results": [asdict(r) for r in results]}


def write_json(path: Path, content: dict) -> None:
    """Written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def update_readme() -> None:
    """Put the newest committed results between the markers of the README."""
    content = json.loads(sorted(RESULTS.glob("cpu-*.json"))[-1].read_text())
    results = [Result(**row) for row in content["results"]]
    machine = heading(content["environment"], content["rates"]).replace("\n", "; ")
    put_into_readme("benchmarks", f"{machine}.\n\n{table(results, 'github')}")


def put_into_readme(section: str, text: str) -> None:
    """Replaces what stands between the README's two markers of that name."""
    begin, end = f"<!-- {section}:begin -->", f"<!-- {section}:end -->"
    content = README.read_text()
    before, after = content.split(begin)[0], content.split(end)[1]
    README.write_text(f"{before}{begin}\n{text}\n{end}{after}")
