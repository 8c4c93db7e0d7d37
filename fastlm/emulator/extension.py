"""A CUDA extension, host code and all, built for a machine that has no GPU.

Its sources are compiled by nvcc unchanged; in place of cudart they are linked with
cudart/cudart.cpp, whose launches come here and run in the emulator.
"""

import ctypes
import fcntl
import functools
import importlib.machinery
import importlib.util
import inspect
import json
import os
import pathlib
import re
import shutil
import subprocess
import sysconfig
import threading
import types
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from .arguments import memory_of
from .build import cache_folder, digest
from .errors import CompilerError
from .launch import Module
from .options import Options, defaults_over
from .source import capability, capability_number, sha256
from .translate import parameter_layout

_CUDART = pathlib.Path(__file__).parent / "cudart" / "cudart.cpp"
_FLAGS = ("-std=c++17", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden", "-MMD")
_ENTRY = re.compile(r"\.entry\s+([\w$]+)")
_FAULT = 719  # cudaErrorLaunchFailure


class Extent(NamedTuple):
    """The memory of one tensor of a call, from its first element to its last, or of one allocation.

    written: the address of a byte for each of an allocation's, which says whether it is written
    """

    name: str
    address: int
    bytes: int
    written: int = 0


class Launch(NamedTuple):
    """One launch of a call; counters is None unless they are asked for, races are those that were
    seen and not raised.
    """

    kernel: str
    grid: tuple
    block: tuple
    shared: int
    counters: Any
    races: list


class Extension(types.ModuleType):
    """The extension's functions and classes; `launches` are those of the last call."""

    def __init__(self, native, library, kernels, options, arch):
        super().__init__(native.__name__, native.__doc__)
        self.launches: list[Launch] = []
        self._kernels, self._options = kernels, options
        self._held: Any = weakref.WeakKeyDictionary()  # tensors that an instance was made from
        self._call, self._raised = threading.local(), library.emulator_raised
        self._callback = _LAUNCHER(self._launch)
        self._connect = functools.partial(
            library.emulator_connect, self._callback, capability_number(arch)
        )
        for name, value in vars(native).items():
            if not name.startswith("__"):
                setattr(self, name, self._wrap(value) if callable(value) else value)

    def _wrap(self, function):
        """`function`, with its tensors known to the launches that it makes."""

        @functools.wraps(function)
        def call(*arguments, **named):
            extents = self._extents(function.__name__, (*arguments, *named.values()))
            self._call.extents, self._call.fault, self.launches = extents, None, []
            self._connect()
            try:
                result = function(*arguments, **named)
            except Exception as error:
                raise self._fault() or error from None
            if self._call.fault:
                raise self._fault()
            if inspect.isclass(function):
                self._held[result] = extents
            return result

        return call

    def _fault(self):
        """The fault that a call raises, which its host code need not have asked for."""
        self._raised()
        return self._call.fault

    def _extents(self, function, values):
        found = []
        for i, value in enumerate(values):
            if hasattr(value, "data_ptr"):
                found.append(_extent(f"argument {i} of {function}", value))
            elif type(value).__module__ == self.__name__:
                found.extend(self._held.get(value, ()))
        return found

    def _launch(self, name, grid, block, shared, arguments, allocations, count):
        """What cudaLaunchKernel calls. Faults are raised by the call that this is a part of."""
        try:
            self._run(name.decode(), grid[:3], block[:3], shared, arguments, allocations[:count])
        except Exception as error:  # of any kind: none can pass through the host's C++
            self._call.fault = error
            return _FAULT
        return 0

    def _run(self, name, grid, block, shared, arguments, allocations):
        memory = [*self._call.extents]
        memory += [
            Extent(f"allocation {i}", a.address, a.bytes, a.written)
            for i, a in enumerate(allocations)
        ]
        options = defaults_over(self._options)
        kernel = self._kernels[name]().with_options(**vars(options) | {"memory": tuple(memory)})[
            name
        ]
        layout = parameter_layout(kernel.function)
        values = [ctypes.string_at(arguments[i], size) for i, (_, _, size) in enumerate(layout)]
        kernel[tuple(grid), tuple(block), shared](*values)
        self.launches.append(
            Launch(name, tuple(grid), tuple(block), shared, kernel.counters, kernel.races)
        )


class _Allocation(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("address", "bytes", "written")]


_U32S = ctypes.POINTER(ctypes.c_uint32)
_LAUNCHER = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, _U32S, _U32S, ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(_Allocation), ctypes.c_uint64,
)  # fmt: skip


def _extent(name, tensor):
    if tensor.device.type != "cpu":
        raise TypeError(f"{name}: a tensor on {tensor.device}: the emulator works on CPU tensors")
    return Extent(name, *memory_of(tensor))


# ---- the build ----


def extension(sources, *, name, include=(), flags=(), arch=80, arch_of=None, **options):
    """The imported module of a CUDA extension, whose kernels run on CPU tensors in the emulator.

    sources: its .cu and .cpp files; one of them defines the Python module `name`
    include: folders of headers, pybind11's among them where it is used
    flags: more of nvcc's, for instance definitions with which host code takes CPU tensors
    arch: the compute capability of the device, and that kernels are compiled for
    arch_of: {source: capability} of those that are compiled for an older one
    options: the fields of Options; `emulator.defaults` changes them for a block of code

    Functions raise KernelError where a kernel faults; a global access must lie in a tensor that the
    call, or an object among its arguments, was given, or in memory that the host code allocated.
    The build is cached by content. Raises CompilerError when nvcc is missing or fails, and
    ImportError where host code calls what the emulator has of the CUDA runtime not.
    """
    build = {"include": include, "flags": flags, "arch": arch, "arch_of": arch_of}
    built = compile_sources([_CUDART, *sources], **build).values()
    path = _link(name, [folder / "object.o" for folder in built])
    native = _import(name, path)
    library = ctypes.CDLL(str(path))
    kernels: dict[str, Callable[[], Module]] = {}
    for file in (folder / "kernels.ptx" for folder in built):
        if file.exists():  # parsed when a kernel of it is launched
            text = file.read_text()
            module = functools.cache(functools.partial(Module, text, Options(**options)))
            kernels |= dict.fromkeys(_ENTRY.findall(text), module)
    return Extension(native, library, kernels, Options(**options), arch)


def compile_sources(sources, *, include=(), flags=(), arch=80, arch_of=None):
    """{source: folder} of an extension's files; the arguments are those of `extension`.

    In a folder are object.o, kernels.ptx where there are any, and built.json, whose "messages" are
    what nvcc said.
    """
    folders = [*include, sysconfig.get_path("include")]
    command = [_nvcc(), *_FLAGS, *flags, *(f"-I{folder}" for folder in folders)]

    def build(file):
        target = capability((arch_of or {}).get(file, arch))
        return _compile(
            [*command, "-gencode", f"arch=compute_{target},code=compute_{target}"], file
        )

    sources = sorted(map(pathlib.Path, sources))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(sources, pool.map(build, sources), strict=True))


def _nvcc():
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise CompilerError("nvcc is not on the PATH, so no CUDA extension can be built")
    return nvcc


def _compile(command, source):
    """The cached folder of one source."""
    # Host code is glue: -O1 compiles it in half the time. Kernels are optimised as on a GPU.
    command = [*command, *(("-O3",) if source.suffix == ".cu" else ("-O1", "-x", "c++"))]
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True).stdout
    folder = cache_folder() / f"extension-{digest(str(source.resolve()), version, *command)}"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be building the same
        if not _is_fresh(folder):
            _run_nvcc(command, source, folder)
    return folder


def _is_fresh(folder):
    record = folder / "built.json"
    if not record.exists():
        return False
    inputs = json.loads(record.read_text())["inputs"]
    return all(os.path.exists(path) and sha256(path) == seen for path, seen in inputs.items())


def _run_nvcc(command, source, folder):
    for old in folder.iterdir():
        if old.name != "lock":
            old.unlink()
    outputs = ["-MF", str(folder / "depends"), "-c", str(source), "-o", str(folder / "object.o")]
    keep = ["--keep", "--keep-dir", str(folder)]
    result = subprocess.run([*command, *keep, *outputs], capture_output=True, text=True)
    if result.returncode:
        raise CompilerError(f"nvcc failed on {source}:\n{result.stderr[-3000:]}")
    if source.suffix == ".cu":
        (folder / f"{source.stem}.ptx").rename(folder / "kernels.ptx")
    inputs = (folder / "depends").read_text().replace("\\\n", " ").partition(" : ")[2].split()
    for file in folder.iterdir():
        if file.name not in ("lock", "object.o", "kernels.ptx"):
            file.unlink()
    seen = {"inputs": {path: sha256(path) for path in inputs}, "messages": result.stderr}
    (folder / "built.json").write_text(json.dumps(seen))


def _link(name, objects):
    """The module's library; its name holds the objects' hash, as a process keeps what it loaded."""
    key = digest(name, *map(sha256, objects))
    target = cache_folder() / f"extension-{key}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if target.exists():
        return target
    output = target.with_suffix(f".{os.getpid()}")
    command = [_nvcc(), "--cudart", "none", "-shared", *map(str, objects), "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise CompilerError(f"{name}: linking failed:\n{result.stderr[-3000:]}")
    os.replace(output, target)
    return target


def _import(name, path):
    # pybind11 hands out the first module of a name again; the last part names the init function.
    name = f"{path.name.partition('.')[0].replace('-', '_')}.{name}"
    try:
        loader = importlib.machinery.ExtensionFileLoader(name, str(path))
        spec = importlib.util.spec_from_file_location(name, path, loader=loader)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        loader.exec_module(module)
    except ImportError as error:
        missing = re.search(r"undefined symbol: (_*cuda\w+)", str(error))
        if missing:
            raise ImportError(
                f"{name} calls {missing[1]}, which the emulator has not: add it to {_CUDART}"
            ) from error
        raise
    return module
