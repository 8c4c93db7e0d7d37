// rms_norm, forward and backward, a row at a time.
//
// Forward reads x from memory once and writes y once; the row is in L1 for its second pass.
// Backward reads dy and x once, writes dx once, and keeps the column sums of a block of rows in L1.
// The blocks depend on the shape alone and are added in order, so the result has the same bits with
// any number of threads.
#include "../rms_norm.h"

#include "for_dtype.h"
#include "parallel.h"
#include "parameter_row.h"
#include "scratch.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

template <class T, bool kStream> void forward(const RmsNormForward& p, int64_t threads) {
  using A = acc_t<T>;
  Scratch<A> parameters(p.cols);
  A* weight = parameters.data();
  widen_row<A>(p.weight, p.weight_dtype, p.cols, A(1), weight);
  parallel_for(p.rows, p.cols * int64_t(sizeof(T)) * 2, threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const T* x = static_cast<const T*>(p.x) + row * p.cols;
      Vec<A> squares[kWays] = {};
      sweep_ways<A>(p.cols, [&](int64_t c, auto span, auto way) __attribute__((always_inline)) {
        const Vec<A> value = load(x + c, span);
        squares[way.index] += value * value;
      });
      const A rstd = A(1) / A(__builtin_sqrt(double(sum<A>(squares) / A(p.cols)) + p.eps));
      write_row<kStream>(static_cast<T*>(p.y) + row * p.cols, p.cols,
                         [&](int64_t c, auto span) __attribute__((always_inline)) {
                           return load(x + c, span) * rstd * load(weight + c, span);
                         });
      static_cast<A*>(p.rstd)[row] = rstd;
    }
    if (kStream) end_of_streaming();
  });
}

// dx of one row, adding its part of dweight to the block's sums.
template <class T, bool kStream>
void backward_row(const RmsNormBackward& p, int64_t row, const acc_t<T>* weight,
                  acc_t<T>* dweight) {
  using A = acc_t<T>;
  const T *dy = static_cast<const T*>(p.dy) + row * p.cols,
          *x = static_cast<const T*>(p.x) + row * p.cols;
  const A rstd = static_cast<const A*>(p.rstd)[row];
  Vec<A> total = {};
  sweep<A>(p.cols, [&](int64_t c, auto span) __attribute__((always_inline)) {
    const Vec<A> dh = load(dy + c, span) * (load(x + c, span) * rstd);  // dead lanes are 0
    total += dh * load(weight + c, span);
    store(dweight + c, load(dweight + c, span) + dh, span);
  });
  const A gh_mean = sum<A>(total) / A(p.cols);
  write_row<kStream>(static_cast<T*>(p.dx) + row * p.cols, p.cols,
                     [&](int64_t c, auto span) __attribute__((always_inline)) {
                       const Vec<A> h = load(x + c, span) * rstd;
                       const Vec<A> g = load(dy + c, span) * load(weight + c, span);
                       return (g - h * gh_mean) * rstd;
                     });
}

template <class T, bool kStream> void backward(const RmsNormBackward& p, int64_t threads) {
  using A = acc_t<T>;
  constexpr int64_t kMostBlocks = 64;
  const int64_t blocks = most(1, least(kMostBlocks, p.rows / 16));
  Scratch<A> scratch((1 + blocks) * p.cols);
  A *weight = scratch.data(), *sums = weight + p.cols;
  widen_row<A>(p.weight, p.weight_dtype, p.cols, A(1), weight);
  memset(sums, 0, size_t(blocks * p.cols) * sizeof(A));
  const int64_t block_bytes = p.rows / blocks * p.cols * int64_t(sizeof(T)) * 3;
  parallel_for(blocks, block_bytes, threads, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block)
      for (int64_t row = p.rows * block / blocks; row < p.rows * (block + 1) / blocks; ++row)
        backward_row<T, kStream>(p, row, weight, sums + block * p.cols);
    if (kStream) end_of_streaming();
  });
  for (int64_t block = 1; block < blocks; ++block)
    for (int64_t c = 0; c < p.cols; ++c) sums[c] += sums[block * p.cols + c];
  if (p.dweight) narrow_row(sums, p.weight_dtype, p.cols, p.dweight);
}

}  // namespace

void launch(const RmsNormForward& p, int64_t threads) {
  if (p.rows == 0 || p.cols == 0) return;
  for_dtype(p.dtype, p.rows * p.cols * 4 >= kStreamBytes, [&](auto element, auto stream) {
    forward<decltype(element), stream.value>(p, threads);
  });
}

void launch(const RmsNormBackward& p, int64_t threads) {
  if (p.cols == 0) return;
  for_dtype(p.dtype, p.rows * p.cols * 4 >= kStreamBytes, [&](auto element, auto stream) {
    backward<decltype(element), stream.value>(p, threads);
  });
}

}  // namespace fastlm::cpu::FASTLM_ISA
