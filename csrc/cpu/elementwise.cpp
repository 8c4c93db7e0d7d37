// gelu (with its bias) and dropout, forward and backward: each reads its inputs and writes its
// result once, so memory is the floor; about 20 vector instructions per vector stay under it.
#include "../elementwise.h"

#include "elementary.h"
#include "for_dtype.h"
#include "parallel.h"
#include "philox.h"
#include "scratch.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

constexpr double kSqrt2OverPi = 0.7978845608028654, kCubic = 0.044715;
constexpr double kSqrtHalf = 0.7071067811865476, kInverseSqrt2Pi = 0.3989422804014327;

// gate = 0.5 (1 + tanh(a)) = 1 / (1 + e) and 1 - gate = e / (1 + e), with e = 2^(-2 a log2(e)) and
// a = sqrt(2/pi) (u + 0.044715 u^3).
template <class A> struct Gate {
  Vec<A> open, shut;
};
template <class A> FASTLM_INLINE Gate<A> tanh_gate(Vec<A> u) {
  constexpr double kLinear = -2 * kLog2e * kSqrt2OverPi;
  const Vec<A> power = u * (A(kLinear) + A(kLinear * kCubic) * (u * u));
  const Vec<A> e = exp2(power);
  // exp2 stops at 2^127, and the smallest float times a large u is not small.
  const Vec<A> open = power > A(127) ? Vec<A>{} : reciprocal(A(1) + e);
  return {open, e * open};
}

template <class A, bool kTanh> FASTLM_INLINE Vec<A> gelu(Vec<A> u) {
  if constexpr (kTanh)
    return u * tanh_gate<A>(u).open;
  else
    return u * (A(0.5) + A(0.5) * erf(u * A(kSqrtHalf)));
}

template <class A, bool kTanh> FASTLM_INLINE Vec<A> gelu_derivative(Vec<A> u) {
  if constexpr (kTanh) {
    // Past +-16 the gate is 0 or 1 to any precision, and u^2 times a vanished slope is not a
    // number. max gives its second operand where either is NaN.
    // Infinity gives NaN, as in torch.
    const Vec<A> v = max(all(A(-16)), -max(all(A(-16)), -u)) + (u - u);
    const Gate<A> gate = tanh_gate<A>(v);
    const Vec<A> slope = gate.open * gate.shut;
    return gate.open + v * slope * (A(2 * kSqrt2OverPi) * (A(1) + A(3 * kCubic) * v * v));
  } else {
    const Vec<A> density = exp2_bounded(u * u * A(-0.5 * kLog2e)) * A(kInverseSqrt2Pi);
    return A(0.5) + A(0.5) * erf(u * A(kSqrtHalf)) + u * density;
  }
}

template <class A> void widen_bias(const void* bias, DType dtype, int64_t cols, A* out) {
  for (int64_t c = 0; c < cols; ++c) {
    if (!bias)
      out[c] = 0;
    else if (dtype == DType::bf16)
      out[c] = scalar(static_cast<const bf16*>(bias)[c]);
    else
      out[c] = static_cast<const A*>(bias)[c];
  }
}

template <class T, bool kTanh, bool kStream> void forward(const GeluForward& p, int64_t threads) {
  using A = acc_t<T>;
  Scratch<A> bias(p.cols);
  widen_bias(p.bias, p.dtype, p.cols, bias.data());
  const A* b = bias.data();
  parallel_for(p.rows, p.cols * int64_t(sizeof(T)) * 2, threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const T* x = static_cast<const T*>(p.x) + row * p.cols;
      T* y = static_cast<T*>(p.y) + row * p.cols;
      write_row<kStream>(y, p.cols, [&](int64_t c, auto span) __attribute__((always_inline)) {
        prefetch(x + c);
        return gelu<A, kTanh>(load(x + c, span) + load(b + c, span));
      });
    }
    if (kStream) end_of_streaming();
  });
}

template <class T, bool kTanh, bool kStream> void backward(const GeluBackward& p, int64_t threads) {
  using A = acc_t<T>;
  constexpr int64_t kMostBlocks =
      64;  // of rows, each with its own dbias: the same bits with any number of threads
  const int64_t blocks = most(1, least(kMostBlocks, p.rows / 16));
  Scratch<A> scratch((1 + blocks) * p.cols);
  A *b = scratch.data(), *sums = b + p.cols;
  widen_bias(p.bias, p.dtype, p.cols, b);
  memset(sums, 0, size_t(blocks * p.cols) * sizeof(A));
  const int64_t block_bytes = p.rows / blocks * p.cols * int64_t(sizeof(T)) * 3;
  parallel_for(blocks, block_bytes, threads, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      A* dbias = sums + block * p.cols;
      for (int64_t row = p.rows * block / blocks; row < p.rows * (block + 1) / blocks; ++row) {
        const T *x = static_cast<const T*>(p.x) + row * p.cols,
                *dy = static_cast<const T*>(p.dy) + row * p.cols;
        T* dx = static_cast<T*>(p.dx) + row * p.cols;
        write_row<kStream>(dx, p.cols, [&](int64_t c, auto span) __attribute__((always_inline)) {
          prefetch(x + c);
          prefetch(dy + c);
          const Vec<A> d =
              load(dy + c, span) * gelu_derivative<A, kTanh>(load(x + c, span) + load(b + c, span));
          if (p.dbias) store(dbias + c, load(dbias + c, span) + d, span);
          return d;
        });
      }
    }
    if (kStream) end_of_streaming();
  });
  if (!p.dbias) return;
  for (int64_t c = 0; c < p.cols; ++c) {
    A total = 0;
    for (int64_t block = 0; block < blocks; ++block) total += sums[block * p.cols + c];
    put(static_cast<T*>(p.dbias) + c, total);
  }
}

template <class T, bool kStream> void dropout(const Dropout& p, int64_t threads) {
  using A = acc_t<T>;
  constexpr int64_t kStep = 4 * kWords;
  const DropoutRule rule(p.seed, p.p);
  parallel_for(p.rows, p.cols * int64_t(sizeof(T)) * 2, threads, [&](int64_t first, int64_t last) {
    float factors[kStep];
    for (int64_t row = first; row < last; ++row) {
      const T* x = static_cast<const T*>(p.x) + row * p.cols;
      T* y = static_cast<T*>(p.y) + row * p.cols;
      for (int64_t start = 0; start < p.cols; start += kStep) {
        rule.factors(uint64_t(row), start, factors);
        const int64_t length = least(kStep, p.cols - start);
        write_row<kStream>(y + start, length,
                           [&](int64_t i, auto span) __attribute__((always_inline)) {
                             prefetch(x + start + i);
                             return load(x + start + i, span) * rule.load_as<A>(factors + i, span);
                           });
      }
    }
    if (kStream) end_of_streaming();
  });
}

}  // namespace

void launch(const GeluForward& p, int64_t threads) {
  for_dtype(p.dtype, p.rows * p.cols * 4 >= kStreamBytes, [&](auto element, auto stream) {
    using T = decltype(element);
    if (p.tanh_form)
      forward<T, true, stream.value>(p, threads);
    else
      forward<T, false, stream.value>(p, threads);
  });
}

void launch(const GeluBackward& p, int64_t threads) {
  for_dtype(p.dtype, p.rows * p.cols * 4 >= kStreamBytes, [&](auto element, auto stream) {
    using T = decltype(element);
    if (p.tanh_form)
      backward<T, true, stream.value>(p, threads);
    else
      backward<T, false, stream.value>(p, threads);
  });
}

void launch(const Dropout& p, int64_t threads) {
  for_dtype(p.dtype, p.rows * p.cols * 4 >= kStreamBytes, [&](auto element, auto stream) {
    dropout<decltype(element), stream.value>(p, threads);
  });
}

}  // namespace fastlm::cpu::FASTLM_ISA
