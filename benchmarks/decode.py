"""`python -m benchmarks.decode`: tokens per second of generate beside transformers', in one run.

GPT-2 124M's shape with random weights, one row, 64 new tokens after 16, greedy, interleaved rounds;
the ratio is taken per round. The floor is the weights' bytes over the measured read bandwidth:
every one of them is read for every token.
"""

import argparse
import statistics
import time

import torch
from tabulate import tabulate

import fastlm

from .machine import environment, name_of, rate, seconds
from .report import RESULTS, heading, put_into_readme, write_json

PROMPT, NEW = 16, 64


def pair(dtype: torch.dtype):
    """(ours, transformers') with the same weights."""
    import transformers

    torch.manual_seed(0)
    ours = fastlm.GPT2LMHeadModel(fastlm.GPT2Config()).to(dtype).eval()
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).to(dtype).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def measure(dtype: torch.dtype, rounds: int) -> dict:
    """One row: medians of tokens per second, and of the ratio of each round."""
    ours, theirs = pair(dtype)
    ids = torch.randint(50257, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    calls = {
        "ours": lambda: ours.generate(ids, attention_mask=mask, **options),
        "transformers": lambda: theirs.generate(
            ids, attention_mask=mask, pad_token_id=0, **options
        ),
    }
    same = torch.equal(calls["ours"](), calls["transformers"]())
    times = [{name: seconds(call) for name, call in calls.items()} for _ in range(rounds)]
    read = sum(p.nbytes for p in ours.parameters()) - ours.transformer.wpe.weight.nbytes
    rates = {name: NEW / statistics.median(t[name] for t in times) for name in calls}
    ratios = sorted(t["transformers"] / t["ours"] for t in times)
    return {
        "dtype": name_of(dtype),
        **{f"{name} tokens/s": value for name, value in rates.items()},
        "ratio": statistics.median(ratios),
        "lowest ratio": ratios[0],
        "highest ratio": ratios[-1],
        "floor tokens/s": rate("read") * 1e9 / read,
        "same tokens": same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default 7)")
    parser.add_argument(
        "--save",
        action="store_true",
        help="write benchmarks/results/decode-<date>.json and the README's table",
    )
    options = parser.parse_args()
    rows = [measure(dtype, options.rounds) for dtype in (torch.float32, torch.bfloat16)]
    machine = heading(environment(), {"read": rate("read")})
    print(machine)
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    if options.save:
        content = {"environment": environment(), "results": rows}
        write_json(RESULTS / f"decode-{time.strftime('%Y-%m-%d')}.json", content)
        shown = tabulate(rows, headers="keys", floatfmt=".2f", tablefmt="github")
        what = "Greedy decoding of GPT-2 124M, 64 tokens after 16 (`python -m benchmarks.decode`)"
        put_into_readme("decode", f"{what}; {machine.splitlines()[0]}.\n\n{shown}")


if __name__ == "__main__":
    main()
