"""Every kernel, compiled ahead of time for sm_80 and sm_90: no GPU is needed."""

import csv
import re

import pytest
import triton
from launches import CALLS, arches_of
from resources import TABLE, compiled, launches, rows, sass

EACH = [(call, arch) for call in CALLS for arch in arches_of(call)]
ATTENTION = [(call, arch) for call, arch in EACH if call.startswith("attention")]
# ptxas comes with triton, and another one gives other numbers.
SAME_TRITON = TABLE.read_text().startswith(f"# triton {triton.__version__},")


@pytest.mark.parametrize("call, arch", EACH)
def test_resources_are_those_of_the_table(call, arch):
    found = [{name: str(value) for name, value in row.items()} for row in rows(call, arch)]
    assert found
    if SAME_TRITON:
        table = csv.DictReader(TABLE.read_text().splitlines()[1:])
        wanted = [row for row in table if (row["call"], row["arch"]) == (call, f"sm_{arch}")]
        assert found == wanted, "if it is meant: python tests/triton_kernels/resources.py"
        assert {row["spilled"] for row in found} == {"0"}


@pytest.mark.parametrize("call, arch", ATTENTION)
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


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_kernel_for_hopper_loads_by_tma_and_shares_out_registers(head_dim):
    (launch,) = launches(f"attention for Hopper, head_dim {head_dim}")
    text = sass(compiled(launch, 90))
    for instruction in ("HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG", "SYNCS"):
        assert instruction in text
    assert "HMMA" not in text.replace("HGMMA", "")
    assert not re.search(r"\bLDG\b", text)  # all that is read comes by TMA
