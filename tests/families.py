"""The tests that every op passes: subclassed in each op's test file with that op's tables of cases.

`forms` pass every test and together use every argument of the op; they are large enough for several
threads.
`edges` are shapes and values at which kernels break; they are held to the accuracy rule.
`large` have results of over 16 MB, which the CPU kernels store past the caches. Their elements are
a multiple of 16: torch draws random numbers by 16, and those of the first rows must not depend on
the rest.
"""

import contextlib
import sys

import pytest
import torch
from accuracy import assert_as_accurate_as_torch, cast, forward, gradients, results
from cases import BF16, F16, F32, F64, LAYOUTS, Case, expected
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fastlm

GRADCHECK = sys.modules["torch.autograd.gradcheck"]  # the function hides the module's name


class Families:
    forms: tuple[Case, ...] = ()
    edges: tuple[Case, ...] = ()
    large: tuple[Case, ...] = ()

    def pytest_generate_tests(self, metafunc):
        tables = {"form": self.forms, "case": self.forms + self.edges, "large_case": self.large}
        for argument, table in tables.items():
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, table, ids=str)

    @pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
    def test_as_accurate_as_torch(self, case, dtype, backend, poisoned):
        with skipped_where_too_wide():
            hold_to_rule(results(case.run, case.make(dtype), dtype), case, dtype)

    def test_as_accurate_as_torch_in_float16(self, case, gpu, poisoned):
        with skipped_where_too_wide():
            hold_to_rule(results(case.run, case.make(F16), F16), case, F16)

    def test_gradcheck(self, form, cpp, monkeypatch):
        """A second backward may differ from the first by rounding: cross_entropy's computes anew
        what forward wrote."""
        # Where it fails, gradcheck would go through every element for minutes to say more.
        monkeypatch.setattr(GRADCHECK, "_run_slow_mode_and_get_error", lambda *_: "", raising=False)
        leaves = [t.requires_grad_(t.is_floating_point()) for t in form.make(F64)]
        assert torch.autograd.gradcheck(form.run, leaves, fast_mode=True, nondet_tol=1e-12)

    def test_opcheck(self, form):
        """Of every registered op that the call runs, with the arguments that it runs it with."""
        with Recorder() as recorder:
            results(form.run, form.make(F32), F32)
        assert recorder.calls
        for op, arguments in recorder.calls:
            torch.library.opcheck(op, arguments)

    def test_compiled_whole_and_dynamic(self, form):
        torch._dynamo.reset()
        compiled = torch.compile(form.run, fullgraph=True, dynamic=True, backend="aot_eager")
        hold_to_rule(results(compiled, form.make(F32), F32), form, F32)

    def test_meta_device(self, form):
        real = results(form.run, form.make(BF16), BF16)
        meta = results(form.run, tuple(t.to("meta") for t in form.make(BF16)), BF16)
        assert {k: (t.shape, t.dtype) for k, t in meta.items()} == {
            k: (t.shape, t.dtype) for k, t in real.items()
        }

    def test_inputs_are_not_modified(self, form, backend):
        inputs = form.make(F32)
        results(form.run, inputs, F32)
        assert_same_bits(dict(enumerate(inputs)), dict(enumerate(form.make(F32))))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_any_layout(self, form, layout, cpp):
        inputs = form.make(F32)
        placed = tuple(layout(t) for t in inputs)
        assert_same_bits(results(form.run, placed, F32), results(form.run, inputs, F32))

    def test_deterministic_with_any_number_of_threads(self, form, cpp, threads):
        found = []
        for count in (1, 2, 3, 2):
            threads(count)
            found.append(results(form.run, form.make(F32), F32))
        for other in found[1:]:
            assert_same_bits(other, found[0])

    @pytest.mark.parametrize("ways", [("torch", "cpp"), ("cpp", "torch")], ids="-then-".join)
    def test_backward_takes_any_forwards_residuals(self, form, ways):
        ran_forward, runs_backward = ways
        with BackendReplaced(ran_forward):
            outputs, leaves = forward(form.run, form.make(F32))
        with BackendReplaced(runs_backward):
            found = gradients(outputs, leaves, F32)
        hold_to_rule(found, form, F32)

    @pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
    def test_large_results_are_as_accurate(self, large_case, dtype, cpp):
        """In their first rows, which stand at every alignment and do not depend on the others."""
        inputs = large_case.make(dtype)
        few = first_rows(inputs, 64)
        theirs = results(large_case.run_theirs, few, dtype)
        truth = results(large_case.run_theirs, cast(few, F64), dtype)
        ours = results(large_case.run, inputs, dtype)
        for name in ("output 0", "gradient 0"):
            if truth[name].dim():
                assert_as_accurate_as_torch(ours[name][:64], theirs[name], truth[name], name)

    def test_second_derivative_is_refused(self, form):
        """Where the first depends on the input through its upstream gradient, and where through
        what forward saved alone; by backward() and by grad(), which asks for less."""
        for penalty in (torch.square, lambda output: output):
            outputs, leaves = forward(form.run, form.make(F32))
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            loss = sum(penalty(output).sum() for output in outputs if output.requires_grad)
            first = torch.autograd.grad(loss, wanted, create_graph=True, materialize_grads=True)
            total = sum(g.sum() for g in first)
            if not total.requires_grad:
                continue  # dropout's is linear: its gradient depends on nothing that is saved
            for ask in (
                lambda: total.backward(retain_graph=True),  # noqa: B023
                lambda: torch.autograd.grad(total, wanted, allow_unused=True),  # noqa: B023
            ):
                with pytest.raises(RuntimeError, match="got a second derivative"):
                    ask()

    def test_autocast_changes_nothing(self, form):
        """The inputs' dtypes decide: statistics and losses are float32 whatever autocast says."""
        plain = results(form.run, form.make(BF16), BF16)
        with torch.autocast("cpu", dtype=BF16):
            under_autocast = results(form.run, form.make(BF16), BF16)
        assert_same_bits(under_autocast, plain)


@contextlib.contextmanager
def skipped_where_too_wide():
    """A kernel may have a largest last dimension: its table line says so, and so does the skip."""
    try:
        yield
    except fastlm.BackendUnavailable as refused:
        if "a last dimension of at most" not in str(refused):
            raise
        pytest.skip(str(refused))


def first_rows(inputs: tuple, rows: int) -> tuple:
    """Those tensors that are as long as the first one cut to `rows`."""
    return tuple(t[:rows] if t.shape[:1] == inputs[0].shape[:1] else t for t in inputs)


def hold_to_rule(found: dict, case: Case, dtype: torch.dtype) -> None:
    theirs, truth = expected(case, dtype)
    for name, ours in found.items():
        what = f"{case}: {name}"
        assert_as_accurate_as_torch(ours, theirs[name], truth[name], what, case.cancels)


def assert_same_bits(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


class Recorder(TorchDispatchMode):
    """Remembers the calls of fastlm's registered ops."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastlm":
            copies = tree_map_only(torch.Tensor, lambda t: t.detach().clone(), args)
            self.calls.append((func, copies))
        return func(*args, **(kwargs or {}))


class BackendReplaced(TorchDispatchMode):
    """Runs fastlm's registered ops on one backend, whatever backend they are called with."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastlm":
            args = (*args[:-1], self.name)
        return func(*args, **(kwargs or {}))
