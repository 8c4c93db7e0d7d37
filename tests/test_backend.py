"""The dispatch: which kernel runs, who may say so, and how it is explained."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from accuracy import results
from cases import F32

import fastlm
from fastlm import _cpu, backend, ops
from fastlm.backend import KERNELS, Kernel, choose
from fastlm.explanation import explanation

X = torch.zeros(3, 8)


@pytest.fixture(autouse=True)
def no_gpu_kernels(monkeypatch):
    """Whether fastlm._cuda was built on this machine must not decide what these tests see."""
    for op, kernels in KERNELS.items():
        monkeypatch.setitem(KERNELS, op, [k for k in kernels if k.on != "cuda"])


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip


def test_every_list_ends_with_the_reference():
    for op, kernels in KERNELS.items():
        assert kernels[-1] == Kernel("torch", "fastlm.reference"), op


@pytest.mark.parametrize("op", KERNELS)
def test_first_kernel_that_can_is_taken(op):
    assert choose(op, X) == "cpp"
    assert choose(op, X.half()) == "torch"
    assert choose(op, X, "some form") == "torch"
    assert choose(op, X.to("meta")) == "cpp"


def test_last_dim_limits_a_kernel(monkeypatch):
    kernels = [Kernel("cpp", "fastlm._cpu", last_dim=7), KERNELS["gelu"][-1]]
    monkeypatch.setitem(KERNELS, "gelu", kernels)
    assert choose("gelu", X[:, :7]) == "cpp"
    assert kernels[0].why_not(X) == "takes a last dimension of at most 7, not 8"


def test_a_kernel_whose_module_is_missing_is_passed_over(monkeypatch):
    kernels = [Kernel("triton", "fastlm.kernels.missing"), *KERNELS["gelu"]]
    monkeypatch.setitem(KERNELS, "gelu", kernels)
    assert choose("gelu", X) == "cpp"
    assert "fastlm.kernels.missing cannot be imported" in kernels[0].why_not(X)
    with fastlm.use("triton"), pytest.raises(fastlm.BackendUnavailable, match="cannot be imported"):
        ops.gelu(X)


@pytest.mark.parametrize(
    "name, message",
    [
        ("triton", "there is no such kernel for this op"),
        ("cpp", "cpp: takes float32, float64, bfloat16, not float16"),
    ],
)
def test_a_forced_backend_that_cannot_is_an_error(name, message):
    with fastlm.use(name), pytest.raises(fastlm.BackendUnavailable, match=message) as found:
        ops.gelu(X.half())
    assert "gelu: nothing can run it on (3, 8) float16 cpu" in str(found.value)


@pytest.mark.parametrize("base", ["cuda", "triton"])
def test_an_emulated_backend_runs_on_cpu_tensors(base, monkeypatch):
    kernels = [Kernel(base, "fastlm.kernels.missing", on="cuda", dtypes=(torch.float32,))]
    monkeypatch.setitem(KERNELS, "gelu", [*kernels, *KERNELS["gelu"]])
    monkeypatch.setattr(backend, "_cannot_emulate", lambda base: None)
    with fastlm.use(f"emulated:{base}"):
        assert choose("gelu", X) == f"emulated:{base}"
        assert "emulated:" + base + " is asked for" in explanation("gelu", X)
        with pytest.raises(fastlm.BackendUnavailable, match="takes float32, not float16"):
            choose("gelu", X.half())
    assert choose("gelu", X) == "cpp"


def unverified(**limits):
    """A kernel like gluon's in front of gelu's others, on the device that the tests have."""
    return Kernel("gluon", "fastlm.reference", verified=False, **limits)


def test_what_no_gpu_has_run_must_be_asked_for(monkeypatch):
    monkeypatch.setitem(KERNELS, "gelu", [unverified(), *KERNELS["gelu"]])
    assert choose("gelu", X) == "cpp"
    assert "gluon   no: has not yet run on a GPU: ask for it by name" in explanation("gelu", X)
    with fastlm.use("gluon"):
        assert choose("gelu", X) == "gluon"
        assert "gluon   taken" in explanation("gelu", X)


def test_what_a_call_needs_and_a_kernel_lacks(monkeypatch):
    monkeypatch.setitem(KERNELS, "gelu", [unverified(lacks=("softcap", "dropout"))])
    needs = ["packed sequences", "dropout"]
    with fastlm.use("gluon"):
        assert choose("gelu", X, needs=lambda: needs[:1]) == "gluon"
        with pytest.raises(fastlm.BackendUnavailable, match="gluon: does not take dropout"):
            choose("gelu", X, needs=lambda: needs)


def test_a_kernel_for_one_kind_of_gpu(monkeypatch):
    class OnGpu:
        device, dtype, shape = torch.device("cuda", 0), F32, X.shape
        dim = X.dim

    kernel = Kernel("cuda", "fastlm.reference", "cuda", capability=(9, 0))
    for capability, reason in (
        ((9, 0), None),
        ((8, 0), "is for GPUs of compute capability (9, 0)"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert (kernel.why_not(OnGpu()) or "").startswith(reason or "")
        assert (kernel.why_not(OnGpu()) is None) == (reason is None)


def test_why_a_backend_cannot_be_emulated(monkeypatch):
    assert backend._cannot_emulate("cpp") == "only cuda, gluon and triton kernels are emulated"
    monkeypatch.setattr(backend.shutil, "which", lambda name: None)
    assert "needs nvcc" in backend._cannot_emulate("cuda")


def test_use_ends_and_nests_and_survives_errors():
    with fastlm.use("torch"):
        with fastlm.use("cpp"):
            assert choose("gelu", X) == "cpp"
        assert choose("gelu", X) == "torch"
    with pytest.raises(KeyError), fastlm.use("torch"):
        raise KeyError
    assert choose("gelu", X) == "cpp"


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"torch, emulated:cuda, .*, emulated:triton, got 'cpu'"):
        fastlm.use("cpu").__enter__()


def test_backward_runs_where_forward_ran(monkeypatch):
    """Also when use() is no longer in force."""
    monkeypatch.setattr(_cpu, "gelu_backward", lambda *_: pytest.fail("forward ran on torch"))
    x = torch.zeros(3, 8, requires_grad=True)
    with fastlm.use("torch"):
        y = ops.gelu(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((3, 8), 0.5))


def test_compiled_code_follows_use():
    torch._dynamo.reset()
    compiled = torch.compile(ops.gelu, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 1000)
    for name in ("cpp", "torch", "cpp"):
        with fastlm.use(name):
            assert torch.equal(compiled(x), ops.gelu(x))
    assert not torch.equal(*(run_on(name, x) for name in ("cpp", "torch")))  # they differ in bits


def run_on(name, x):
    with fastlm.use(name):
        return ops.gelu(x)


def test_environment_variable():
    code = (
        "import torch, fastlm; from fastlm.backend import choose; x = torch.zeros(2);"
        "print(choose('gelu', x))\nwith fastlm.use('cpp'): print(choose('gelu', x))"
    )
    assert run_python(code, FASTLM_BACKEND="torch").stdout.split() == ["torch", "cpp"]


def test_bad_environment_variable():
    found = run_python("import fastlm, torch; fastlm.ops.gelu(torch.zeros(2))", FASTLM_BACKEND="x")
    assert found.returncode == 1
    assert "emulated:gluon, emulated:triton, got 'x'" in found.stderr


def test_explain(capsys):
    fastlm.explain("layer_norm", X, (8,))
    assert capsys.readouterr().out.splitlines() == [
        "layer_norm on (3, 8) float32 cpu",
        "  cpp     taken",
        "  torch   not needed: one above is taken",
    ]
    with fastlm.use("torch"):
        fastlm.explain("layer_norm", X)
    assert capsys.readouterr().out.splitlines() == [
        "layer_norm on (3, 8) float32 cpu",
        "  cpp     no: torch is asked for",
        "  torch   taken",
    ]


def test_explain_names_the_form(capsys):
    fastlm.explain("layer_norm", X, 8, torch.zeros(8).half())
    out = capsys.readouterr().out
    assert "with parameters of torch.float16 with torch.float32 input" in out
    assert "cpp     no: does not take parameters" in out


def test_explain_of_an_unknown_op():
    with pytest.raises(ValueError, match=r"expected one of .*layer_norm.*, got 'softmax'"):
        fastlm.explain("softmax", X)


def test_one_warning_where_a_gpu_falls_to_the_reference():
    """Only the tensor's device is looked at, so that a stand-in serves."""

    class OnGpu:
        device, dtype, shape = torch.device("cuda"), F32, X.shape
        dim = X.dim

    backend._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"gelu runs on torch's own operations.*runs on cpu"):
        assert choose("gelu", OnGpu()) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose("gelu", OnGpu())


def test_ops_chained_under_inductor():
    """One case through the real compiler: what aot_eager hides is in the code that it generates."""

    def block(x, residual, weight, bias, q_bias):
        y, residual = ops.add_layer_norm(x, residual, weight, bias)
        q = ops.gelu(y, approximate="tanh", bias=q_bias).view(2, 5, 2, 8)
        y = ops.attention(q, q * 2, q + 1, causal=True).flatten(2) + residual
        return ops.cross_entropy(y.flatten(0, 1), torch.arange(10) % 3)

    inputs = (*torch.randn(2, 2, 5, 16), *torch.randn(3, 16))
    torch._dynamo.reset()
    compiled = results(torch.compile(block, fullgraph=True), inputs, F32)
    eager = results(block, inputs, F32)
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name])
