"""Bugs planted in the kernels' sources are found: the detectors and the accuracy tests do see what
goes wrong in practice. Each is one replaced line; what finds it is said beside it."""

import shutil
from typing import NamedTuple

import pytest
import torch

from fastlm import backend, emulated, emulator
from fastlm.backend import CUDA_SOURCES as CSRC

from . import resources

pytestmark = pytest.mark.skipif(resources.toolkit() is None, reason="nvcc is not on the PATH")
BF16 = torch.bfloat16


def layer_norm(module):
    """y, of rows that two warps share and that are no whole number of packs."""
    x, weight, bias = torch.randn(5, 769) + 3, torch.randn(769), torch.randn(769)
    y, mean, rstd = torch.empty(5, 769), torch.empty(5), torch.empty(5)
    module.layer_norm_forward(y, mean, rstd, x, weight, bias, 1e-5, 0)
    return y, torch.nn.functional.layer_norm(x, (769,), weight, bias)


def cross_entropy(module):
    logits, target = torch.randn(3, 1001).to(BF16), torch.tensor([1000, 0, 5])
    loss, lse, dlogits = torch.empty(3), torch.empty(3, dtype=torch.float64), logits.clone()
    module.cross_entropy_forward(loss, lse, dlogits, logits, target, None, -100, 0, 0, 0, 1.0, 0)
    return loss, torch.nn.functional.cross_entropy(logits.float(), target, reduction="none")


def attention(module):
    """o, of three tiles of keys, the last of them ragged."""
    q, k, v = (torch.randn(1, 150, 1, 64).to(BF16) for _ in range(3))
    o, lse = torch.empty_like(q), torch.empty(1, 1, 150, dtype=torch.float64)
    options = module.AttentionOptions(*[None] * 6, 0, 0, 0.125, 0.0, -1, 0, 0.0)
    module.attention_forward(o, lse, q, k, v, options, 0)
    heads_first = (t.float().transpose(1, 2) for t in (q, k, v))
    truth = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)
    return o.float(), truth.transpose(1, 2)


class Bug(NamedTuple):
    name: str
    source: str  # the file that is compiled anew
    file: str  # the file with the bug: that one, or a header of it
    right: str
    wrong: str
    call: object
    found: str  # in the error's message; or "numbers"
    options: dict = {}  # noqa: RUF012, of the emulator


RACES = {"races": True}
BUGS = (
    Bug("missing barrier", "layer_norm.cu", "reduce.cuh",
        "  __syncthreads();\n  for (int i = 0; i < kCount; ++i) v[i] = 0;", "",
        layer_norm, "data race", RACES),
    Bug("unmasked tail", "layer_norm.cu", "layer_norm.cu",
        "j < columns.count(i) ? z[i][j] - mean : 0.0f", "z[i][j] - mean", layer_norm, "numbers"),
    Bug("out-of-bounds read", "cross_entropy.cu", "cross_entropy.cu",
        "packs = (classes - head) / kPack<T>", "packs = (classes - head) / kPack<T> + 1",
        cross_entropy, "out of bounds"),
    Bug("tile edge off by one", "attention_forward.cu", "attention.cuh",
        "min(keys - 1, query + keys - queries + window_right)",
        "min(keys - 1, query + keys - queries + window_right + 1)", attention, "numbers"),
    Bug("wrong fragment index", "attention_forward.cu", "mma.cuh",
        "k * 2 + lane / 8 % 2", "k * 2 + lane / 16", attention, "numbers"),
    Bug("buffer refilled too early", "attention_forward.cu", "attention_forward.cu",
        "tiles.v(tile % 2));\n    __syncthreads();", "tiles.v(tile % 2));", attention,
        "data race", RACES),
    Bug("copy not waited for", "attention_forward.cu", "attention_forward.cu",
        "wait_copies<1>", "wait_copies<2>", attention, "numbers"),
)  # fmt: skip


@pytest.fixture
def build(tmp_path):
    """build(bug): fastlm._cuda with that line replaced; only one file is compiled anew."""

    def extension(bug):
        folder = tmp_path / "csrc" / "cuda"
        folder.mkdir(parents=True)
        for header in CSRC.glob("*.h"):
            shutil.copy(header, folder.parent)
        for header in CSRC.glob("cuda/*.cuh"):
            shutil.copy(header, folder)
        shutil.copy(CSRC / "cuda" / bug.source, folder)
        text = (folder / bug.file).read_text()
        assert text.count(bug.right) == 1, f"{bug.name}: the line that it replaces has changed"
        (folder / bug.file).write_text(text.replace(bug.right, bug.wrong))
        _only_for(folder / "launch.cuh", "f32" if bug.call is layer_norm else "bf16")
        sources = [file for file in emulated.cuda_sources() if file.name != bug.source]
        return emulated.cuda([*sources, folder / bug.source])

    return extension


def _only_for(header, dtype):
    """Leaves out the kernels of other dtypes, which nobody calls: a third of the compile time."""
    lines = header.read_text().splitlines(keepends=True)
    kept = [line for line in lines if "case DType::" not in line or f"DType::{dtype}:" in line]
    assert len(kept) == len(lines) - 2
    header.write_text("".join(kept))


@pytest.mark.parametrize("call", [layer_norm, cross_entropy, attention])
@pytest.mark.parametrize("options", [{}, RACES], ids=["plain", "races"])
def test_nothing_is_found_without_a_bug(call, options):
    with emulator.defaults(**options):
        assert is_right(*call(backend.load("emulated:cuda", "layer_norm")))


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_planted_bug_is_found(bug, build):
    module = build(bug)
    with emulator.defaults(**bug.options):
        if bug.found == "numbers":
            assert not is_right(*bug.call(module))
        else:
            with pytest.raises(emulator.KernelError, match=bug.found):
                bug.call(module)


def is_right(ours, truth):
    """Coarse on purpose: the tests of every op hold to the accuracy rule."""
    return bool((ours - truth).abs().max() <= 0.02)
