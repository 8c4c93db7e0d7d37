"""Triton kernels compiled here and now; skipped where Triton is not installed."""

import pytest
import torch

from fastlm import emulator

triton = pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture(autouse=True)
def compiled_mode(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # 3.10 changes the default
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: kernels cannot be compiled in this process")


@pytest.fixture
def kernels():
    from .fixtures import triton_kernels

    return triton_kernels


@pytest.mark.parametrize(
    "dtype, arch",
    [(torch.bfloat16, 80), (torch.bfloat16, 90), (torch.float16, 80), (torch.float32, 90)],
)
def test_launch_as_on_a_gpu(kernels, dtype, arch):
    x = torch.randn(3, 100).to(dtype)
    y = torch.full_like(x, float("nan"))
    emulator.triton_launcher(kernels.softmax_rows, arch=arch)[(3,)](
        x, y, 100, BLOCK=128, num_warps=2
    )
    torch.testing.assert_close(y, x.float().softmax(-1).to(dtype))


def test_grid_from_the_constants_and_counters(kernels):
    x, sums = torch.randn(40, 64), torch.zeros(64)
    launcher = emulator.triton_launcher(kernels.column_sums, counters=True)
    launcher[lambda meta: (triton.cdiv(40, meta["ROWS"]),)](x, sums, 40, 64, ROWS=16, COLS=64)
    torch.testing.assert_close(sums, x.sum(0))
    assert (
        launcher.counters.global_read == x.nbytes + sums.nbytes * 3
    )  # atomics read what they change


def test_integer_one_becomes_a_constant(kernels):
    x = torch.randn(1, 5)
    y = torch.zeros_like(x)
    emulator.triton_launcher(kernels.softmax_rows)[(5,)](x, y, 1, BLOCK=16)
    assert torch.equal(y, torch.ones_like(y))


def test_a_fault_in_a_triton_kernel_is_found(kernels):
    x, y = torch.randn(2, 100), torch.zeros(1, 100)
    with pytest.raises(emulator.KernelError, match=r"global memory write .* argument 1") as error:
        emulator.triton_launcher(kernels.softmax_rows)[(2,)](x, y, 100, BLOCK=128)
    assert "triton_kernels.py:" in error.value.where


def test_data_of_another_type_than_the_signature_says(kernels):
    signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "cols": "i32"}
    module = emulator.load(kernels.softmax_rows, signature=signature, constexprs={"BLOCK": 128})
    x, y = torch.randn(2, 100), torch.zeros(2, 100)
    module.kernel[2, None](x, y, 100)
    with pytest.raises(TypeError, match="parameter y_ptr: expected a tensor of float32"):
        module.kernel[2, None](x, y.half(), 100)


def test_what_cannot_be_launched():
    with pytest.raises(TypeError, match="no compiled-mode"):
        emulator.triton_launcher(print)


def described(x, rows, **options):
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor.from_tensor(x, [rows, 64], layout, **options)


def gluon_kernel():
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper", reason="Triton has no Gluon")
    from .gluon_kernels import double_boxes

    return double_boxes


@pytest.mark.parametrize(
    "options",
    [{}, {"late_copies": False},
     {"races": True, "uninitialized": True, "schedule": "random", "seed": 1}],
    ids=str,
)  # fmt: skip
def test_gluon_with_host_descriptors_and_specialised_warps(options):
    """Five boxes of 16 rows for 70: the last one ends in the tensor, and its neighbour stays."""
    x, memory = torch.randn(70, 72).bfloat16()[:, :64], torch.full((80, 64), 7.0).bfloat16()
    y = memory[:70]
    launcher = emulator.triton_launcher(gluon_kernel(), arch=90, **options)
    launcher[(1,)](described(x, 16), described(y, 16), 5, num_warps=4)
    assert torch.equal(y, x + x) and (memory[70:] == 7).all()


def test_a_warp_that_does_not_wait_for_a_box_is_found():
    x = torch.randn(64, 64).bfloat16()
    launcher = emulator.triton_launcher(gluon_kernel(), races=True)
    with pytest.raises(emulator.KernelError, match=r"asynchronous copy|data race"):
        launcher[(1,)](described(x, 16), described(x.clone(), 16), 4, False, num_warps=4)


def test_padding_that_is_not_emulated():
    x = torch.zeros(16, 64).bfloat16()
    launcher = emulator.triton_launcher(gluon_kernel())
    with pytest.raises(TypeError, match="with zero for padding"):
        launcher[(1,)](described(x, 16, padding="nan"), described(x, 16), 1)


def liger_kernels():
    return pytest.importorskip(
        "liger_kernel.ops.cross_entropy", reason="liger-kernel is not installed"
    )


@pytest.mark.parametrize("detectors", [{}, {"races": True, "uninitialized": True}], ids=str)
def test_a_kernel_of_another_package_raises_no_alarm(detectors):
    """Liger's RMSNorm forward, a kernel that its users run every day."""
    liger_kernels()
    from liger_kernel.ops.rms_norm import _rms_norm_forward_kernel as rms_norm

    x, weight = torch.randn(4, 300).bfloat16(), torch.randn(300).bfloat16()
    y, rstd = torch.full_like(x, float("nan")), torch.zeros(4)
    values = {"Y_ptr": y, "Y_row_stride": 300, "X_ptr": x, "X_row_stride": 300, "W_ptr": weight,
              "W_row_stride": 1, "RSTD_ptr": rstd, "RSTD_row_stride": 1, "n_cols": 300, "eps": 1e-6,
              "offset": 0.0, "casting_mode": 0, "elementwise_affine": True,
              "BLOCK_SIZE": 512}  # fmt: skip
    emulator.triton_launcher(rms_norm, **detectors)[(4,)](**values)
    truth = torch.nn.functional.rms_norm(x.float(), (300,), weight.float(), 1e-6)
    assert ((y.float() - truth).abs() <= 2 * 2**-8 * truth.abs() + 1e-6).all()
