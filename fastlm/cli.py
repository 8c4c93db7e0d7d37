"""The command line: `fastlm train | generate | info | bench`; each command is in its own module."""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from .generation import command as generate
from .info import info as description
from .training import command as train


def main(argv: list[str] | None = None) -> int:
    """Runs one command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="fastlm",
        description="A GPT that trains and generates on fused kernels. Without a command: info.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    train.add_arguments(commands.add_parser("train", help="train a GPT on text files"))
    generate.add_arguments(commands.add_parser("generate", help="continue a prompt"))
    commands.add_parser(
        "info", help="versions, devices and which kernels run on them"
    ).set_defaults(run=info)
    bench_parser = commands.add_parser(
        "bench", help="measure the kernels beside torch's", add_help=False
    )
    bench_parser.set_defaults(run=bench)
    # What `bench` is followed by is for the benchmarks' own parser.
    args, rest = parser.parse_known_args(argv)
    command = getattr(args, "run", info)
    if rest and command is not bench:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    return reported(lambda: command(args))


def reported(command: Callable[[], int]) -> int:
    """The exit status of a command; what the user can mend is said in one line."""
    try:
        status = command()
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 130  # the shell's status for an interrupted command
    except (OSError, ValueError, IndexError, FloatingPointError) as error:
        print(f"fastlm: error: {error}", file=sys.stderr)
        return 1


def info(args: argparse.Namespace) -> int:
    print(description())
    return 0


def bench(args: argparse.Namespace) -> int:
    """Runs `python -m benchmarks` of the repository that this package was installed from."""
    repository = Path(__file__).resolve().parents[1]
    if not (repository / "benchmarks" / "__main__.py").is_file():
        raise FileNotFoundError(
            "bench: the benchmarks are in fastlm's repository, not in the "
            "installed package: run `make bench` in a clone of it"
        )
    return subprocess.call([sys.executable, "-m", "benchmarks", *args.rest], cwd=repository)
