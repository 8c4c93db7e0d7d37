"""Loading many kernels must not use up the process's memory maps."""

import pathlib

import torch

from fastlm import emulator

from .test_translation import ptx


def maps():
    return len(pathlib.Path("/proc/self/maps").read_text().splitlines())


def test_libraries_share_their_stacks():
    """1024 threads have 2048 maps, and a process may have 65530."""
    before = []
    for value in range(4):
        body = "ld.param.u64 %rd1, [p];", f"mov.u32 %r1, {value};", "st.global.u32 [%rd1], %r1;"
        x = torch.full((1,), -1, dtype=torch.int32)
        emulator.load(ptx(*body)).kernel[1, 1024](x)
        assert x.item() == value
        before.append(maps())
    assert before[-1] - before[0] < 200
