// layer_norm with one block of 128 threads per row: an ordinary fused kernel, right and with
// faults.
#include <cuda_runtime.h>

constexpr int kThreads = 128, kWarps = kThreads / 32;

enum class Fault { kNone, kNoBarrier, kSharedOverrun, kGlobalOverrun, kNoAtomic };

template <Fault kFault> __device__ float block_sum(float value, float* partial) {
  for (int offset = 16; offset; offset >>= 1) value += __shfl_xor_sync(~0u, value, offset);
  __syncthreads();  // partial may still be read for the sum before
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  if (kFault != Fault::kNoBarrier) __syncthreads();
  value = 0;
  for (int w = 0; w < kWarps; ++w) value += partial[w];
  return value;
}

template <Fault kFault>
__device__ void forward_row(const float* x, const float* weight, const float* bias, float* y,
                            int cols, float eps) {
  __shared__ float partial[kFault == Fault::kSharedOverrun ? kWarps - 1 : kWarps];
  const float4* in = reinterpret_cast<const float4*>(x + size_t(blockIdx.x) * cols);
  const bool overruns = kFault == Fault::kGlobalOverrun && blockIdx.x + 1 == gridDim.x;
  const int packs = cols / 4 + overruns;
  float sum = 0, squares = 0;
  for (int i = threadIdx.x; i < packs; i += kThreads) {
    const float4 v = in[i];
    sum += v.x + v.y + v.z + v.w;
  }
  const float mean = block_sum<kFault>(sum, partial) / cols;
  for (int i = threadIdx.x; i < cols / 4; i += kThreads) {
    const float4 v = in[i], c = {v.x - mean, v.y - mean, v.z - mean, v.w - mean};
    squares += c.x * c.x + c.y * c.y + c.z * c.z + c.w * c.w;
  }
  const float rstd = rsqrtf(block_sum<kFault>(squares, partial) / cols + eps);
  for (int i = threadIdx.x; i < cols / 4; i += kThreads) {
    const float4 v = in[i], w = reinterpret_cast<const float4*>(weight)[i],
                 b = reinterpret_cast<const float4*>(bias)[i];
    reinterpret_cast<float4*>(y + size_t(blockIdx.x) * cols)[i] = {
        (v.x - mean) * rstd * w.x + b.x, (v.y - mean) * rstd * w.y + b.y,
        (v.z - mean) * rstd * w.z + b.z, (v.w - mean) * rstd * w.w + b.w};
  }
}

#define FORWARD(NAME, FAULT)                                                              \
  extern "C" __global__ void NAME(const float* x, const float* weight, const float* bias, \
                                  float* y, int cols, float eps) {                        \
    forward_row<FAULT>(x, weight, bias, y, cols, eps);                                    \
  }
FORWARD(layer_norm_forward, Fault::kNone)
FORWARD(layer_norm_no_barrier, Fault::kNoBarrier)
FORWARD(layer_norm_shared_overrun, Fault::kSharedOverrun)
FORWARD(layer_norm_global_overrun, Fault::kGlobalOverrun)

// dweight[c] = sum over rows of dy * (x - mean) * rstd, here with mean 0 and rstd 1; dbias
// likewise.
template <Fault kFault>
__device__ void accumulate(const float* x, const float* dy, float* dweight, float* dbias,
                           int cols) {
  const size_t row = blockIdx.x;
  for (int i = threadIdx.x; i < cols; i += kThreads) {
    const float grad = dy[row * cols + i] * x[row * cols + i];
    if (kFault == Fault::kNoAtomic)
      dweight[i] += grad;
    else
      atomicAdd(&dweight[i], grad);
    atomicAdd(&dbias[i], dy[row * cols + i]);
  }
}
extern "C" __global__ void layer_norm_dweight(const float* x, const float* dy, float* dweight,
                                              float* dbias, int cols) {
  accumulate<Fault::kNone>(x, dy, dweight, dbias, cols);
}
extern "C" __global__ void layer_norm_dweight_no_atomic(const float* x, const float* dy,
                                                        float* dweight, float* dbias, int cols) {
  accumulate<Fault::kNoAtomic>(x, dy, dweight, dbias, cols);
}
