"""Breaks one constant per kernel and expects the op's tests to turn red: python tests/mutate.py.

Works on a copy of the tree, built for this machine's best instruction set alone. Prints a table,
and exits with 1 where a broken kernel passed its tests. A text that is not found exactly once is an
error: the kernel was changed, and this file has to follow.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
COPIED = ("csrc", "fastlm", "kernels", "tests", "setup.py", "pyproject.toml", "README.md")
# Compiling takes longer than the mutants live, and opcheck and torch.compile see no arithmetic.
SELECTION = "not opcheck and not compiled and not build"


@dataclass(frozen=True)
class Mutation:
    source: str  # under csrc/cpu
    old: str
    new: str
    test: str  # tests/test_<test>.py
    what: str


MUTATIONS = (
    Mutation("layer_norm.cpp", "/ A(cols)) + eps", "/ A(cols)) + 1.1 * eps", "layer_norm", "eps"),
    Mutation("layer_norm.cpp", "(g - g_mean - h * gh_mean)",
             "(g - g_mean - h * gh_mean * A(1.001))",
             "layer_norm", "backward: the projection on h"),
    Mutation("layer_norm.cpp", "nullptr, rule, r,", "nullptr, rule, r + 1,",
             "add_layer_norm", "backward: the row of the mask"),
    Mutation("rms_norm.cpp", "(g - h * gh_mean)", "(g - h * gh_mean * A(1.001))", "rms_norm",
             "backward: the projection on h"),
    Mutation("elementwise.cpp", "kCubic = 0.044715", "kCubic = 0.0447", "gelu", "tanh form"),
    Mutation("elementwise.cpp", "A(-0.5 * kLog2e)", "A(-0.501 * kLog2e)", "gelu",
             "erf form: backward's density"),
    Mutation("philox.h", "round < 7", "round < 8", "dropout", "Philox: rounds"),
    Mutation("philox.h", "1.0 / (1.0 - p)", "1.0 / (1.0001 - p)", "dropout",
             "the scale"),
    Mutation("cross_entropy.cpp", "A(p.options.label_smoothing) / A(p.classes);",
             "A(p.options.label_smoothing) / A(p.classes + 1);", "cross_entropy",
             "forward: label smoothing"),
    Mutation("cross_entropy.cpp", "A(2 * o.lse_square_scale)", "A(1 * o.lse_square_scale)",
             "cross_entropy", "backward: the square of lse"),
    Mutation("cross_entropy.cpp", "constexpr A kSlack = 40;", "constexpr A kSlack = 4000;",
             "cross_entropy", "forward: overflow of a later chunk"),
    Mutation("cross_entropy_rows.h", "A(::exp(double(sums.base - relative_to)))", "A(1.001)",
             "linear_cross_entropy_tiles", "forward: the running sum"),
    Mutation("linear_cross_entropy.cpp", "of_group * exp2_bounded(distance * A(kLog2e))",
             "of_group * exp2_bounded(distance)",
             "linear_cross_entropy", "forward: the sums of several threads"),
    Mutation("kept_logits.h", "kInfinite = 1u << 23;", "kInfinite = 1u << 24;",
             "linear_cross_entropy", "a kept logit of -inf"),
    Mutation("kept_logits.h", "step = bit_cast<float>((power - 20) << 23);",
             "step = bit_cast<float>((power - 21) << 23);",
             "linear_cross_entropy", "small logits that are kept in bfloat16"),
    Mutation("linear_cross_entropy.cpp",
             "slab ? multiply<T, false, true, A> : multiply<T, false, false, A>",
             "multiply<T, false, false, A>", "linear_cross_entropy_tiles",
             "sums over slabs of the rows"),
    Mutation("dispatch.cpp", "target[row] >= classes", "target[row] > classes",
             "cross_entropy_front", "the check of targets, by one"),
    Mutation("attention_block.h", "queries + s.window_right)", "queries + s.window_right + 1)",
             "attention", "the mask, by one key"),
    Mutation("attention_forward.cpp", "load(b.total + q) * shrink + sum", "load(b.total + q) + sum",
             "attention", "forward: the running sum"),
    Mutation("attention_backward.cpp", "(load(b.ds + at) - delta)",
             "(load(b.ds + at) - delta * A(1.001))", "attention", "backward: delta"),
    Mutation("attention_decode.cpp", "total > 0 ? A(1) / total", "total > 0 ? A(1.00001) / total",
             "attention_with_kvcache", "decoding: the sum"),
    Mutation("attention_decode.cpp", "p.seqlens[batch] + from;", "p.seqlens[batch] + from + 1;",
             "attention_with_kvcache", "append, by one place"),
    Mutation("memory.cpp", "stats_.held + int64_t(size) <= stats_.limit",
             "stats_.held + int64_t(size) <= 2 * stats_.limit", "memory", "the pool's limit"),
)  # fmt: skip


def replace_once(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    if text.count(old) != 1:
        raise SystemExit(f"mutate: {path.name} holds {old!r} {text.count(old)} times, not once")
    path.write_text(text.replace(old, new))


def copy_tree(tree: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "emulator")
            shutil.copytree(source, tree / name, ignore=ignored)
        elif source.exists():
            shutil.copy(source, tree / name)


def keep_one_isa(tree: Path) -> str:
    from fastlm import _cpu

    best = _cpu.available_isas()[0]
    dispatch = tree / "csrc" / "cpu" / "dispatch.cpp"
    line = next(s for s in dispatch.read_text().splitlines() if s.endswith("X(avx2) X(baseline)"))
    replace_once(dispatch, line, f"#define FASTLM_FOR_EACH_ISA(X) X({best})")
    replace_once(
        tree / "setup.py", "return ISAS if x86", f'return {{"{best}": ISAS["{best}"]}} if x86'
    )
    return best


def run(tree: Path, *command: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ, "PYTHONPATH": str(tree), "FASTLM_CUDA": "0", "OMP_WAIT_POLICY": "passive",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True
    )


def build(tree: Path) -> None:
    found = run(tree, "setup.py", "build_ext", "--inplace")
    if found.returncode:
        raise SystemExit(f"mutate: the copy does not build\n{found.stdout}{found.stderr}")


def failure(tree: Path, test: str) -> str | None:
    """The first test that fails, or None where all pass."""
    options = ("-x", "--tb=no", "-rfE", "-k", SELECTION)
    found = run(tree, "-m", "pytest", f"tests/test_{test}.py", *options)
    if found.returncode == 0:
        return None
    named = [s for s in found.stdout.splitlines() if s.startswith(("FAILED", "ERROR"))]
    return named[0].split("::", 1)[-1].split(" - ")[0] if named else found.stdout[-300:]


def check_untouched(tree: Path) -> None:
    where = run(tree, "-c", "import fastlm._cpu as m; print(m.__file__, m.available_isas())").stdout
    if not where.startswith(str(tree)):
        raise SystemExit(f"mutate: the copy's tests would test {where}")
    for test in dict.fromkeys(mutation.test for mutation in MUTATIONS):
        red = failure(tree, test)
        if red:
            raise SystemExit(f"mutate: test_{test}.py is red before anything is broken: {red}")


def survives(tree: Path, mutation: Mutation) -> bool:
    start = time.monotonic()
    path = tree / "csrc" / "cpu" / mutation.source
    text = path.read_text()
    replace_once(path, mutation.old, mutation.new)
    build(tree)
    red = failure(tree, mutation.test)
    path.write_text(text)
    seconds = time.monotonic() - start
    name = f"{mutation.source}: {mutation.what}"
    print(f"{name:55} {red or 'SURVIVED'} ({seconds:.0f} s)", flush=True)
    return red is None


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve()
        copy_tree(tree)
        print(f"building for {keep_one_isa(tree)}", flush=True)
        build(tree)
        check_untouched(tree)
        survivors = sum(survives(tree, mutation) for mutation in MUTATIONS)
    print(f"{len(MUTATIONS) - survivors} of {len(MUTATIONS)} broken kernels turned a test red")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
