// layer_norm and add_layer_norm, forward and backward, a row at a time.
//
// Forward reads x (and residual) from memory once and writes y (and z) once; the row is in L1 for
// the two passes of its statistics, because E[x^2] - E[x]^2 cancels badly when |mean| >> std. The
// second pass also finds what the mean was rounded by: without that, a constant row would not give
// 0. Backward reads dy and z once, writes dz once, and keeps the column sums of a block of rows in
// L1. The blocks depend on the shape alone and are added in order, so the result has the same bits
// with any number of threads.
#include "../layer_norm.h"

#include "for_dtype.h"
#include "parallel.h"
#include "parameter_row.h"
#include "philox.h"
#include "scratch.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

// out = x * keep / (1 - p) + residual (or without it), for one row.
template <class T>
void dropout_row(const T* x, const T* residual, const DropoutRule& rule, int64_t row, int64_t cols,
                 T* out) {
  using A = acc_t<T>;
  constexpr int64_t kStep = 4 * kWords;
  float factors[kStep];
  for (int64_t start = 0; start < cols; start += kStep) {
    rule.factors(uint64_t(row), start, factors);
    sweep<A>(least(kStep, cols - start), [&](int64_t i, auto span) __attribute__((always_inline)) {
      const Vec<A> kept = load(x + start + i, span) * rule.load_as<A>(factors + i, span);
      store(out + start + i, residual ? kept + load(residual + start + i, span) : kept, span);
    });
  }
}

template <class T> void add_row(const T* x, const T* residual, int64_t cols, T* out) {
  sweep<acc_t<T>>(cols, [&](int64_t c, auto span) __attribute__((always_inline)) {
    store(out + c, load(x + c, span) + load(residual + c, span), span);
  });
}

template <class T, bool kStream>
void normalize_row(const T* z, const acc_t<T>* weight, const acc_t<T>* bias, int64_t cols,
                   double eps, T* y, acc_t<T>* mean_out, acc_t<T>* rstd_out) {
  using A = acc_t<T>;
  Vec<A> total[kWays] = {}, rest[kWays] = {}, squares[kWays] = {};
  sweep_ways<A>(cols, [&](int64_t c, auto span, auto way) __attribute__((always_inline)) {
    total[way.index] += load(z + c, span);
  });
  const A rounded_mean = sum<A>(total) / A(cols);
  sweep_ways<A>(cols, [&](int64_t c, auto span, auto way) __attribute__((always_inline)) {
    const Vec<A> centered = live<A>(load(z + c, span) - rounded_mean, span);
    rest[way.index] += centered;
    squares[way.index] += centered * centered;
  });
  // What the first mean was rounded by. In a constant row it is all that the row differs by.
  const A mean_rest = sum<A>(rest) / A(cols);
  // Fused: where both terms overflow it is inf, and not inf - inf.
  const double variance = __builtin_fma(-mean_rest, mean_rest, sum<A>(squares) / A(cols));
  const A rstd = A(1) / A(__builtin_sqrt((variance < 0 ? 0.0 : variance) + eps));
  write_row<kStream>(y, cols, [&](int64_t c, auto span) __attribute__((always_inline)) {
    const Vec<A> centered = (load(z + c, span) - rounded_mean) - mean_rest;
    return centered * rstd * load(weight + c, span) + load(bias + c, span);
  });
  *mean_out = rounded_mean + mean_rest;
  *rstd_out = rstd;
}

template <class T, bool kStream> void forward(const LayerNormForward& p, int64_t threads) {
  using A = acc_t<T>;
  Scratch<A> parameters(2 * p.cols);
  A *weight = parameters.data(), *bias = weight + p.cols;
  widen_row<A>(p.weight, p.weight_dtype, p.cols, A(1), weight);
  widen_row<A>(p.bias, p.weight_dtype, p.cols, A(0), bias);
  const DropoutRule rule(p.seed, p.dropout_p);
  parallel_for(p.rows, p.cols * int64_t(sizeof(T)) * 2, threads, [&](int64_t first, int64_t last) {
    // The sum is made in a row that stays in L1, so that both results can be streamed.
    Scratch<T> sum_row(p.residual ? p.cols : 1);
    for (int64_t row = first; row < last; ++row) {
      const int64_t at = row * p.cols;
      const T* z = static_cast<const T*>(p.x) + at;
      if (p.residual) {
        const T* residual = static_cast<const T*>(p.residual) + at;
        if (p.dropout_p > 0)
          dropout_row(z, residual, rule, row, p.cols, sum_row.data());
        else
          add_row(z, residual, p.cols, sum_row.data());
        z = sum_row.data();
        write_row<kStream>(static_cast<T*>(p.z) + at, p.cols,
                           [&](int64_t c, auto span)
                               __attribute__((always_inline)) { return load(z + c, span); });
      }
      normalize_row<T, kStream>(z, weight, bias, p.cols, p.eps, static_cast<T*>(p.y) + at,
                                static_cast<A*>(p.mean) + row, static_cast<A*>(p.rstd) + row);
    }
    if (kStream) end_of_streaming();
  });
}

// dz of kRows rows, adding their part of dweight and dbias to the block's sums. Two rows at a time
// halve the traffic of those sums between L1 and registers, which is most of what a row costs.
template <class T, bool kStream, int kRows>
void backward_rows(const LayerNormBackward& p, int64_t row, const acc_t<T>* weight,
                   acc_t<T>* dweight, acc_t<T>* dbias) {
  using A = acc_t<T>;
  const T *dy[kRows], *z[kRows];
  A mean[kRows], rstd[kRows];
  for (int r = 0; r < kRows; ++r) {
    dy[r] = static_cast<const T*>(p.dy) + (row + r) * p.cols;
    z[r] = static_cast<const T*>(p.z) + (row + r) * p.cols;
    mean[r] = static_cast<const A*>(p.mean)[row + r];
    rstd[r] = static_cast<const A*>(p.rstd)[row + r];
  }
  Vec<A> g_total[kRows] = {}, gh_total[kRows] = {};
  sweep<A>(p.cols, [&](int64_t c, auto span) __attribute__((always_inline)) {
    const Vec<A> w = load(weight + c, span);
    Vec<A> dweight_sum = load(dweight + c, span), dbias_sum = load(dbias + c, span);
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      const Vec<A> d = load(dy[r] + c, span);  // dead lanes are 0, and so is what follows from them
      const Vec<A> dh = d * ((load(z[r] + c, span) - mean[r]) * rstd[r]);
      g_total[r] += d * w;
      gh_total[r] += dh * w;
      dweight_sum += dh;
      dbias_sum += d;
    }
    store(dweight + c, dweight_sum, span);
    store(dbias + c, dbias_sum, span);
  });
  for (int r = 0; r < kRows; ++r) {
    const A g_mean = sum<A>(g_total[r]) / A(p.cols), gh_mean = sum<A>(gh_total[r]) / A(p.cols);
    const T* dz_out = p.dz_out ? static_cast<const T*>(p.dz_out) + (row + r) * p.cols : nullptr;
    T* dz = static_cast<T*>(p.dz) + (row + r) * p.cols;
    write_row<kStream>(dz, p.cols, [&](int64_t c, auto span) __attribute__((always_inline)) {
      const Vec<A> h = (load(z[r] + c, span) - mean[r]) * rstd[r];
      // Rounded as in the average, so that the difference from it is exactly 0 in a single column.
      const Vec<A> g = rounded(load(dy[r] + c, span) * load(weight + c, span));
      const Vec<A> d = (g - g_mean - h * gh_mean) * rstd[r];
      return dz_out ? d + load(dz_out + c, span) : d;
    });
  }
}

// The gradient of x too, where it differs from dz because x was dropped out: from dz while that is
// in the cache.
template <class T, bool kStream, int kRows>
void backward_and_dropout(const LayerNormBackward& p, const DropoutRule& rule, int64_t row,
                          const acc_t<T>* weight, acc_t<T>* dweight, acc_t<T>* dbias) {
  if (!p.dx) return backward_rows<T, kStream, kRows>(p, row, weight, dweight, dbias);
  backward_rows<T, false, kRows>(p, row, weight, dweight, dbias);
  for (int64_t r = row; r < row + kRows; ++r)
    dropout_row<T>(static_cast<const T*>(p.dz) + r * p.cols, nullptr, rule, r, p.cols,
                   static_cast<T*>(p.dx) + r * p.cols);
}

template <class T, bool kStream> void backward(const LayerNormBackward& p, int64_t threads) {
  using A = acc_t<T>;
  constexpr int64_t kMostBlocks = 64;
  const int64_t blocks = most(1, least(kMostBlocks, p.rows / 16));
  Scratch<A> scratch((1 + 2 * blocks) * p.cols);
  A *weight = scratch.data(), *sums = weight + p.cols;
  widen_row<A>(p.weight, p.weight_dtype, p.cols, A(1), weight);
  memset(sums, 0, size_t(2 * blocks * p.cols) * sizeof(A));
  const DropoutRule rule(p.seed, p.dropout_p);
  const int64_t block_bytes = p.rows / blocks * p.cols * int64_t(sizeof(T)) * 3;
  parallel_for(blocks, block_bytes, threads, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      A *dweight = sums + 2 * block * p.cols, *dbias = dweight + p.cols;
      const int64_t end = p.rows * (block + 1) / blocks;
      int64_t row = p.rows * block / blocks;
      for (; row + 2 <= end; row += 2)
        backward_and_dropout<T, kStream, 2>(p, rule, row, weight, dweight, dbias);
      if (row < end) backward_and_dropout<T, kStream, 1>(p, rule, row, weight, dweight, dbias);
    }
    if (kStream) end_of_streaming();
  });
  for (int64_t block = 1; block < blocks; ++block)
    for (int64_t c = 0; c < 2 * p.cols; ++c) sums[c] += sums[2 * block * p.cols + c];
  if (p.dweight) narrow_row(sums, p.weight_dtype, p.cols, p.dweight);
  if (p.dbias) narrow_row(sums + p.cols, p.weight_dtype, p.cols, p.dbias);
}

}  // namespace

void launch(const LayerNormForward& p, int64_t threads) {
  if (p.rows == 0 || p.cols == 0) return;
  for_dtype(p.dtype, p.rows * p.cols * 4 >= kStreamBytes, [&](auto element, auto stream) {
    forward<decltype(element), stream.value>(p, threads);
  });
}

void launch(const LayerNormBackward& p, int64_t threads) {
  if (p.cols == 0) return;
  for_dtype(p.dtype, p.rows * p.cols * 4 >= kStreamBytes, [&](auto element, auto stream) {
    backward<decltype(element), stream.value>(p, threads);
  });
}

}  // namespace fastlm::cpu::FASTLM_ISA
