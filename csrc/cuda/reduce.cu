// out[c] = sum over parts of partial[part][c]: the second phase of every sum over rows.
//
// Reads partial once, writes out once. A block owns 32 columns; its 32 warps take every 32nd part,
// and their sums are added in the order of the warps: the same bits at every run.
#include "reduce.cuh"

namespace fastlm::cuda {
namespace {

constexpr int kColumns = 32, kWarps = 32;

__global__ void __launch_bounds__(kColumns* kWarps) column_sums_kernel(const ColumnSums p) {
  __shared__ float sums[kWarps][kColumns + 1];
  const int64_t column = int64_t(blockIdx.x) * kColumns + threadIdx.x;
  const float* partial = p.partial + int64_t(blockIdx.y) * p.parts * p.cols;
  float sum = 0;
  if (column < p.cols)
    for (int64_t part = threadIdx.y; part < p.parts; part += kWarps)
      sum += partial[part * p.cols + column];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  void* out = blockIdx.y == 0 ? p.out[0] : p.out[1];
  if (threadIdx.y != 0 || column >= p.cols || !out) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w][threadIdx.x];
  if (p.dtype == DType::f32)
    static_cast<float*>(out)[column] = sum;
  else if (p.dtype == DType::bf16)
    static_cast<bf16*>(out)[column] = narrow<bf16>(sum);
  else
    static_cast<f16*>(out)[column] = narrow<f16>(sum);
}

}  // namespace

void launch(const ColumnSums& p, cudaStream_t stream) {
  const dim3 grid(unsigned(ceil_div(p.cols, kColumns)), p.out[1] ? 2 : 1);
  column_sums_kernel<<<grid, dim3(kColumns, kWarps), 0, stream>>>(p);
  check_launch("column_sums");
}

}  // namespace fastlm::cuda
