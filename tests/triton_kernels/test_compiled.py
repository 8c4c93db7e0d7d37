"""Every kernel, compiled ahead of time for sm_80 and sm_90: no GPU is needed."""

import csv

import pytest
import triton
from launches import CALLS
from resources import ARCHES, TABLE, compiled, launches, rows, sass

ATTENTION = [call for call in CALLS if call.startswith("attention")]
# ptxas comes with triton, and another one gives other numbers.
SAME_TRITON = TABLE.read_text().startswith(f"# triton {triton.__version__},")
ON_BOTH = pytest.mark.parametrize("arch", ARCHES)


@ON_BOTH
@pytest.mark.parametrize("call", CALLS)
def test_resources_are_those_of_the_table(call, arch):
    found = [{name: str(value) for name, value in row.items()} for row in rows(call, arch)]
    assert found
    if SAME_TRITON:
        table = csv.DictReader(TABLE.read_text().splitlines()[1:])
        wanted = [row for row in table if (row["call"], row["arch"]) == (call, f"sm_{arch}")]
        assert found == wanted, "if it is meant: python tests/triton_kernels/resources.py"
        assert {row["spilled"] for row in found} == {"0"}


@ON_BOTH
@pytest.mark.parametrize("call", ATTENTION)
def test_attention_is_on_tensor_cores_and_out_of_local_memory(call, arch):
    for launch in launches(call):
        name, text = launch.kernel.__name__, sass(compiled(launch, arch))
        if SAME_TRITON:
            assert "LDL" not in text and "STL" not in text, name
        on_tensor_cores = name not in ("attention_combine_kernel", "cache_append_kernel")
        assert ("HGMMA" in text or "HMMA" in text) == on_tensor_cores, name


@pytest.mark.parametrize("kernel", [0, 1, 2], ids=["forward", "dq", "dkv"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_hopper_runs_hoppers_instructions(head_dim, kernel):
    launch = launches(f"attention, head_dim {head_dim}")[kernel]
    assert "HGMMA" in sass(compiled(launch, 90))
