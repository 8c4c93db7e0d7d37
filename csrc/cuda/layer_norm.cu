// layer_norm, add_layer_norm and rms_norm, forward and backward. A row belongs to as many threads
// as give each 16 of its columns or fewer, which stay in registers; a block holds several rows.
//
// Forward reads x (and residual) once and writes y (and z) once: 2 * rows * cols elements of
// traffic (4 with the residual), so the target is copy speed. Statistics take two passes over the
// registers, because E[x^2] - E[x]^2 cancels badly when |mean| >> std (row_statistics.cuh).
//
// Backward reads dy, z (and dz_out) once and writes dz (and dx) once. Its grid is persistent, so
// that a thread's part of dweight and dbias stays in registers; each block writes its sums once,
// and column_sums adds them in order: no atomics, the same bits at every run.
//
// Thread t owns the 16-byte packs t, t + threads, ... of a row. Rows that are no multiple of 16
// bytes, or tensors at odd offsets, go element by element (`vector` false).
//
// Past 8192 columns forward is another kernel (layer_norm_long.cu), and a block of backward has a
// part of each row: blockIdx.y says which, and that kernel's file brings the sums of whole rows.
#include "../layer_norm.h"

#include "../rms_norm.h"
#include "philox.cuh"
#include "row_statistics.cuh"

namespace fastlm::cuda {
void launch_long(const LayerNormForward& p, bool vector, cudaStream_t stream);
void launch_row_sums(const LayerNormBackward& p, bool vector, float2* sums, cudaStream_t stream);

namespace {

constexpr int kValues = 16, kThreads = 256, kMostThreads = 512;
constexpr int64_t kMostInBlock = kMostThreads * kValues, kMostCols = 65536;

template <class T> constexpr int kPacks = kValues / kPack<T>;

dim3 block_for(int64_t cols) {
  const int64_t threads = ceil_div(ceil_div(cols, kValues), 32) * 32;
  return dim3(unsigned(threads), unsigned(most(1, kThreads / threads)));
}

void check_cols(int64_t cols) {
  if (cols > kMostCols)
    throw std::invalid_argument("layer_norm: the CUDA kernels take rows of at most " +
                                std::to_string(kMostCols) + " elements, got " +
                                std::to_string(cols));
}

// Where pack i of this thread starts, and how many of its elements the row has: 0 or less, none.
template <class T> struct Columns {
  int64_t cols, first = 0;
  __device__ int64_t start(int i) const {
    return first + (int64_t(threadIdx.x) + int64_t(i) * blockDim.x) * kPack<T>;
  }
  __device__ int64_t count(int i) const { return cols - start(i); }
};

template <class T>
__global__ void __launch_bounds__(kMostThreads)
    layer_norm_forward_kernel(const LayerNormForward p, const DropoutRule rule, const bool vector) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool live = row < p.rows;  // the others come to the barriers too
  const Columns<T> columns{live ? p.cols : 0};
  const int64_t at = row * p.cols;
  float z[kPacks<T>][kPack<T>], total[1] = {0}, rest_and_squares[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kPacks<T>; ++i) {
    const int64_t start = columns.start(i), count = columns.count(i);
    load(static_cast<const T*>(p.x) + at + start, count, vector, z[i]);
    if (p.residual && count > 0) {
      float residual[kPack<T>];
      load(static_cast<const T*>(p.residual) + at + start, count, vector, residual);
      rule.apply(uint64_t(row), start, z[i]);
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) z[i][j] = rounded<T>(z[i][j] + residual[j]);
      store(static_cast<T*>(p.z) + at + start, count, vector, z[i]);
    }
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) total[0] += z[i][j];
  }
  row_sum(total);
  const float mean = p.mean ? total[0] / float(p.cols) : 0.0f;  // rms_norm keeps none
#pragma unroll
  for (int i = 0; i < kPacks<T>; ++i)
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      const float centered = j < columns.count(i) ? z[i][j] - mean : 0.0f;
      rest_and_squares[0] += centered;
      rest_and_squares[1] += centered * centered;
    }
  row_sum(rest_and_squares);
  const RowStatistics row_of_z(p, mean, rest_and_squares);
#pragma unroll
  for (int i = 0; i < kPacks<T>; ++i) {
    const int64_t start = columns.start(i), count = columns.count(i);
    float weight[kPack<T>], bias[kPack<T>];
    load_parameter<T>(p.weight, p.weight_dtype, start, count, vector, 1.0f, weight);
    load_parameter<T>(p.bias, p.weight_dtype, start, count, vector, 0.0f, bias);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) z[i][j] = row_of_z.h(z[i][j]) * weight[j] + bias[j];
    store(static_cast<T*>(p.y) + at + start, count, vector, z[i]);
  }
  if (live && threadIdx.x == 0) row_of_z.save(p, row);
}

// A thread's part of dweight and dbias.
template <class T> struct ParameterSums {
  float weight[kPacks<T>][kPack<T>] = {}, bias[kPacks<T>][kPack<T>] = {};

  // Adds the sums of the block's other rows to those of its first, and writes them.
  __device__ void write(const Columns<T>& columns, float* partial) {
    extern __shared__ float exchange[];  // (2 * kValues, threads of a row)
    for (unsigned y = 1; y < blockDim.y; ++y) {
      __syncthreads();
      if (threadIdx.y == y) each([&](int slot, float& v) { exchange[slot] = v; });
      __syncthreads();
      if (threadIdx.y == 0) each([&](int slot, float& v) { v += exchange[slot]; });
    }
    if (threadIdx.y != 0) return;
    float* weight_row = partial + int64_t(blockIdx.x) * columns.cols;
    float* bias_row = weight_row + int64_t(gridDim.x) * columns.cols;
#pragma unroll
    for (int i = 0; i < kPacks<T>; ++i)
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) {
        if (j >= columns.count(i)) continue;
        weight_row[columns.start(i) + j] = weight[i][j];
        bias_row[columns.start(i) + j] = bias[i][j];
      }
  }

 private:
  template <class F> __device__ void each(const F& f) {
#pragma unroll
    for (int i = 0; i < kPacks<T>; ++i)
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) {
        const int slot = (i * kPack<T> + j) * int(blockDim.x) + int(threadIdx.x);
        f(slot, weight[i][j]);
        f(slot + kValues * int(blockDim.x), bias[i][j]);
      }
  }
};

template <class T>
__global__ void __launch_bounds__(kMostThreads)
    layer_norm_backward_kernel(const LayerNormBackward p, const DropoutRule rule, const bool vector,
                               const float2* const row_sums, float* const partial) {
  const Columns<T> all{p.cols, int64_t(blockIdx.y) * blockDim.x * kValues};
  ParameterSums<T> sums;
  for (int64_t first = int64_t(blockIdx.x) * blockDim.y; first < p.rows;
       first += int64_t(gridDim.x) * blockDim.y) {
    const int64_t row = first + threadIdx.y, at = row * p.cols;
    const bool live = row < p.rows;
    const Columns<T> columns{live ? p.cols : 0, all.first};
    const float mean = live && p.mean ? static_cast<const float*>(p.mean)[row] : 0.0f;
    const float rstd = live ? static_cast<const float*>(p.rstd)[row] : 0.0f;
    float h[kPacks<T>][kPack<T>], g[kPacks<T>][kPack<T>], averages[2] = {};
#pragma unroll
    for (int i = 0; i < kPacks<T>; ++i) {
      const int64_t start = columns.start(i), count = columns.count(i);
      float weight[kPack<T>];
      load_parameter<T>(p.weight, p.weight_dtype, start, count, vector, 1.0f, weight);
      load(static_cast<const T*>(p.z) + at + start, count, vector, h[i]);
      load(static_cast<const T*>(p.dy) + at + start, count, vector, g[i]);
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) {  // past the row's end g is 0, and what it multiplies
        h[i][j] = (h[i][j] - mean) * rstd;
        sums.weight[i][j] += g[i][j] * h[i][j];
        sums.bias[i][j] += g[i][j];
        // Not fused with what follows: in a single column it must equal its average.
        g[i][j] = __fmul_rn(g[i][j], weight[j]);
        averages[0] += g[i][j];
        averages[1] += g[i][j] * h[i][j];
      }
    }
    if (row_sums) {
      averages[0] = row_sums[row].x;
      averages[1] = row_sums[row].y;
    } else {
      row_sum(averages);
    }
    const float g_mean = p.mean ? averages[0] / float(p.cols) : 0.0f;
    const float gh_mean = averages[1] / float(p.cols);
#pragma unroll
    for (int i = 0; i < kPacks<T>; ++i) {
      const int64_t start = columns.start(i), count = columns.count(i);
      if (count <= 0) continue;
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) g[i][j] = (g[i][j] - g_mean - h[i][j] * gh_mean) * rstd;
      if (p.dz_out) {
        float more[kPack<T>];
        load(static_cast<const T*>(p.dz_out) + at + start, count, vector, more);
#pragma unroll
        for (int j = 0; j < kPack<T>; ++j) g[i][j] += more[j];
      }
      store(static_cast<T*>(p.dz) + at + start, count, vector, g[i]);
      if (!p.dx) continue;
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) g[i][j] = rounded<T>(g[i][j]);
      rule.apply(uint64_t(row), start, g[i]);
      store(static_cast<T*>(p.dx) + at + start, count, vector, g[i]);
    }
  }
  if (partial) sums.write(all, partial);
}

template <class T> void forward(const LayerNormForward& p, cudaStream_t stream) {
  const bool vector =
      p.cols % kPack<T> == 0 && all_aligned({p.x, p.residual, p.y, p.z, p.weight, p.bias});
  if (p.cols > kMostInBlock) return launch_long(p, vector, stream);
  const dim3 block = block_for(p.cols);
  layer_norm_forward_kernel<T><<<unsigned(ceil_div(p.rows, block.y)), block, 0, stream>>>(
      p, DropoutRule(p.seed, p.dropout_p), vector);
  check_launch("layer_norm_forward");
}

template <class T> void backward(const LayerNormBackward& p, cudaStream_t stream) {
  const bool vector =
      p.cols % kPack<T> == 0 && all_aligned({p.dy, p.dz_out, p.z, p.weight, p.dz, p.dx});
  const int64_t parts = ceil_div(p.cols, kMostInBlock);  // of a row
  const dim3 block = block_for(ceil_div(p.cols, parts));
  const int64_t fills = most(1, 2 * multiprocessors() / parts);
  const int64_t blocks = least(ceil_div(p.rows, block.y), fills);
  const bool wants_sums = p.dweight || p.dbias;
  const Workspace partial(wants_sums ? 2 * blocks * p.cols : 0, stream);
  const Workspace row_sums(parts > 1 ? 2 * p.rows : 0, stream);
  if (blocks > 0) {
    auto* const sums = reinterpret_cast<float2*>(row_sums.data());
    if (sums) launch_row_sums(p, vector, sums, stream);
    const auto grid = dim3(unsigned(blocks), unsigned(parts));
    const size_t shared = block.y > 1 ? 2 * kValues * block.x * sizeof(float) : 0;
    layer_norm_backward_kernel<T><<<grid, block, shared, stream>>>(
        p, DropoutRule(p.seed, p.dropout_p), vector, sums, partial.data());
    check_launch("layer_norm_backward");
  }
  if (wants_sums)
    launch(ColumnSums{partial.data(), blocks, p.cols, {p.dweight, p.dbias}, p.weight_dtype},
           stream);
}

}  // namespace

void launch(const LayerNormForward& p, int64_t stream) {
  if (p.rows == 0 || p.cols == 0) return;
  check_cols(p.cols);
  for_dtype(p.dtype, "layer_norm",
            [&](auto element) { forward<decltype(element)>(p, stream_of(stream)); });
}

void launch(const LayerNormBackward& p, int64_t stream) {
  if (p.cols == 0) return;
  check_cols(p.cols);
  for_dtype(p.dtype, "layer_norm",
            [&](auto element) { backward<decltype(element)>(p, stream_of(stream)); });
}

// rms_norm is layer_norm without a mean and a bias.
void launch(const RmsNormForward& p, int64_t stream) {
  launch(LayerNormForward{p.x, nullptr, p.weight, nullptr, nullptr, p.y, nullptr, nullptr, p.rstd,
                          p.rows, p.cols, p.eps, 0.0, p.dtype, p.weight_dtype},
         stream);
}

void launch(const RmsNormBackward& p, int64_t stream) {
  launch(LayerNormBackward{p.dy, nullptr, p.x, p.weight, nullptr, p.rstd, nullptr, p.dx, nullptr,
                           p.dweight, nullptr, p.rows, p.cols, 0.0, p.dtype, p.weight_dtype},
         stream);
}

}  // namespace fastlm::cuda
