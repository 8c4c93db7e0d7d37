// gelu, forward and backward, and dropout.
//
// Reads each large tensor once and writes the result once, 16 bytes at a time. A thread owns one
// pack of columns and goes through rows, so that its bias and its part of dbias stay in registers;
// without a bias a tensor is one long row. dbias is summed by column_sums afterwards, in order.
#include "../elementwise.h"

#include "philox.cuh"
#include "reduce.cuh"

namespace fastlm::cuda {
namespace {

constexpr int kThreads = 128, kBlocksPerMultiprocessor = 8;

// Threads along x own packs of columns, threads along y rows.
struct Geometry {
  dim3 grid, block;
  int64_t row_groups() const { return int64_t(grid.y) * block.y; }
};

Geometry geometry_for(int64_t rows, int64_t cols, int pack) {
  const int64_t packs = ceil_div(cols, pack);
  unsigned across = 1;
  while (across < packs && across < kThreads) across *= 2;
  const dim3 block(across, kThreads / across);
  const int64_t grid_x = ceil_div(packs, across);
  const int64_t wanted = ceil_div(int64_t(kBlocksPerMultiprocessor) * multiprocessors(), grid_x);
  const int64_t grid_y = least(ceil_div(rows, block.y), least(most(wanted, 1), 65535));
  return {dim3(unsigned(grid_x), unsigned(grid_y)), block};
}

struct Place {  // of this thread
  int64_t column, first_row, row_step;
};
template <class T> __device__ Place place() {
  return {(int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kPack<T>,
          int64_t(blockIdx.y) * blockDim.y + threadIdx.y, int64_t(gridDim.y) * blockDim.y};
}

constexpr float kSqrt2OverPi = 0.7978845608028654f, kCubic = 0.044715f;
constexpr float kSqrtHalf = 0.7071067811865476f, kInverseSqrt2Pi = 0.3989422804014327f;

// 0.5 u (1 + tanh t) with t = sqrt(2/pi) (u + 0.044715 u^3), or 0.5 u (1 + erf(u / sqrt 2)).
__device__ float gelu(float u, bool tanh_form) {
  if (!tanh_form) return 0.5f * u * (1.0f + erff(u * kSqrtHalf));
  return 0.5f * u * (1.0f + tanhf(kSqrt2OverPi * (u + kCubic * u * u * u)));
}

__device__ float gelu_derivative(float u, bool tanh_form) {
  if (!tanh_form)
    return 0.5f * (1.0f + erff(u * kSqrtHalf)) + u * kInverseSqrt2Pi * expf(-0.5f * u * u);
  // Past +-16 the slope is 0, and times u^2 it would not be a number. An infinity gives NaN, as in
  // torch.
  const float v = fminf(fmaxf(u, -16.0f), 16.0f) + (u - u);
  const float t = tanhf(kSqrt2OverPi * (v + kCubic * v * v * v));
  const float inner = kSqrt2OverPi * (1.0f + 3.0f * kCubic * v * v);
  return 0.5f * (1.0f + t) + 0.5f * v * (1.0f - t * t) * inner;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    gelu_forward_kernel(const GeluForward p, const bool vector) {
  const Place at = place<T>();
  const int64_t count = p.cols - at.column;
  if (count <= 0) return;
  float bias[kPack<T>];
  load_parameter<T>(p.bias, p.dtype, at.column, count, vector, 0.0f, bias);
  for (int64_t row = at.first_row; row < p.rows; row += at.row_step) {
    const int64_t element = row * p.cols + at.column;
    float u[kPack<T>];
    load(static_cast<const T*>(p.x) + element, count, vector, u);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) u[i] = gelu(u[i] + bias[i], p.tanh_form);
    store(static_cast<T*>(p.y) + element, count, vector, u);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    gelu_backward_kernel(const GeluBackward p, const bool vector, float* const partial) {
  const Place at = place<T>();
  const int64_t count = p.cols - at.column;
  if (count <= 0) return;
  float bias[kPack<T>], sums[kPack<T>] = {};
  load_parameter<T>(p.bias, p.dtype, at.column, count, vector, 0.0f, bias);
  for (int64_t row = at.first_row; row < p.rows; row += at.row_step) {
    const int64_t element = row * p.cols + at.column;
    float u[kPack<T>], dy[kPack<T>];
    load(static_cast<const T*>(p.x) + element, count, vector, u);
    load(static_cast<const T*>(p.dy) + element, count, vector, dy);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      dy[i] *= gelu_derivative(u[i] + bias[i], p.tanh_form);
      sums[i] += dy[i];
    }
    store(static_cast<T*>(p.dx) + element, count, vector, dy);
  }
  if (!partial) return;
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i)
    if (i < count) partial[at.first_row * p.cols + at.column + i] = sums[i];
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    dropout_kernel(const Dropout p, const DropoutRule rule, const bool vector) {
  const Place at = place<T>();
  const int64_t count = p.cols - at.column;
  if (count <= 0) return;
  for (int64_t row = at.first_row; row < p.rows; row += at.row_step) {
    const int64_t element = row * p.cols + at.column;
    float x[kPack<T>];
    load(static_cast<const T*>(p.x) + element, count, vector, x);
    rule.apply(uint64_t(row), at.column, x);
    store(static_cast<T*>(p.y) + element, count, vector, x);
  }
}

// Whether every pack of every row is 16 bytes at a multiple of 16, but for the last of a single
// row.
template <class T>
bool has_vectors(int64_t rows, int64_t cols, std::initializer_list<const void*> pointers) {
  for (const void* p : pointers)
    if (!is_aligned(p)) return false;
  return rows == 1 || cols % kPack<T> == 0;
}

// Without a bias columns mean nothing.
template <class Params> Params as_one_row(Params p) {
  if (p.bias) return p;
  p.cols *= p.rows;
  p.rows = 1;
  return p;
}

}  // namespace

void launch(const GeluForward& given, int64_t stream) {
  if (given.rows == 0 || given.cols == 0) return;
  const GeluForward p = as_one_row(given);
  for_dtype(p.dtype, "gelu", [&](auto element) {
    using T = decltype(element);
    const Geometry g = geometry_for(p.rows, p.cols, kPack<T>);
    gelu_forward_kernel<T><<<g.grid, g.block, 0, stream_of(stream)>>>(
        p, has_vectors<T>(p.rows, p.cols, {p.x, p.bias, p.y}));
    check_launch("gelu_forward");
  });
}

void launch(const GeluBackward& given, int64_t stream) {
  if (given.cols == 0 || (given.rows == 0 && !given.dbias)) return;
  const GeluBackward p = as_one_row(given);
  for_dtype(p.dtype, "gelu", [&](auto element) {
    using T = decltype(element);
    const Geometry g = geometry_for(p.rows, p.cols, kPack<T>);
    const int64_t parts = p.rows == 0 ? 0 : g.row_groups();
    const Workspace partial(p.dbias ? parts * p.cols : 0, stream_of(stream));
    if (p.rows > 0) {
      gelu_backward_kernel<T><<<g.grid, g.block, 0, stream_of(stream)>>>(
          p, has_vectors<T>(p.rows, p.cols, {p.dy, p.x, p.bias, p.dx}), partial.data());
      check_launch("gelu_backward");
    }
    if (p.dbias)
      launch(ColumnSums{partial.data(), parts, p.cols, {p.dbias, nullptr}, p.dtype},
             stream_of(stream));
  });
}

void launch(const Dropout& p, int64_t stream) {
  if (p.rows == 0 || p.cols == 0) return;
  for_dtype(p.dtype, "dropout", [&](auto element) {
    using T = decltype(element);
    const Geometry g = geometry_for(p.rows, p.cols, kPack<T>);
    dropout_kernel<T><<<g.grid, g.block, 0, stream_of(stream)>>>(
        p, DropoutRule(p.seed, p.p), has_vectors<T>(p.rows, p.cols, {p.x, p.y}));
    check_launch("dropout");
  });
}

}  // namespace fastlm::cuda
