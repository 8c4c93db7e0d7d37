// layer_norm of rows that registers do not hold, 8193 to 65536 columns; a block per row.
//
// Forward reads x (and residual) once and writes y (and z) once. The row lies in shared memory for
// the second pass of the statistics and for y: all of it in 16 bits on sm_80 and later (128 KB), in
// float32 as much as the device has, and the rest is read again, from L2.
//
// Backward needs two sums of a whole row before it can write any of it, and cannot hold dy, z and
// the sums of columns of so long a row. So the sums of rows have a kernel of their own here, and
// layer_norm_backward_kernel then takes parts of rows: dy and z are read twice, as torch reads
// them.
//
// Thread t owns the 16-byte packs t, t + threads, ... in every sweep: shared memory needs no
// barrier, and what is read again from global memory this thread has written.
#include "../layer_norm.h"

#include "copy.cuh"
#include "philox.cuh"
#include "row_statistics.cuh"

namespace fastlm::cuda {
namespace {

constexpr int kThreads = 512;

template <class T>
__global__ void __launch_bounds__(kThreads)
    layer_norm_long_forward_kernel(const LayerNormForward p, const DropoutRule rule,
                                   const bool vector, const int held) {
  extern __shared__ __align__(16) unsigned char shared[];
  Pack<T>* const kept = reinterpret_cast<Pack<T>*>(shared);  // packs 0 to held - 1
  const int64_t row = blockIdx.x, at = row * p.cols;
  const T* const x = static_cast<const T*>(p.x) + at;
  const auto sweep = [&](int packs, const auto& f) {
#pragma unroll 1
    for (int i = threadIdx.x; i < packs; i += kThreads)
      f(i, int64_t(i) * kPack<T>, p.cols - int64_t(i) * kPack<T>);
  };
  const auto read = [&](const T* beyond, int i, int64_t count, float(&z)[kPack<T>]) {
    if (i < held)
      load(kept[i].at, kPack<T>, true, z);
    else
      load(beyond + int64_t(i) * kPack<T>, count, vector, z);
  };
  sweep(held, [&](int i, int64_t start, int64_t count) {
    float z[kPack<T>];
    if (vector) return copy_async_16(kept[i].at, x + start, 16);
    load(x + start, count, false, z);
    store(kept[i].at, kPack<T>, true, z);
  });
  commit_copies();
  wait_copies<0>();  // all of the row was under way at once
  const int packs = int((p.cols + kPack<T> - 1) / kPack<T>);
  float total[1] = {0}, rest_and_squares[2] = {0, 0};
  sweep(packs, [&](int i, int64_t start, int64_t count) {
    float z[kPack<T>], residual[kPack<T>];
    read(x, i, count, z);
    if (p.residual) {
      load(static_cast<const T*>(p.residual) + at + start, count, vector, residual);
      rule.apply(uint64_t(row), start, z);
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) z[j] = rounded<T>(z[j] + residual[j]);
      store(static_cast<T*>(p.z) + at + start, count, vector, z);
      if (i < held) store(kept[i].at, kPack<T>, true, z);
    }
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) total[0] += z[j];
  });
  const T* const beyond = p.residual ? static_cast<const T*>(p.z) + at : x;
  row_sum(total);
  const float mean = p.mean ? total[0] / float(p.cols) : 0.0f;  // rms_norm keeps none
  sweep(packs, [&](int i, int64_t, int64_t count) {
    float z[kPack<T>];
    read(beyond, i, count, z);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      const float centered = j < count ? z[j] - mean : 0.0f;
      rest_and_squares[0] += centered;
      rest_and_squares[1] += centered * centered;
    }
  });
  row_sum(rest_and_squares);
  const RowStatistics row_of_z(p, mean, rest_and_squares);
  sweep(packs, [&](int i, int64_t start, int64_t count) {
    float z[kPack<T>], weight[kPack<T>], bias[kPack<T>];
    read(beyond, i, count, z);
    load_parameter<T>(p.weight, p.weight_dtype, start, count, vector, 1.0f, weight);
    load_parameter<T>(p.bias, p.weight_dtype, start, count, vector, 0.0f, bias);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) z[j] = row_of_z.h(z[j]) * weight[j] + bias[j];
    store(static_cast<T*>(p.y) + at + start, count, vector, z);
  });
  if (threadIdx.x == 0) row_of_z.save(p, row);
}

// sums[row] = {sum of g, sum of g * h} with g = dy * weight and h = (z - mean) * rstd. Reads dy and
// z once.
template <class T>
__global__ void __launch_bounds__(kThreads)
    layer_norm_row_sums_kernel(const LayerNormBackward p, const bool vector, float2* const sums) {
  const int64_t row = blockIdx.x, at = row * p.cols;
  const float mean = p.mean ? static_cast<const float*>(p.mean)[row] : 0.0f;
  const float rstd = static_cast<const float*>(p.rstd)[row];
  float both[2] = {};
  for (int64_t start = int64_t(threadIdx.x) * kPack<T>; start < p.cols;
       start += kThreads * kPack<T>) {
    const int64_t count = p.cols - start;
    float h[kPack<T>], g[kPack<T>], weight[kPack<T>];
    load(static_cast<const T*>(p.z) + at + start, count, vector, h);
    load(static_cast<const T*>(p.dy) + at + start, count, vector, g);
    load_parameter<T>(p.weight, p.weight_dtype, start, count, vector, 1.0f, weight);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {  // past the row's end g is 0, and what it multiplies
      g[j] *= weight[j];
      both[0] += g[j];
      both[1] += g[j] * ((h[j] - mean) * rstd);
    }
  }
  row_sum(both);
  if (threadIdx.x == 0) sums[row] = {both[0], both[1]};
}

}  // namespace

void launch_long(const LayerNormForward& p, bool vector, cudaStream_t stream) {
  for_dtype(p.dtype, "layer_norm", [&](auto element) {
    using T = decltype(element);
    const int64_t room = (most_shared() - 1024) / int64_t(sizeof(Pack<T>));
    const int held = int(least(ceil_div(p.cols, kPack<T>), room));
    const int shared = held * int(sizeof(Pack<T>));
    allow_shared(layer_norm_long_forward_kernel<T>, shared, "layer_norm_long_forward");
    layer_norm_long_forward_kernel<T><<<unsigned(p.rows), kThreads, shared, stream>>>(
        p, DropoutRule(p.seed, p.dropout_p), vector, held);
    check_launch("layer_norm_long_forward");
  });
}

void launch_row_sums(const LayerNormBackward& p, bool vector, float2* sums, cudaStream_t stream) {
  for_dtype(p.dtype, "layer_norm", [&](auto element) {
    layer_norm_row_sums_kernel<decltype(element)>
        <<<unsigned(p.rows), kThreads, 0, stream>>>(p, vector, sums);
    check_launch("layer_norm_row_sums");
  });
}

}  // namespace fastlm::cuda
