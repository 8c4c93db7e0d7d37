"""A differential fuzzer: random calls of every public op, beside the same in torch's float64.

    python tests/fuzz.py --cases 100000                   every instruction set of this machine
    python tests/fuzz.py --minutes 60 --backend cpp-avx2 --op attention
    python tests/fuzz.py --replay "Call(op='gelu', ...)" --backend cpp-avx2

A call that breaks the rule is made smaller until nothing can be taken away, and printed as
--replay takes it. The rule is that of accuracy.py, with what a tiny shape needs added: where torch
is exact by luck, an error of four times what rounding does to this very computation (rounding.py).
"""

import argparse
import contextlib
import sys
import time
from dataclasses import dataclass, field

import conftest
import torch
from cases import transposed
from fuzz_calls import Call, Input
from fuzz_draws import calls
from fuzz_torch import TORCH
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from rounding import RandomRounding
from torch import Tensor

import fastlm
from fastlm.backend import KERNELS

_SAMPLES = 8  # of rounding at random, at most
_BATCH = 1000  # calls that one run of hypothesis draws


class Violation(AssertionError):
    """A call whose result breaks the rule."""


# ---- the rule ----


def check(call: Call) -> bool:
    """Whether the backend in force takes this call. Raises Violation if its result is wrong."""
    try:
        ours = _results(call, call.ours)
    except fastlm.BackendUnavailable:
        return False
    theirs = _results(call, call.theirs)
    truth = _results(call, call.theirs, torch.float64)
    if list(ours) != list(truth):
        raise Violation(f"{list(ours)} are given, expected {list(truth)}")
    floors = dict.fromkeys(truth, 0.0)
    for sample in range(_SAMPLES + 1):
        problems = {n: _problem(ours[n], theirs[n], truth[n], floors[n]) for n in truth}
        found = [(name, problem) for name, problem in problems.items() if problem]
        if not found:
            return True
        if sample == _SAMPLES or not all(problem.may_be_rounding for _, problem in found):
            break
        _add_rounding(floors, call, sample)
    raise Violation("; ".join(f"{name}: {problem}" for name, problem in found))


@dataclass
class _Problem:
    words: str
    may_be_rounding: bool = False

    def __str__(self) -> str:
        return self.words


def _problem(ours: Tensor, theirs: Tensor, truth: Tensor, floor: float) -> _Problem | None:
    """What is wrong with `ours`, where rounding alone gives an error of `floor`."""
    if ours.shape != truth.shape:
        return _Problem(f"shape {tuple(ours.shape)}, expected {tuple(truth.shape)}")
    limits = torch.finfo(ours.dtype)
    wide, same = ours.double(), theirs.double()
    overflows = truth.abs() > limits.max
    special = ~truth.isfinite()
    equals = (wide == truth) | (wide.isnan() & truth.isnan())
    equals |= (wide == same) | (wide.isnan() & same.isnan())
    if (special & ~equals).any():
        place = (special & ~equals).nonzero()[0].tolist()
        return _Problem(
            f"{wide[tuple(place)]} at {place}, expected {truth[tuple(place)]} "
            f"or torch's {same[tuple(place)]}"
        )
    compared = truth.isfinite() & same.isfinite() & ~overflows
    if not compared.any():
        return None
    scale = truth[compared].abs().max().item()
    torchs = (same - truth)[compared].abs().max().item()
    allowed = 2 * torchs + 4 * limits.eps * scale + 4 * floor + limits.tiny
    error = (wide - truth)[compared].abs()
    if error.isfinite().all() and error.max() <= allowed:
        return None
    worst = error.nan_to_num(nan=torch.inf).max().item()
    return _Problem(
        f"error {worst:.2e}, allowed {allowed:.2e} (torch {torchs:.2e}, scale {scale:.2e}, "
        f"rounding {floor:.2e})",
        may_be_rounding=True,
    )


def _add_rounding(floors: dict[str, float], call: Call, sample: int) -> None:
    """Raises `floors`, for each result by how much the call's rounding may change it.

    Kernels make probabilities again in backward, from lse: with as many roundings of the scores
    again. That is in fastlm's reference and not in torch's composition. Its results are compared
    with its own without rounding: what is wrong with them is no rounding.
    """
    stored = torch.finfo(getattr(torch, call.dtype)).eps / 2
    # Half of the last place cannot be added in float64.
    computed = torch.finfo(torch.float32).eps / 2 if call.dtype != "float64" else 2 * stored
    # There, the truth has the same error.
    errors = 2 if call.dtype == "float64" else 1
    for function in (call.theirs, call.ours):
        rounding = RandomRounding(computed, stored, sample)
        with fastlm.use("torch"):
            exact = _results(call, function, torch.float64)
            found = _results(call, function, torch.float64, rounding)
        for name, t in found.items():
            away = (t - exact[name]).abs()
            away = away[away.isfinite()]
            if away.numel():
                floors[name] = max(floors[name], errors * away.max().item())


# ---- a call's results ----


def _results(call: Call, function, dtype=None, rounding=None) -> dict[str, Tensor]:
    """Outputs and gradients, of inputs that are first widened to `dtype`."""
    leaves = {}
    for name, t in call.make().items():
        if dtype is not None and t.is_floating_point():
            t = t.to(dtype)
        leaves[name] = t.detach()
        if t.is_floating_point() and call.inputs[name].grad:
            leaves[name].requires_grad_()
    with rounding or contextlib.nullcontext():
        outputs = function(**leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = _gradients(call, outputs, leaves)
    return {f"output {i}": output.detach() for i, output in enumerate(outputs)} | gradients


def _gradients(call: Call, outputs: tuple[Tensor, ...], leaves: dict[str, Tensor]):
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    differentiable = [output for output in outputs if output.requires_grad]
    if not wanted or not differentiable:
        return {}
    upstream = [_upstream(call, output) for output in differentiable]
    found = torch.autograd.grad(
        differentiable, list(wanted.values()), upstream, materialize_grads=True
    )
    return {f"gradient of {name}": grad for name, grad in zip(wanted, found, strict=True)}


def _upstream(call: Call, output: Tensor) -> Tensor:
    if call.upstream == "ones":
        return output.new_ones(()).expand(output.shape)
    generator = torch.Generator("cpu").manual_seed(call.seed)
    random = torch.randn(output.shape, dtype=torch.float64, generator=generator)
    random = random.to(getattr(torch, call.dtype)).to(output.dtype)
    return transposed(random) if call.upstream == "transposed" else random


# ---- runs ----


@dataclass
class Run:
    taken: int = 0
    refused: int = 0
    found: list[str] = field(default_factory=list)


def dtypes_of(backend: str) -> dict[str, tuple[str, ...]]:
    """{op: names of the dtypes} of a backend's kernels; torch has all."""
    found = {}
    for op in TORCH:
        kernels = "attention" if op == "scaled_dot_product_attention" else op
        for kernel in KERNELS.get(kernels, ()):
            if kernel.name == backend.partition("-")[0]:
                dtypes = kernel.dtypes or (torch.float32, torch.bfloat16, torch.float64)
                found[op] = tuple(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return found


def run(dtypes: dict[str, tuple[str, ...]], cases: int, first_seed: int, most: int) -> Run:
    """So many calls in the backend in force. The first that breaks the rule ends it."""
    result = Run()

    @seed(first_seed)
    @settings(
        max_examples=cases, database=None, deadline=None, report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink),
        print_blob=False, verbosity=Verbosity.quiet,
    )  # fmt: skip
    @given(calls(dtypes, most))
    def one(call: Call) -> None:
        try:
            taken = check(call)
        except Exception as error:
            error.add_note(f"{call!r}")
            result.found = [f"{type(error).__name__}: {error}\n    {call!r}"]
            raise
        result.taken += taken
        result.refused += not taken

    with contextlib.suppress(Exception):  # it is in result.found
        one()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--backend", choices=[*conftest.CPP, *conftest.GPU, "torch"], action="append"
    )
    parser.add_argument("--op", choices=list(TORCH), action="append")
    parser.add_argument("--cases", type=int, help="of each backend; default 1000")
    parser.add_argument("--minutes", type=float, help="of each backend")
    parser.add_argument("--seed", type=int, default=None, help="default: from the clock")
    parser.add_argument("--most", type=int, default=20_000, help="elements of a tensor")
    parser.add_argument("--keep-going", action="store_true", help="after a find")
    parser.add_argument("--replay", metavar="CALL", help="a call as it was printed")
    arguments = parser.parse_args()
    failed = False
    for backend in arguments.backend or conftest.CPP:
        with conftest.backend_in_force(backend):
            if arguments.replay:
                call = eval(arguments.replay, {"Call": Call, "Input": Input})
                print("taken" if check(call) else "refused")
                continue
            failed |= _many(backend, arguments)
    return failed


def _many(backend: str, arguments) -> bool:
    """Whether a call broke the rule."""
    dtypes = dtypes_of(backend)
    if arguments.op:
        dtypes = {op: dtypes[op] for op in arguments.op if op in dtypes}
    cases = sys.maxsize if arguments.minutes else arguments.cases or 1000
    end = time.monotonic() + (arguments.minutes * 60 if arguments.minutes else 1e9)
    seed = int(time.time()) if arguments.seed is None else arguments.seed
    taken = refused = 0
    found = []
    while taken + refused < cases and time.monotonic() < end:
        try:
            result = run(dtypes, min(_BATCH, cases - taken - refused), seed, arguments.most)
        except KeyboardInterrupt:
            break
        taken, refused, seed = taken + result.taken, refused + result.refused, seed + 1
        found += result.found
        for words in result.found:
            print(f"{backend}: {words}", flush=True)
        if result.found and not arguments.keep_going:
            break
    print(f"{backend}: {taken} calls, {refused} more refused, {len(found)} break the rule; "
          f"the last seed is {seed - 1}", flush=True)  # fmt: skip
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
