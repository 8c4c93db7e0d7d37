// Cross-entropy of bf16 logits, one block of 256 threads per row; the gradient overwrites the
// logits.
#include <cuda_bf16.h>

constexpr int kThreads = 256, kWarps = kThreads / 32;

template <bool kBarrier>
__device__ void row_loss(__nv_bfloat16* logits, const int* target, float* loss, int classes,
                         float scale) {
  __shared__ float peaks[kWarps], sums[kWarps];
  __nv_bfloat16* row = logits + size_t(blockIdx.x) * classes;
  const int wanted = target[blockIdx.x];
  float peak = -INFINITY, sum = 0;
  for (int i = threadIdx.x; i < classes; i += kThreads) {
    const float x = __bfloat162float(row[i]);
    if (x > peak) sum *= __expf(peak - x), peak = x;
    sum += __expf(x - peak);
  }
  for (int offset = 16; offset; offset >>= 1) {
    const float other_peak = __shfl_xor_sync(~0u, peak, offset),
                other_sum = __shfl_xor_sync(~0u, sum, offset);
    const float both = fmaxf(peak, other_peak);
    sum = sum * __expf(peak - both) + other_sum * __expf(other_peak - both);
    peak = both;
  }
  if (threadIdx.x % 32 == 0) peaks[threadIdx.x / 32] = peak, sums[threadIdx.x / 32] = sum;
  __syncthreads();
  peak = -INFINITY, sum = 0;
  for (int w = 0; w < kWarps; ++w) peak = fmaxf(peak, peaks[w]);
  for (int w = 0; w < kWarps; ++w) sum += sums[w] * __expf(peaks[w] - peak);
  if (threadIdx.x == 0) loss[blockIdx.x] = peak + __logf(sum) - __bfloat162float(row[wanted]);
  if (kBarrier) __syncthreads();  // row[wanted] is read above and overwritten below
  const float inverse = 1 / sum;
  for (int i = threadIdx.x; i < classes; i += kThreads) {
    const float p = __expf(__bfloat162float(row[i]) - peak) * inverse;
    row[i] = __float2bfloat16((p - (i == wanted)) * scale);
  }
}

extern "C" __global__ void cross_entropy(__nv_bfloat16* logits, const int* target, float* loss,
                                         int classes, float scale) {
  row_loss<true>(logits, target, loss, classes, scale);
}
extern "C" __global__ void cross_entropy_no_barrier(__nv_bfloat16* logits, const int* target,
                                                    float* loss, int classes, float scale) {
  row_loss<false>(logits, target, loss, classes, scale);
}
