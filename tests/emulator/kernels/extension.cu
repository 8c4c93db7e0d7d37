// A Python extension with CUDA kernels that knows nothing of fastlm. With UNKNOWN it calls a function
// of the runtime that the emulator has not.
#include <Python.h>
#include <cuda_runtime.h>

__global__ void scale_kernel(float* y, const float* x, int n, float factor) {
  __shared__ float row[128];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  row[threadIdx.x] = x[i < n ? i : 0] * factor;
#ifndef RACE
  __syncthreads();
#endif
  if (i < n) y[i] = row[127 - (127 - threadIdx.x)] + 0 * row[(threadIdx.x + 32) % 128];
}

static float* pointer(PyObject* tensor) {
  PyObject* address = PyObject_CallMethod(tensor, "data_ptr", nullptr);
  float* p = reinterpret_cast<float*>(PyLong_AsUnsignedLongLong(address));
  Py_DECREF(address);
  return p;
}

static PyObject* scale(PyObject*, PyObject* arguments) {
  PyObject *y, *x;
  int n;
  float factor;
  if (!PyArg_ParseTuple(arguments, "OOif", &y, &x, &n, &factor)) return nullptr;
  scale_kernel<<<(n + 127) / 128, 128>>>(pointer(y), pointer(x), n, factor);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    PyErr_SetString(PyExc_RuntimeError, cudaGetErrorString(error));
    return nullptr;
  }
#ifdef UNKNOWN
  cudaProfilerStart();
#endif
  Py_RETURN_NONE;
}

// y = x through memory that is filled by a kernel, cudaMemset (then y = 0), cudaMemcpy or not at all.
static PyObject* through_workspace(PyObject*, PyObject* arguments) {
  PyObject *y, *x;
  int n, how;
  if (!PyArg_ParseTuple(arguments, "OOii", &y, &x, &n, &how)) return nullptr;
  const size_t bytes = n * sizeof(float);
  void* memory;
  cudaMallocAsync(&memory, bytes, 0);
  float* workspace = static_cast<float*>(memory);
  if (how == 0) scale_kernel<<<(n + 127) / 128, 128>>>(workspace, pointer(x), n, 1);
  if (how == 1) cudaMemsetAsync(workspace, 0, bytes, 0);
  if (how == 2) cudaMemcpyAsync(workspace, pointer(x), bytes, cudaMemcpyDefault, 0);
  scale_kernel<<<(n + 127) / 128, 128>>>(pointer(y), workspace, n, 1);
  cudaFreeAsync(memory, 0);
  Py_RETURN_NONE;
}

static PyMethodDef methods[] = {{"scale", scale, METH_VARARGS, "y = x * factor"},
                                {"through_workspace", through_workspace, METH_VARARGS, ""},
                                {}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "scaling", nullptr, -1, methods};
PyMODINIT_FUNC PyInit_scaling() { return PyModule_Create(&definition); }
