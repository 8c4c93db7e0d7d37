"""Block sizes found by measuring: how they are searched for, kept and put to use, without a GPU."""

import json
from dataclasses import replace

import pytest
import torch
from fastlm.kernels import attention, gelu, tuning

from benchmarks import gpu_rows, tune

BENCH = gpu_rows.elementwise("gelu", "forward", 3, 40)
KEY, DEFAULTS = "gelu forward dtype=bfloat16", {"BLOCK": 1024, "num_warps": 4}
BEST = {"BLOCK": 512, "num_warps": 2}


@pytest.fixture(autouse=True)
def defaults_afterwards():
    yield
    tuning.use(None)


@pytest.fixture
def h100(monkeypatch):
    place = {"device": "NVIDIA H100", "triton": "3.9.0"}
    monkeypatch.setattr(tuning, "here", lambda: place)
    return place


def written(tmp_path, **changes):
    path = tmp_path / "h100.json"
    path.write_text(json.dumps({**tuning.here(), "blocks": {KEY: BEST}, **changes}))
    return path


def sizes_in_force():
    return gelu.blocks_of(torch.empty(1, dtype=torch.bfloat16))


def time_of(call):
    """Of the sizes in force instead of the call: the nearer to BEST, the less."""
    sizes = sizes_in_force()
    return 1 + sum(abs(sizes[name] - BEST[name]) / BEST[name] for name in BEST)


def test_the_fastest_is_found_in_the_emulator(monkeypatch):
    """Real kernels, compiled for every candidate, which are few; what is invented is their time."""
    every = tune.neighbours
    monkeypatch.setattr(tune, "neighbours", lambda sizes: [
        s for s in every(sizes) if s["BLOCK"] in (512, 1024) and s["num_warps"] in (2, 4)
    ])  # fmt: skip
    row, found, said = tune.Row(BENCH, torch.bfloat16, "emulated:triton", "cpu"), {}, []
    assert row.defaults == {KEY: DEFAULTS}
    tune.tune(row, found, time_of, 1, said.append)
    assert found == {KEY: BEST}
    assert sizes_in_force() == DEFAULTS


def toy(x, sizes):
    """gelu with sizes of its own, wrong in blocks of 512."""
    y = torch.nn.functional.gelu(x, approximate="tanh")
    return y * 1.1 if sizes["BLOCK"] == 512 else y


def toy_row(monkeypatch, ours):
    def op(x):
        return ours(x, tuning.tuned("toy", {"BLOCK": 1024, "STAGES": 1}))

    monkeypatch.setattr(tune.gpu, "using", lambda name, op: op)
    return tune.Row(replace(BENCH, ours=op), torch.float32, "triton", "cpu")


def test_a_wrong_candidate_is_refused_and_not_timed(monkeypatch):
    row, said, timed = toy_row(monkeypatch, toy), [], []

    def timer(call):
        timed.append(tuning.tuned("toy", {"BLOCK": 1024, "STAGES": 1})["BLOCK"])
        return timed[-1]  # the smaller, the faster: 512 would win

    found = {}
    tune.tune(row, found, timer, 1, said.append)
    assert found == {"toy": {"BLOCK": 1024, "STAGES": 1}}
    assert set(timed) == {1024, 2048}
    assert any("{'BLOCK': 512, 'STAGES': 1}: wrong: error" in line for line in said)


def test_a_candidate_that_cannot_run_is_passed_over(monkeypatch):
    def ours(x, sizes):
        if sizes["BLOCK"] != 1024:
            raise RuntimeError("out of resource: shared memory")
        return toy(x, sizes)

    row, said, found = toy_row(monkeypatch, ours), [], {}
    tune.tune(row, found, lambda call: 1.0, 1, said.append)
    assert found["toy"]["BLOCK"] == 1024
    assert any("RuntimeError: out of resource: shared memory" in line for line in said)


def test_wrong_defaults_are_not_tuned(monkeypatch):
    with pytest.raises(ArithmeticError, match="the defaults: error"):
        toy_row(monkeypatch, lambda x, sizes: 1.1 * x)


def test_noise_is_no_reason(monkeypatch):
    row, found = toy_row(monkeypatch, lambda x, sizes: toy(x, {"BLOCK": 0})), {}
    times = iter(range(1000))
    tune.tune(row, found, lambda call: 100 + next(times) % 2, 1, lambda line: None)
    assert found == row.defaults


def test_neighbours():
    assert tune.neighbours({"BLOCK": 1, "num_stages": 1}) == [
        {"BLOCK": 2, "num_stages": 1},
        {"BLOCK": 1, "num_stages": 2},
    ]


def test_saved_and_used(tmp_path, h100):
    path = tmp_path / "out" / "h100.json"
    tune.save(path, {KEY: BEST})
    assert sizes_in_force() == DEFAULTS  # a file that lies there is nobody's wish
    assert tuning.use(path)
    assert sizes_in_force() == BEST
    assert not tuning.use(None)
    assert sizes_in_force() == DEFAULTS


def test_used_sizes_reach_the_launch(tmp_path, monkeypatch):
    launched, x = {}, torch.zeros(2, 600, dtype=torch.bfloat16)
    monkeypatch.setattr(gelu, "launch", lambda kernel, grid, *_, **sizes: launched.update(sizes))
    tuning.use(written(tmp_path))
    gelu.gelu_forward(x, x, None, True, 0)
    assert launched.items() >= BEST.items()


@pytest.mark.parametrize("name, other", [("device", "NVIDIA A100"), ("triton", "3.6.0")])
def test_a_file_from_elsewhere_is_left_alone(name, other, tmp_path, h100):
    path = written(tmp_path, **{name: other})
    with pytest.warns(UserWarning, match=f"h100.json was measured on .*{other}.* NVIDIA H100 with"):
        assert not tuning.use(path)
    assert sizes_in_force() == DEFAULTS


CORRUPT = {
    "not JSON": "{",
    "no blocks": '{"device": "none", "triton": "3.9.0"}',
    "a list": "[]",
    "sizes that are none": '{"device": "a", "triton": "3", "blocks": {"gelu": {"BLOCK": -1}}}',
    "sizes in words": '{"device": "a", "triton": "3", "blocks": {"gelu": {"BLOCK": "1"}}}',
}


@pytest.mark.parametrize("text", CORRUPT.values(), ids=CORRUPT)
def test_a_corrupt_file(text, tmp_path):
    path = tmp_path / "corrupt.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"tuning.use: .*corrupt.json: expected a JSON object"):
        tuning.use(path)
    assert sizes_in_force() == DEFAULTS


def test_a_file_of_another_version_of_a_kernel(tmp_path):
    tuning.use(written(tmp_path, blocks={KEY: {"BLOCK": 512}}))
    with pytest.raises(ValueError, match=f"{KEY}: expected BLOCK, num_warps, got BLOCK:"):
        sizes_in_force()


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        tuning.use(tmp_path / "none.json")


def test_keys_are_few():
    """Lengths of sequences are not in them, so that one file serves every length."""
    q = torch.empty(1, 1, 1, 48, dtype=torch.float16)
    with tuning.trying({}) as asked:
        for queries in (17, 1000, 5000):
            attention.blocks_of("forward", q, 48, queries, False)
    assert list(asked) == [
        "attention forward dtype=float16 head_dim=64 few_queries=False special=False biased=False"
    ]
