"""`fastlm generate`."""

import math
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch

from ..devices import find_device
from ..models import GPT2LMHeadModel
from ..text import read_text
from ..tokenizer import GPT2Tokenizer
from ..training.checkpoint import newest
from .safety import WordFilter, default_words
from .streamers import TextStreamer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="FOLDER",
        help="of from_pretrained, a name on the hub, or the --out-dir of a training run",
    )
    parser.add_argument(
        "--prompt",
        default="",
        metavar="TEXT",
        help="what to continue; FILE:PATH reads it from a file; by default the start of a text",
    )
    parser.add_argument("--max-new-tokens", type=int, default=100, help="(%(default)s)")
    parser.add_argument(
        "--context",
        choices=("error", "slide"),
        default="error",
        help="past the model's n_positions: an error, or forget the oldest tokens (%(default)s)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(%(default)s)")
    parser.add_argument("--device", default="cpu", help="(%(default)s)")
    _add_choices(parser)
    parser.set_defaults(run=run)


def _add_choices(parser: ArgumentParser) -> None:
    """How tokens are chosen."""
    parser.add_argument("--num-samples", type=int, default=1, help="continuations (%(default)s)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="below 1 sharpens, above 1 flattens; 0 is greedy (%(default)s)",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        help="draw from so many likeliest tokens; 0 for all (50)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        help="draw from the likeliest tokens that hold this probability (1.0)",
    )
    parser.add_argument(
        "--safe",
        action="store_true",
        help="keep the words of better-profanity's list out (pip install fastlm[safety])",
    )
    parser.add_argument(
        "--block-words", metavar="FILE", help="keep the words of a file out, one a line"
    )
    parser.add_argument("--seed", type=int, help="repeatable draws")


def run(args: Namespace) -> int:
    """Writes the continuations to the terminal, token by token."""
    _check(args)
    device = find_device(args.device, "generate")
    folder = newest(args.model) if Path(args.model).is_dir() else args.model
    tokenizer = GPT2Tokenizer.from_pretrained(folder)
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=DTYPES[args.dtype], device=device)
    ids = tokenizer.encode(_prompt(args.prompt)) or [tokenizer.bos_token_id]
    input_ids = torch.tensor([ids], device=device)
    sampling = {"do_sample": args.temperature > 0}
    if args.temperature > 0:
        top_k = 50 if args.top_k is None else args.top_k
        top_p = 1.0 if args.top_p is None else args.top_p
        sampling |= {"temperature": args.temperature, "top_k": top_k, "top_p": top_p}
    word_filter = _word_filter(args, tokenizer)
    for number in range(args.num_samples):
        if args.num_samples > 1:
            print(f"--- {number + 1}")
        seed = None if args.seed is None else args.seed + number
        model.generate(
            input_ids,
            max_new_tokens=args.max_new_tokens,
            context=args.context,
            seed=seed,
            word_filter=word_filter,
            **sampling,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        )
    if word_filter is not None:
        print(word_filter, file=sys.stderr)
    return 0


def _check(args: Namespace) -> None:
    """Raises ValueError for a number out of range; warns of a flag that has no effect."""
    largest_seed = 2**64 - args.num_samples
    # Below the least temperature scores overflow; it is greedy long before.
    heat = args.temperature
    for name, holds, expected in (
        ("num_samples", args.num_samples >= 1, ">= 1"),
        ("max_new_tokens", args.max_new_tokens >= 1, ">= 1"),
        ("temperature", heat == 0 or 1e-6 <= heat < math.inf, "0 or >= 1e-6, finite"),
        ("top_k", args.top_k is None or args.top_k >= 0, ">= 0"),
        ("top_p", args.top_p is None or 0 < args.top_p <= 1, "0 < top_p <= 1"),
        ("seed", args.seed is None or 0 <= args.seed <= largest_seed, f"0 to {largest_seed}"),
    ):
        if not holds:
            raise ValueError(f"generate: {name}: expected {expected}, got {getattr(args, name)}")
    for name in ("top_k", "top_p", "seed"):
        if args.temperature == 0 and getattr(args, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            print(
                f"fastlm: warning: {flag} has no effect with --temperature 0, which is greedy",
                file=sys.stderr,
            )


def _word_filter(args: Namespace, tokenizer: GPT2Tokenizer) -> WordFilter | None:
    try:
        words = default_words() if args.safe else []
    except ImportError as error:
        raise ValueError(f"--safe: {error}") from error
    if args.block_words is not None:
        listed = read_text(Path(args.block_words)).splitlines()
        if not any(line.strip() for line in listed):
            raise ValueError(f"generate: block_words: {args.block_words}: expected words, got none")
        words += listed
    return WordFilter(tokenizer, words) if words else None


def _prompt(text: str) -> str:
    if not text.startswith("FILE:"):
        return text
    return read_text(Path(text.removeprefix("FILE:")))
