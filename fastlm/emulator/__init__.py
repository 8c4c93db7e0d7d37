"""Runs the PTX of CUDA and Triton kernels on the CPU, and finds their races and wild accesses.

    from fastlm import emulator

    module = emulator.load("layer_norm.cu", arch=80, races=True)
    module["layer_norm_forward"][rows, 128](x, weight, bias, y, cols, 1e-5)

It executes what nvcc or Triton really emitted, instruction by instruction, one fiber for each CUDA
thread; it does not execute what ptxas makes of it, and says nothing about speed. See
docs/emulator.md. Only the standard library is needed, besides g++; tensors are NumPy's or torch's.
"""

from .counters import Counters
from .errors import CompilerError, EmulatorError, KernelError, TranslationError
from .extension import Extension, compile_sources, extension
from .launch import Kernel, Module
from .options import Options, defaults
from .races import Race, check_places
from .source import compile_cuda, compile_triton, ptx_of
from .tensor_map import tensor_map
from .triton_launcher import TritonLauncher, triton_launcher
from .unwritten import unwritten

__all__ = [
    "CompilerError",
    "Counters",
    "EmulatorError",
    "Extension",
    "Kernel",
    "KernelError",
    "Module",
    "Options",
    "Race",
    "TranslationError",
    "TritonLauncher",
    "compile_cuda",
    "compile_sources",
    "compile_triton",
    "defaults",
    "extension",
    "load",
    "tensor_map",
    "triton_launcher",
    "unwritten",
]


def load(source, *, arch=80, flags=(), instantiate=(), signature=None, constexprs=None, attrs=None,
         num_warps=4, num_stages=2, **options):  # fmt: skip
    """A Module whose kernels run on CPU tensors.

    source: PTX text; a path to a .ptx file or to a .cu file (compiled by nvcc for compute_<arch>
        with `flags`); a Triton CompiledKernel; or a Triton kernel, with `signature`, `constexprs`,
        `attrs`, `num_warps` and `num_stages` as in `compile_triton`
    instantiate: kernels to make of templates of a .cu file, "scale<float, 128>" for instance
    options: the fields of Options, for instance schedule="random", seed=3, races=True

    Kernels are called as `module[name][grid, block, shared](*arguments)`: grid and block are ints
    or tuples, `shared` is the bytes of dynamic shared memory. Block and shared may be left out
    where the PTX fixes them (Triton). Arguments are CPU tensors, numbers, and bytes for structs.

    Raises TranslationError for PTX it does not know, CompilerError when nvcc or g++ fails,
    ValueError for a place in `suppress` that no instruction comes from, and,
    when a kernel runs, KernelError with the fault, its source line, block and thread.
    """
    triton = {}
    if signature is not None:
        triton = {"signature": signature, "constexprs": constexprs, "attrs": attrs,
                  "num_warps": num_warps, "num_stages": num_stages}  # fmt: skip
    compiled = ptx_of(source, arch, flags, instantiate, **triton)
    module = Module(compiled.ptx, Options(**options), compiled.shared, compiled.declared)
    check_places(module.lines, module.options.suppress)
    return module
