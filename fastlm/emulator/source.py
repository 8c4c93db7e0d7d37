"""Where PTX comes from: text, .ptx and .cu files, Triton kernels."""

import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from typing import NamedTuple

from .build import cache_folder, digest
from .errors import CompilerError
from .signature import Parameter, declarations, of_triton


class Compiled(NamedTuple):
    """PTX text, the bytes of dynamic shared memory that its launcher would ask for, and what is
    known of the kernels' parameters: {kernel: [parameters, ...]}.
    """

    ptx: str
    shared: int = 0
    declared: dict | None = None


def ptx_of(source, arch=80, flags=(), instantiate=(), **triton_options):
    """What a source Compiled to.

    `source`: PTX text; a path to a .ptx or .cu file; a Triton kernel compiled or to be compiled
    (then `signature`, `constexprs` and more are passed to compile_triton).
    `instantiate`: kernels that a .cu file has the templates of
    """
    if hasattr(source, "asm"):
        return Compiled(source.asm["ptx"], source.metadata.shared)
    if hasattr(source, "arg_names"):
        compiled = compile_triton(source, arch=arch, **triton_options)
        declared = of_triton(source, triton_options["signature"])
        return Compiled(compiled.asm["ptx"], compiled.metadata.shared, declared)
    if isinstance(source, str) and ".version" in source:
        return Compiled(source)
    path = pathlib.Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file, and the text is no PTX")
    if instantiate and path.suffix != ".cu":
        raise ValueError(f"instantiate: expected a .cu file, got {path}")
    if path.suffix == ".cu":
        path = _instantiating(path, instantiate) if instantiate else path
        return _compiled_cuda(path, arch, flags)
    return Compiled(path.read_text())


def capability(arch):
    """A compute capability as nvcc has it in compute_<capability>: "80", "90a".

    arch: 80, "8.0", "90a", "sm_90a", "compute_80". Raises ValueError for anything else.
    """
    match = re.fullmatch(r"(?:sm_|compute_)?(\d+?)\.?(\d)([af]?)", str(arch))
    if not match:
        raise ValueError(
            f"arch: expected a compute capability such as 80 or 'sm_90a', got {arch!r}"
        )
    return "".join(match.groups())


def capability_number(arch):
    """A compute capability without its letter, as an integer."""
    return int(capability(arch).rstrip("af"))


def sha256(path):
    """The hash of a file's content."""
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def compile_cuda(path, arch=80, flags=()):
    """PTX of a CUDA source through nvcc, kept until it or a file it includes changes.

    `arch`: 80 or "90a". Raises CompilerError when nvcc is missing or refuses the source.
    """
    return _compiled_cuda(path, arch, flags).ptx


def _compiled_cuda(path, arch, flags):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise CompilerError(f"{path}: nvcc is not on the PATH, so .cu files cannot be compiled")
    command = [nvcc, "-ptx", "-lineinfo", "-O3", "-std=c++17", *flags]
    command.append(f"-arch=compute_{capability(arch)}")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    key = digest("declared", str(path.resolve()), version, *command)
    record = cache_folder() / f"cuda-{key}.json"
    if record.exists():
        stored = json.loads(record.read_text())
        if all(os.path.exists(p) and sha256(p) == h for p, h in stored["inputs"].items()):
            declared = {
                kernel: [[Parameter(*p) for p in parameters] for parameters in found]
                for kernel, found in stored["declared"].items()
            }
            return Compiled(stored["ptx"], declared=declared)
    ptx, inputs, declared = _run_nvcc(command, path)
    stored = {"ptx": ptx, "declared": declared, "inputs": {p: sha256(p) for p in inputs}}
    text = json.dumps(stored)
    with tempfile.NamedTemporaryFile("w", dir=record.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, record)
    return Compiled(ptx, declared=declared)


def _instantiating(path, kernels):
    """A source that takes the kernels' addresses, so that the compiler makes them of templates."""
    lines = [f"auto kernel_{i} = &{name};" for i, name in enumerate(kernels)]
    path = str(path.resolve())
    text = f'#include "{path}"\nnamespace {{\n' + "\n".join(lines) + "\n}\n"
    source = cache_folder() / f"templates-{digest(text)}.cu"
    if not source.exists():
        with tempfile.NamedTemporaryFile("w", dir=source.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, source)
    return source


def _run_nvcc(command, path):
    """(PTX, files that were read, kernels that are defined)."""
    with tempfile.TemporaryDirectory() as folder:
        output, depends = pathlib.Path(folder) / "kernel.ptx", pathlib.Path(folder) / "kernel.d"
        kept = ["--keep", "--keep-dir", folder, "-MD", "-MF", str(depends), "-o", str(output)]
        result = subprocess.run([*command, *kept, str(path)], capture_output=True, text=True)
        if result.returncode:
            raise CompilerError(f"nvcc failed on {path}:\n{result.stderr[-3000:]}")
        rule = depends.read_text().replace("\\\n", " ")
        preprocessed = pathlib.Path(folder) / f"{path.stem}.cpp1.ii"
        declared = declarations(preprocessed.read_text(errors="replace"))
        return output.read_text(), rule.partition(":")[2].split(), declared


def compile_triton(kernel, signature, constexprs=None, attrs=None, arch=90, num_warps=4,
                   num_stages=2, enable_fp_fusion=True):  # fmt: skip
    """A CompiledKernel of a Triton or Gluon kernel for compute capability `arch`, without a GPU.

    signature: {argument: type} of the run-time arguments, for instance {"x_ptr": "*bf16"}
    constexprs: {argument: value}
    attrs: {(position,): [["tt.divisibility", 16]]} for aligned pointers and sizes
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource

    constexprs = constexprs or {}
    types = {**signature, **dict.fromkeys(constexprs, "constexpr")}
    source = ASTSource(fn=kernel, signature=types, constexprs=constexprs, attrs=attrs or {})
    target = GPUTarget("cuda", capability_number(arch), 32)
    # Triton 3.9 asks for fp_fusion to be said: its default is about to change.
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target, {**options, "enable_fp_fusion": enable_fp_fusion})
