"""`python -m benchmarks`: every op beside its baselines, its error and its floor."""

import argparse
import time

import torch

from .harness import run
from .machine import denominators, environment
from .report import RESULTS, document, heading, table, update_readme, write_json
from .rows import ROWS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--op", nargs="*", default=[], help="only ops whose name contains one of these"
    )
    parser.add_argument(
        "--dtype", nargs="*", choices=DTYPES, default=list(DTYPES), help="default: all"
    )
    parser.add_argument(
        "--rounds", type=int, default=15, help="interleaved rounds per row (default 15)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="float32, three rounds, without torch.compile"
    )
    parser.add_argument(
        "--save",
        action="store_true",
        help="write benchmarks/results/cpu-<date>.json and the README's table",
    )
    return parser.parse_args()


def main() -> None:
    options = arguments()
    dtypes = ["float32"] if options.quick else options.dtype
    rounds = 3 if options.quick else options.rounds
    rates = denominators(tuple(DTYPES[d] for d in dtypes))
    results, start = [], time.perf_counter()
    for bench in ROWS:
        if options.op and not any(name in bench.op for name in options.op):
            continue
        if options.quick:
            bench.baselines.pop("torch.compile", None)
        for dtype in dtypes:
            print(
                f"  {time.perf_counter() - start:4.0f} s  {bench.op} {bench.phase} {dtype}",
                end="\r",
                flush=True,
            )
            results.append(run(bench, DTYPES[dtype], rates, rounds))
    print(heading(environment(), rates))
    print(table(results))
    missed = [r for r in results if r.dtype == "float32" and r.short_of()]
    for row in missed:
        print(f"short of its goal: {row.op} {row.phase}: {row.short_of()}")
    if options.save:
        write_json(
            RESULTS / f"cpu-{time.strftime('%Y-%m-%d')}.json",
            document(results, environment(), rates),
        )
        update_readme()


if __name__ == "__main__":
    main()
