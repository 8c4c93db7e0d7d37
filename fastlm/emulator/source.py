"""Where PTX comes from: text, .ptx and .cu files, Triton kernels."""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import tempfile

from .build import cache_folder, digest
from .errors import CompilerError


def ptx_of(source, arch=80, flags=(), **triton_options):
    """(PTX text, bytes of dynamic shared memory that its launcher would ask for).

    `source`: PTX text; a path to a .ptx or .cu file; a Triton kernel compiled or to be compiled
    (then `signature`, `constexprs` and more are passed to compile_triton).
    """
    if hasattr(source, "asm"):
        return source.asm["ptx"], source.metadata.shared
    if hasattr(source, "arg_names"):
        compiled = compile_triton(source, arch=arch, **triton_options)
        return compiled.asm["ptx"], compiled.metadata.shared
    if isinstance(source, str) and ".version" in source:
        return source, 0
    path = pathlib.Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file, and the text is no PTX")
    if path.suffix == ".cu":
        return compile_cuda(path, arch, flags), 0
    return path.read_text(), 0


def sha256(path):
    """The hash of a file's content."""
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def compile_cuda(path, arch=80, flags=()):
    """PTX of a CUDA source through nvcc, kept until it or a file it includes changes.

    `arch`: 80 or "90a". Raises CompilerError when nvcc is missing or refuses the source.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise CompilerError(f"{path}: nvcc is not on the PATH, so .cu files cannot be compiled")
    command = [nvcc, "-ptx", "-lineinfo", "-O3", "-std=c++17", f"-arch=compute_{arch}", *flags]
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    key = digest(str(path.resolve()), version, *command)
    record = cache_folder() / f"cuda-{key}.json"
    if record.exists():
        stored = json.loads(record.read_text())
        if all(os.path.exists(p) and sha256(p) == h for p, h in stored["inputs"].items()):
            return stored["ptx"]
    ptx, inputs = _run_nvcc(command, path)
    text = json.dumps({"ptx": ptx, "inputs": {p: sha256(p) for p in inputs}})
    with tempfile.NamedTemporaryFile("w", dir=record.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, record)
    return ptx


def _run_nvcc(command, path):
    """(PTX, files that were read)."""
    with tempfile.TemporaryDirectory() as folder:
        output, depends = pathlib.Path(folder) / "kernel.ptx", pathlib.Path(folder) / "kernel.d"
        result = subprocess.run(
            [*command, "-MD", "-MF", str(depends), str(path), "-o", str(output)],
            capture_output=True,
            text=True,
        )
        if result.returncode:
            raise CompilerError(f"nvcc failed on {path}:\n{result.stderr[-3000:]}")
        rule = depends.read_text().replace("\\\n", " ")
        return output.read_text(), rule.partition(":")[2].split()


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
    target = GPUTarget("cuda", int(str(arch).rstrip("a")), 32)
    # Triton 3.9 asks for fp_fusion to be said: its default is about to change.
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target, {**options, "enable_fp_fusion": enable_fp_fusion})
