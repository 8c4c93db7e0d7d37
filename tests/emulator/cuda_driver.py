"""The few calls of the CUDA driver that run PTX on a real GPU, through ctypes and libcuda."""

import ctypes


class Driver:
    """One context on the first GPU. Raises OSError when there is no driver or no GPU."""

    def __init__(self):
        self._cuda = ctypes.CDLL("libcuda.so.1")
        device, context, count = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_int()
        if (
            self._cuda.cuInit(0)
            or self._cuda.cuDeviceGetCount(ctypes.byref(count))
            or not count.value
        ):
            raise OSError("no GPU")
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)

    def _call(self, name, *arguments):
        status = getattr(self._cuda, name)(*arguments)
        if status:
            raise OSError(f"{name} failed with {status}")

    def run(self, ptx, kernel, grid, block, arrays):
        """Runs a kernel whose parameters are pointers; the arrays are updated in place."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), ptx.encode())
        self._call("cuModuleGetFunction", ctypes.byref(function), module, kernel.encode())
        pointers = [self._upload(array) for array in arrays]
        slots = (ctypes.c_void_p * len(pointers))(*(ctypes.addressof(p) for p in pointers))
        self._call("cuLaunchKernel", function, grid, 1, 1, block, 1, 1, 0, None, slots, None)
        self._call("cuCtxSynchronize")
        for array, pointer in zip(arrays, pointers, strict=True):
            target = array.ctypes.data_as(ctypes.c_void_p)
            self._call("cuMemcpyDtoH_v2", target, pointer, ctypes.c_size_t(array.nbytes))
            self._call("cuMemFree_v2", pointer)

    def _upload(self, array):
        assert array.flags.c_contiguous
        pointer = ctypes.c_uint64()
        size = ctypes.c_size_t(max(1, array.nbytes))
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), size)
        source = array.ctypes.data_as(ctypes.c_void_p)
        self._call("cuMemcpyHtoD_v2", pointer, source, ctypes.c_size_t(array.nbytes))
        return pointer
