"""Triton and Gluon kernels launched as Triton launches them, on CPU tensors:
kernel[grid](*arguments).
"""

from .launch import Module
from .options import Options, defaults_over
from .signature import of_triton
from .source import compile_triton
from .tensor_map import tensor_map

_DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64",
           "int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64", "uint8": "u8",
           "bool": "i1"}  # fmt: skip
# What Triton's launcher takes besides the kernel's own arguments; the rest would be ignored here.
_COMPILE_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
_SWIZZLE_BYTES = (0, 32, 64, 128)  # by the number that Triton's metadata has


class TritonLauncher:
    """Compiles a `@triton.jit` or `@gluon.jit` kernel for the arguments it gets, as Triton does,
    and emulates it.

        launcher = emulator.triton_launcher(add_kernel, arch=90, races=True)
        launcher[(blocks,)](x, y, n, BLOCK=1024, num_warps=4)

    Pointers and integers that are multiples of 16 are promised to be so, integers that are 1 become
    constants: the PTX is what a GPU would get. A TensorDescriptor made on the host becomes a tensor
    map, its shape and its strides, on sm_90 and later.
    """

    def __init__(self, kernel, arch=90, **options):
        if not hasattr(kernel, "arg_names") or not hasattr(kernel, "params"):
            raise TypeError(
                f"{kernel!r} is no compiled-mode @triton.jit function; unset TRITON_INTERPRET, and "
                "pass the function inside an autotuner (its .fn) with the configuration you mean"
            )
        self.kernel, self.arch, self.options = kernel, arch, Options(**options)
        self.counters, self.races = None, []  # of the last launch
        self._modules = {}

    def __getitem__(self, grid):
        return lambda *arguments, **named: self._run(grid, arguments, named)

    def compiled(self, *arguments, **named):
        """Triton's CompiledKernel for these arguments, cubin included; nothing runs."""
        compile_options = {k: named.pop(k) for k in _COMPILE_OPTIONS if k in named}
        _, signature, constants, attrs = self._specialize(self._bind(arguments, named))
        return self._compile(signature, constants, attrs, compile_options)

    def _run(self, grid, arguments, named):
        compile_options = {k: named.pop(k) for k in _COMPILE_OPTIONS if k in named}
        values = self._bind(arguments, named)
        grid = grid(values) if callable(grid) else grid
        run_time, signature, constants, attrs = self._specialize(values)
        key = (tuple(signature.items()), repr(constants), tuple(attrs), *compile_options.items())
        if key not in self._modules:
            found = self._compile(signature, constants, attrs, compile_options)
            declared = of_triton(self.kernel, signature)
            module = Module(found.asm["ptx"], self.options, found.metadata.shared, declared)
            self._modules[key] = module, getattr(found.metadata, "tensordesc_meta", None)
        module, maps = self._modules[key]
        options = vars(defaults_over(self.options))
        described = tuple(value.base for value in run_time if _is_descriptor(value))
        options["memory"] = (*options["memory"], *described)
        kernel = module.with_options(**options).kernel
        try:
            kernel[grid, None](*_parameters(run_time, maps))
        finally:
            self.counters, self.races = kernel.counters, kernel.races

    def _compile(self, signature, constants, attrs, compile_options):
        return compile_triton(
            self.kernel, signature, constants, attrs, arch=self.arch, **compile_options
        )

    def _bind(self, arguments, named):
        """{parameter: value}, with the defaults of the kernel's signature."""
        import inspect

        bound = inspect.signature(self.kernel.fn).bind(*arguments, **named)
        bound.apply_defaults()
        return dict(bound.arguments)

    def _specialize(self, values):
        """(run-time values, their types, constants, promises about divisibility)."""
        run_time, signature, constants, attrs = [], {}, {}, {}
        for position, parameter in enumerate(self.kernel.params):
            value = values[parameter.name]
            kept = getattr(parameter, "do_not_specialize", False)
            if parameter.is_constexpr or value is None or (not kept and _is_one(value)):
                constants[parameter.name] = value
                continue
            run_time.append(value)
            signature[parameter.name] = _type_name(value)
            if _is_descriptor(value):
                continue
            number = value.data_ptr() if hasattr(value, "data_ptr") else value
            if not kept and isinstance(number, int) and number % 16 == 0:
                attrs[(position,)] = [["tt.divisibility", 16]]
        return run_time, signature, constants, attrs


def _is_one(value):
    return isinstance(value, int) and not isinstance(value, bool) and value == 1


def _is_descriptor(value):
    return hasattr(value, "base") and hasattr(value, "block_shape")


def _parameters(values, maps):
    """What the kernel takes for these arguments; `maps` is what the compiler says of each
    descriptor in turn: box, swizzle and type are its choice.
    """
    parameters, maps = [], iter(maps or ())
    for value in values:
        if not _is_descriptor(value):
            parameters.append(value)
            continue
        found = next(maps, None)
        if found is None or value.padding != "zero":
            raise TypeError(
                "a tensor descriptor is a tensor map from sm_90 on, with zero for padding; others "
                "are not emulated"
            )
        described = value.base.as_strided(value.shape, value.strides)
        swizzle = _SWIZZLE_BYTES[found["swizzle"]]
        parameters += [tensor_map(described, found["block_size"], swizzle)]
        parameters += [*value.shape, *value.strides]
    return parameters


def _type_name(value):
    """Triton's name of an argument's type."""
    if _is_descriptor(value):
        from triton.runtime.jit import mangle_type

        return mangle_type(value)
    if hasattr(value, "data_ptr"):
        name = str(value.dtype).rpartition(".")[2]
        if name not in _DTYPES:
            raise TypeError(f"a tensor of {value.dtype}; accepted are {', '.join(_DTYPES)}")
        return f"*{_DTYPES[name]}"
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"a Triton kernel takes tensors and numbers, got {type(value).__name__}")


def triton_launcher(kernel, arch=90, **options):
    """A TritonLauncher; `options` are the fields of Options."""
    return TritonLauncher(kernel, arch, **options)
