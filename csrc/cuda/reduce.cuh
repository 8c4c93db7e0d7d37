// Sums and maxima over warps, rows and columns, in an order that depends on the launch alone.
#pragma once

#include "vec.cuh"

namespace fastlm::cuda {

__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) v += __shfl_xor_sync(~0u, v, lane);
  return v;
}
__device__ inline float warp_max(float v) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, lane));
  return v;
}

// Sums over the threads that share threadIdx.y, which are whole warps; every thread gets them.
// Every thread of the block must come.
template <int kCount> __device__ void row_sum(float (&v)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = warp_sum(v[i]);
  if (blockDim.x == 32) return;
  __shared__ float of_warp[32][kCount];
  const int warps = blockDim.x / 32, first = threadIdx.y * warps;
  if (threadIdx.x % 32 == 0)
    for (int i = 0; i < kCount; ++i) of_warp[first + threadIdx.x / 32][i] = v[i];
  __syncthreads();
  for (int i = 0; i < kCount; ++i) v[i] = 0;
  for (int w = 0; w < warps; ++w)
    for (int i = 0; i < kCount; ++i) v[i] += of_warp[first + w][i];
  __syncthreads();  // of_warp is used again
}

// The second phase of sums over rows: out = sum over `parts` rows of partial, for up to two
// results.
struct ColumnSums {
  const float* partial;  // (results, parts, cols)
  int64_t parts, cols;
  void* out[2];  // null: not wanted
  DType dtype;
};
void launch(const ColumnSums& p, cudaStream_t stream);

}  // namespace fastlm::cuda
