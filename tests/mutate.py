"""Breaks one constant per kernel and expects the op's tests to turn red: python tests/mutate.py.

Works on a copy of the tree, built for this machine's best instruction set alone. Prints a table,
and exits with 1 where a broken kernel passed its tests. A text that is not found exactly once is an
error: the kernel was changed, and this file has to follow.
"""

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tree_copy import TreeCopy, replace_once

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
    Mutation("layer_norm.cpp", "0.0 : variance) + eps", "0.0 : variance) + 1.1 * eps",
             "layer_norm", "eps"),
    Mutation("layer_norm.cpp", "(g - g_mean - h * gh_mean)",
             "(g - g_mean - h * gh_mean * A(1.001))",
             "layer_norm", "backward: the projection on h"),
    Mutation("layer_norm.cpp", "(load(z + c, span) - rounded_mean) - mean_rest;",
             "load(z + c, span) - rounded_mean;", "special_values",
             "forward: what the mean was rounded by"),
    Mutation("layer_norm.cpp", "rounded(load(dy[r] + c, span) * load(weight + c, span))",
             "load(dy[r] + c, span) * load(weight + c, span)", "special_values",
             "backward: a single column"),
    Mutation("layer_norm.cpp", "nullptr, rule, r,", "nullptr, rule, r + 1,",
             "add_layer_norm", "backward: the row of the mask"),
    Mutation("rms_norm.cpp", "(g - h * gh_mean)", "(g - h * gh_mean * A(1.001))", "rms_norm",
             "backward: the projection on h"),
    Mutation("elementwise.cpp", "kCubic = 0.044715", "kCubic = 0.0447", "gelu", "tanh form"),
    Mutation("elementwise.cpp", "A(-0.5 * kLog2e)", "A(-0.501 * kLog2e)", "gelu",
             "erf form: backward's density"),
    Mutation("elementwise.cpp", "power > A(127) ? Vec<A>{} : reciprocal(A(1) + e)",
             "reciprocal(A(1) + e)", "special_values", "tanh form: far below zero"),
    Mutation("elementwise.cpp", "-u)) + (u - u);", "-u));", "special_values",
             "tanh form: backward of infinity"),
    Mutation("philox.h", "round < 7", "round < 8", "dropout", "Philox: rounds"),
    Mutation("philox.h", "float(1.0 / (1.0 - p))", "float(1.0 / (1.0001 - p))", "dropout",
             "the scale"),
    Mutation("cross_entropy.cpp", "A(p.options.label_smoothing) / A(p.classes);",
             "A(p.options.label_smoothing) / A(p.classes + 1);", "cross_entropy",
             "forward: label smoothing"),
    Mutation("cross_entropy.cpp", "A(2 * o.lse_square_scale)", "A(1 * o.lse_square_scale)",
             "cross_entropy", "backward: the square of lse"),
    Mutation("cross_entropy.cpp", "constexpr A kSlack = 40;", "constexpr A kSlack = 4000;",
             "cross_entropy", "forward: overflow of a later chunk"),
    Mutation("cross_entropy.cpp", "bases[start / kChunk] = base;",
             "bases[start / kChunk] = relative_to;", "special_values",
             "forward: a chunk of -inf alone"),
    Mutation("cross_entropy_rows.h", "A(::exp(double(sums.base - relative_to)))", "A(1.001)",
             "linear_cross_entropy_tiles", "forward: the running sum"),
    Mutation("linear_cross_entropy.cpp", "of_group * exp2_bounded(distance * A(kLog2e))",
             "of_group * exp2_bounded(distance)",
             "linear_cross_entropy", "forward: the sums of several threads"),
    Mutation("kept_exponentials.h", "const double shift = ::ceil(lse) + 1 - base;",
             "const double shift = ::ceil(lse) - base;", "linear_cross_entropy",
             "a base above lse"),
    Mutation("kept_exponentials.h", "uint16_t(low[second] | *odd << 8)", "low[second]",
             "linear_cross_entropy_tiles", "the middle one of an odd number of classes"),
    Mutation("linear_cross_entropy.cpp",
             "slab ? multiply<T, false, true, A> : multiply<T, false, false, A>",
             "multiply<T, false, false, A>", "linear_cross_entropy_tiles",
             "sums over slabs of the rows"),
    Mutation("dispatch.cpp", "target[row] >= classes", "target[row] > classes",
             "cross_entropy_front", "the check of targets, by one"),
    Mutation("attention_block.h", "queries + s.window_right)", "queries + s.window_right + 1)",
             "attention", "the mask, by one key"),
    Mutation("attention_block.h", "max(ahead, -ahead) * (slope", "ahead * (slope",
             "attention", "ALiBi behind and ahead"),
    Mutation("attention_block.h", "seq.batch * bias.mask_batch_stride + head",
             "head", "attention", "the mask of each sequence"),
    Mutation("attention_forward.cpp", "b.headroom = 32;", "b.headroom = 0;", "special_values",
             "forward: values near the largest float"),
    Mutation("attention_forward.cpp", "load(b.total + q) * shrink + sum", "load(b.total + q) + sum",
             "attention", "forward: the running sum"),
    Mutation("attention_backward.cpp", "(load(b.ds + at) - delta)",
             "(load(b.ds + at) - delta * A(1.001))", "attention", "backward: delta"),
    Mutation("attention_backward.cpp", "lse2 - double(A(lse2))", "0.0", "attention",
             "backward: large scores"),
    Mutation("attention_backward.cpp", "sum<A>(dot) - A(dlse)", "sum<A>(dot) + A(dlse)",
             "attention", "backward: the gradient of lse"),
    Mutation("attention_decode.cpp", "query * bias.mask_query_stride + key", "key",
             "attention_with_kvcache", "decoding: the mask of each query"),
    Mutation("attention_decode.cpp", "total > 0 ? A(1) / total", "total > 0 ? A(1.00001) / total",
             "attention_with_kvcache", "decoding: the sum"),
    Mutation("attention_decode.cpp", "p.seqlens[batch] + from;", "p.seqlens[batch] + from + 1;",
             "attention_with_kvcache", "append, by one place"),
    Mutation("memory.cpp", "stats_.held + int64_t(size) <= stats_.limit",
             "stats_.held + int64_t(size) <= 2 * stats_.limit", "memory", "the pool's limit"),
)  # fmt: skip


def failure(tree: TreeCopy, test: str) -> str | None:
    """The first test that fails, or None where all pass."""
    options = ("-x", "--tb=no", "-rfE", "-k", SELECTION)
    found = tree.run("-m", "pytest", f"tests/test_{test}.py", *options)
    if found.returncode == 0:
        return None
    named = [s for s in found.stdout.splitlines() if s.startswith(("FAILED", "ERROR"))]
    return named[0].split("::", 1)[-1].split(" - ")[0] if named else found.stdout[-300:]


def check_untouched(tree: TreeCopy) -> None:
    tree.check_it_is_imported()
    for test in dict.fromkeys(mutation.test for mutation in MUTATIONS):
        red = failure(tree, test)
        if red:
            raise SystemExit(f"mutate: test_{test}.py is red before anything is broken: {red}")


def survives(tree: TreeCopy, mutation: Mutation) -> bool:
    start = time.monotonic()
    path = tree.folder / "csrc" / "cpu" / mutation.source
    text = path.read_text()
    replace_once(path, mutation.old, mutation.new)
    tree.build()
    red = failure(tree, mutation.test)
    path.write_text(text)
    seconds = time.monotonic() - start
    name = f"{mutation.source}: {mutation.what}"
    print(f"{name:55} {red or 'SURVIVED'} ({seconds:.0f} s)", flush=True)
    return red is None


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        tree = TreeCopy(Path(folder))
        print(f"building for {tree.isa}", flush=True)
        tree.build()
        check_untouched(tree)
        survivors = sum(survives(tree, mutation) for mutation in MUTATIONS)
    print(f"{len(MUTATIONS) - survivors} of {len(MUTATIONS)} broken kernels turned a test red")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
