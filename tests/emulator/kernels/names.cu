// Kernels and variables that are called otherwise in the PTX than in the source.
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

__global__ void scale(int n, float factor, const float* x, float* y) {
  if (int(threadIdx.x) < n) y[threadIdx.x] = x[threadIdx.x] * factor;
}
__global__ void scale_rows(float factor, float* y) { y[threadIdx.x] *= factor; }

template <typename T, int kAdded, bool kTwice = false> __global__ void add(T* y, unsigned n) {
  if (threadIdx.x < n) y[threadIdx.x] = T(float(y[threadIdx.x]) + (kTwice ? 2 : 1) * kAdded);
}
template __global__ void add<float, 3>(float*, unsigned);
template __global__ void add<float, 4, true>(float*, unsigned);
template __global__ void add<__half, 3>(__half*, unsigned);
template __global__ void add<__nv_bfloat16, 3>(__nv_bfloat16*, unsigned);

namespace inner {
__device__ int counter;
static __device__ int hidden;
__global__ void count(int* y) { *y = ++counter + ++hidden; }
__global__ void trip(int* y, int index) {
  ++counter;
  y[index] = counter;
}
}  // namespace inner
namespace {
__global__ void unnamed(long long n, double* y) { *y = double(n); }
}  // namespace
void* used() { return reinterpret_cast<void*>(&unnamed); }

// Of these, only the source says the types.
#define KERNEL(name, T) extern "C" __global__ void name(T* x, int64_t n) { x[0] = T(n); }
KERNEL(made_by_a_macro, double)
extern "C" __global__ __launch_bounds__(64) void plain(const float* __restrict__ x,  // (n)
                                                       volatile float* y, int n) {
  for (int i = 0; i < n; ++i) y[i] = x[i];
}
struct Pair {
  float* data;
  int n;
};
extern "C" __global__ void by_struct(Pair pair, __half h, char c, bool b) {
  pair.data[0] = pair.n + __half2float(h) + c + b;
}
