"""Prints what the emulator proves: conformance, broken rules, planted faults, speeds.

    python -m tests.emulator.matrix [conformance] [rules] [faults] [speed]

Without a name, all of them. The status is 1 if anything is not as it should be.
"""

import sys
import tempfile
import time
from unittest import mock

import torch

from fastlm import emulator
from fastlm.emulator.build import cache_folder

from .conftest import KERNELS
from .fault_cases import FAULTS
from .mutations import MUTATIONS, notices
from .test_fused_kernels import attention_inputs
from .triton_cases import ARCHES, CASES, MODES, attention_backward, kernel, run

# Milliseconds on one core; a first use is the translation and compilation of one kernel.
LIMITS = {"layer_norm 64 x 768": 6, "cross_entropy 32 x 50257, forward and backward": 25,
          "attention forward, 2 heads x 128 x 64": 8,
          "attention backward, 2 heads x 128 x 64": 20, "first use of a kernel": 5000}  # fmt: skip
DETECTORS = {
    "order": {},
    "reverse": {"schedule": "reverse"},
    "random": {"schedule": "random", "seed": 1},
    "races": {"races": True},
    "unwritten": {"uninitialized": True},
}


def load_cuda(name, arch=80, **options):
    return emulator.load(KERNELS / f"{name}.cu", arch=arch, **options)


def conformance():
    """Triton's kernels: error in units of what rounding explains; right is 1 or less."""
    print(f"{'Triton kernel':28s}" + "".join(f"{mode:>14s}" for mode in MODES))
    good = True
    for case in CASES:
        for arch in ARCHES:
            errors = [run(case, arch, **options) for options in MODES.values()]
            good &= max(errors) <= 1
            print(f"{case.__name__} sm_{arch}".ljust(28) + "".join(f"{e:14.2f}" for e in errors))
    return good


def rules():
    """Each layout rule broken on purpose, and how a kernel shows it."""
    good = True
    for mutation in MUTATIONS:
        # A stand-in for pytest's monkeypatch: notices() only sets one attribute.
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch("fastlm.emulator.build.RUNTIME", emulator.build.RUNTIME),
        ):
            patch = mock.Mock(setattr=setattr)
            shown = notices(mutation, folder, patch)
        good &= shown is not None
        print(f"{mutation.name:58s} {'not noticed' if shown is None else shown[:70]}")
    return good


def _verdict(fault, options):
    try:
        fault.launch(load_cuda, **{**fault.options, **options})
    except emulator.KernelError as error:
        for word in ("race", "livelock", "deadlock", "bounds", "unwritten", "overflow"):
            if word in error.reason:
                return word
        return ("nobody has" in error.reason and "unwritten") or "found"
    return "-"


def faults():
    """Planted faults by detector; '-' is silence, which a correct kernel must give everywhere."""
    print(f"{'fault':46s}" + "".join(f"{name:>11s}" for name in DETECTORS))
    good = True
    for fault in FAULTS:
        own = {k: v for k, v in fault.options.items() if k in ("spin_limit", "late_wgmma")}
        case = type(fault)(fault.name, fault.launch, fault.found, own)
        verdicts = [_verdict(case, options) for options in DETECTORS.values()]
        good &= any(v != "-" for v in verdicts) == bool(fault.found)
        print(f"{fault.name:46s}" + "".join(f"{v:>11s}" for v in verdicts))
    return good


def _milliseconds(launch, repeats=9):
    """The least CPU time of several runs after a first one that compiles.

    CPU time, because the limits are for one core that nobody else uses.
    """
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        launch()
        times.append(1e3 * (time.process_time() - start))
    return min(times[1:])


def _speeds():
    x, weight, bias, y = (
        torch.randn(64, 768),
        torch.randn(768),
        torch.randn(768),
        torch.empty(64, 768),
    )
    layer_norm = load_cuda("layer_norm")["layer_norm_forward"][64, 128]
    yield lambda: layer_norm(x, weight, bias, y, 768, 1e-5)
    logits = torch.randn(32, 50257).bfloat16()
    target, loss = torch.randint(50257, (32,), dtype=torch.int32), torch.empty(32)
    cross_entropy = load_cuda("cross_entropy")["cross_entropy"][32, 256]
    yield lambda: cross_entropy(logits, target, loss, 50257, 1.0)
    q, k, v, o = attention_inputs(2, 128)
    forward = load_cuda("attention")["attention_forward"][(2, 2), 128, 5 * 64 * 64 * 2]
    yield lambda: forward(q, k, v, o, 128, 0.125)
    rows = torch.zeros(2, 128)
    sums = [torch.zeros(2, 128, 64), torch.empty_like(q), torch.empty_like(q)]
    backward = kernel(f"{attention_backward.__name__}_sm80")[(2, 2), None]
    yield lambda: backward(q, k, v, o, rows, rows, *sums, 128, 0.125)


def _first_use():
    """Milliseconds of the first launch of attention, with the runtime built but no kernel."""
    q, k, v, o = attention_inputs(1, 64)
    for path in cache_folder().glob("kernels-*"):
        path.unlink()
    for path in cache_folder().glob("library-*"):
        path.unlink()
    attention = load_cuda("attention")["attention_forward"]
    start = time.perf_counter()
    attention[1, 128, 5 * 64 * 64 * 2](q, k, v, o, 64, 0.125)
    return 1e3 * (time.perf_counter() - start)


def speed():
    """Run times on one core beside their limits."""
    times = [_milliseconds(launch) for launch in _speeds()]
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict("os.environ", XDG_CACHE_HOME=folder),
    ):
        load_cuda("layer_norm")["layer_norm_forward"][1, 128](*[torch.zeros(4)] * 4, 4, 1e-5)
        times.append(_first_use())
    good = True
    for (what, limit), measured in zip(LIMITS.items(), times, strict=True):
        good &= measured <= limit
        print(f"{what:52s} {measured:8.1f} ms, limit {limit}")
    return good


PARTS = {"conformance": conformance, "rules": rules, "faults": faults, "speed": speed}


def main(names):
    good = True
    for name in names or PARTS:
        print(f"\n== {name}: {PARTS[name].__doc__}")
        good &= PARTS[name]()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
