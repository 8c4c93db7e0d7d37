// linear for a few rows, where the time is that of reading the weight from memory once.
//
// A core reads fastest in a few streams that each run through memory for long: more, or short ones,
// lose a fifth. So each piece of work goes through its part of the weight in kStreams places at
// once. An out-major weight is split by outputs. An in-major one is split by inputs, into kParts
// whose sums stay in the caches and are added up at the end; with more threads than that, by
// outputs too. A vector of the weight serves up to four rows of x. The order of additions depends
// on neither the number of rows nor of threads: a row's result has the same bits in any batch.
//
// bfloat16 is multiplied in pairs of neighbours, vdpbf16ps, where the processor has it: widening
// would take longer than reading. In-major neighbours are interleaved from two rows of the weight.
#include "../linear.h"

#include "for_dtype.h"
#include "parallel.h"
#include "scratch.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

constexpr int kStreams = 4;
constexpr int64_t kParts = 2;

// sum += w * x over one vector of elements: for bfloat16 pairs, over two.
template <class T> struct Products {
  using X = acc_t<T>;  // what x is read as
  static constexpr int64_t kStep = kLanes<acc_t<T>>;
  template <class Span>
  static FASTLM_INLINE Vec<X> add(Vec<X> sum, const T* w, const X* x, Span span) {
    return sum + load(w, span) * load(x, span);
  }
};
#if defined(__AVX512BF16__)
template <> struct Products<bf16> {
  using X = bf16;
  static constexpr int64_t kStep = 32;
  static FASTLM_INLINE __m512bh pairs(const bf16* p, Full) {
    return bit_cast<__m512bh>(_mm512_loadu_si512(p));
  }
  static FASTLM_INLINE __m512bh pairs(const bf16* p, Part part) {
    return bit_cast<__m512bh>(_mm512_maskz_loadu_epi16(__mmask32((1ull << part.count) - 1), p));
  }
  template <class Span>
  static FASTLM_INLINE Vec<float> add(Vec<float> sum, const bf16* w, const bf16* x, Span span) {
    return bit_cast<Vec<float>>(
        _mm512_dpbf16_ps(bit_cast<__m512>(sum), pairs(w, span), pairs(x, span)));
  }
};
#endif
template <class T> using x_t = typename Products<T>::X;

// ---- out-major ----

// y[r][o] of the outputs o = first + k * stride for k < kOutputs, and kRows rows.
template <class T, int kRows, int kOutputs>
void dot_products(const Linear& p, const x_t<T>* x, int64_t first, int64_t stride, T* y) {
  using A = acc_t<T>;
  const T* weight = static_cast<const T*>(p.weight) + first * p.in_features;
  Vec<A> sums[kOutputs][kRows] = {};
  const auto step = [&](int64_t i, auto span) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int k = 0; k < kOutputs; ++k)
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
        sums[k][r] = Products<T>::add(sums[k][r], weight + k * stride * p.in_features + i,
                                      x + r * p.in_features + i, span);
  };
  int64_t i = 0;
  for (; i + Products<T>::kStep <= p.in_features; i += Products<T>::kStep) step(i, Full{});
  if (i < p.in_features) step(i, Part{p.in_features - i});
  for (int k = 0; k < kOutputs; ++k) {
    const int64_t o = first + k * stride;
    const A bias = p.bias ? A(scalar(static_cast<const T*>(p.bias)[o])) : A(0);
    for (int r = 0; r < kRows; ++r) put(y + r * p.out_features + o, sum<A>(sums[k][r]) + bias);
  }
}

template <class T, int kRows>
void out_major(const Linear& p, const x_t<T>* x, T* y, int64_t threads) {
  parallel_for(p.out_features, p.in_features * int64_t(sizeof(T)), threads,
               [&](int64_t first, int64_t last) {
                 const int64_t each = (last - first) / kStreams;
                 for (int64_t o = first; o < first + each; ++o)
                   dot_products<T, kRows, kStreams>(p, x, o, each, y);
                 for (int64_t o = first + kStreams * each; o < last; ++o)
                   dot_products<T, kRows, 1>(p, x, o, 0, y);
               });
}

// ---- in-major ----

// sums[r][c] += sum over k < kInputs of x[r][i_k] * weight[i_k][c], i_k = i + k * stride, for the
// outputs c from `first` to `last`.
template <class T, int kRows, int kInputs>
void add_inputs(const Linear& p, const acc_t<T>* x, int64_t i, int64_t stride, int64_t first,
                int64_t last, acc_t<T>* sums) {
  using A = acc_t<T>;
  const T* weight = static_cast<const T*>(p.weight) + i * p.out_features + first;
  sweep<A>(last - first, [&](int64_t c, auto span) __attribute__((always_inline)) {
    Vec<A> products[kRows] = {};
#pragma GCC unroll 4
    for (int k = 0; k < kInputs; ++k) {
      const Vec<A> w = load(weight + k * stride * p.out_features + c, span);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) products[r] += w * x[r * p.in_features + i + k * stride];
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      A* at = sums + r * p.out_features + first + c;
      store(at, load(at, span) + products[r], span);
    }
  });
}

// The sums of inputs [from, to), for the outputs from `first` to `last`.
template <class T, int kRows>
void sum_inputs(const Linear& p, const acc_t<T>* x, int64_t from, int64_t to, int64_t first,
                int64_t last, acc_t<T>* sums) {
  const int64_t each = (to - from) / kStreams;
  for (int64_t i = from; i < from + each; ++i)
    add_inputs<T, kRows, kStreams>(p, x, i, each, first, last, sums);
  for (int64_t i = from + kStreams * each; i < to; ++i)
    add_inputs<T, kRows, 1>(p, x, i, 0, first, last, sums);
}

#if defined(__AVX512BF16__)
// 32 outputs as two vectors: what interleaving two rows of the weight gives, and their own order.
FASTLM_INLINE void own_order(float* sums) {
  const __m512 low = _mm512_loadu_ps(sums), high = _mm512_loadu_ps(sums + 16);
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23),
                second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  _mm512_storeu_ps(sums, _mm512_permutex2var_ps(low, first, high));
  _mm512_storeu_ps(sums + 16, _mm512_permutex2var_ps(low, second, high));
}

// The same for bfloat16, two neighbouring inputs at a time; whole blocks of 32 outputs.
template <int kRows>
void sum_pairs(const Linear& p, const bf16* x, int64_t from, int64_t to, int64_t first,
               int64_t last, float* sums) {
  const int64_t each = (to - from) / kStreams, width = p.out_features;
  for (int64_t i = from; i < from + each; i += 2)
    for (int64_t c = first; c < last; c += 32) {
      __m512 low[kRows], high[kRows];
      for (int r = 0; r < kRows; ++r) {
        low[r] = _mm512_loadu_ps(sums + r * width + c);
        high[r] = _mm512_loadu_ps(sums + r * width + c + 16);
      }
#pragma GCC unroll 4
      for (int k = 0; k < kStreams; ++k) {
        const int64_t input = i + k * each;
        const bf16* row = static_cast<const bf16*>(p.weight) + input * width + c;
        const __m512i even = _mm512_loadu_si512(row), odd = _mm512_loadu_si512(row + width);
        const __m512bh w_low = bit_cast<__m512bh>(_mm512_unpacklo_epi16(even, odd)),
                       w_high = bit_cast<__m512bh>(_mm512_unpackhi_epi16(even, odd));
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          int32_t pair;
          memcpy(&pair, x + r * p.in_features + input, sizeof pair);
          const __m512bh both = bit_cast<__m512bh>(_mm512_set1_epi32(pair));
          low[r] = _mm512_dpbf16_ps(low[r], w_low, both);
          high[r] = _mm512_dpbf16_ps(high[r], w_high, both);
        }
      }
      for (int r = 0; r < kRows; ++r) {
        _mm512_storeu_ps(sums + r * width + c, low[r]);
        _mm512_storeu_ps(sums + r * width + c + 16, high[r]);
      }
    }
  for (int r = 0; r < kRows; ++r)
    for (int64_t c = first; c < last; c += 32) own_order(sums + r * width + c);
}
#endif

template <class T, int kRows>
void in_major(const Linear& p, const x_t<T>* x, T* y, int64_t threads) {
  using A = acc_t<T>;
  constexpr int64_t kBlock = 32;  // outputs
  const int64_t blocks = ceil_div(p.out_features, kBlock), slices = ceil_div(threads, kParts);
  const int64_t size = kRows * p.out_features;
  Scratch<A> scratch(kParts * size + kRows * p.in_features);
  A *sums = scratch.data(), *wide = sums + kParts * size;
  memset(sums, 0, size_t(kParts * size) * sizeof(A));
  bool pairs = false;
  if constexpr (__is_same(x_t<T>, bf16))
    pairs = p.in_features % (2 * kStreams * kParts) == 0 && p.out_features % kBlock == 0;
  if (!pairs)
    sweep<A>(kRows * p.in_features, [&](int64_t i, auto span) __attribute__((always_inline)) {
      store(wide + i, load(x + i, span), span);
    });
  const int64_t piece_bytes = p.in_features / kParts * p.out_features / slices * int64_t(sizeof(T));
  parallel_for(kParts * slices, piece_bytes, threads, [&](int64_t from, int64_t to) {
    for (int64_t piece = from; piece < to; ++piece) {
      const int64_t part = piece / slices, slice = piece % slices;
      const int64_t i = p.in_features * part / kParts, end = p.in_features * (part + 1) / kParts;
      const int64_t first = blocks * slice / slices * kBlock,
                    last = least(blocks * (slice + 1) / slices * kBlock, p.out_features);
#if defined(__AVX512BF16__)
      if constexpr (__is_same(T, bf16))
        if (pairs) {
          sum_pairs<kRows>(p, x, i, end, first, last, sums + part * size);
          continue;
        }
#endif
      sum_inputs<T, kRows>(p, wide, i, end, first, last, sums + part * size);
    }
  });
  const T* bias = static_cast<const T*>(p.bias);
  for (int r = 0; r < kRows; ++r)
    sweep<A>(p.out_features, [&](int64_t c, auto span) __attribute__((always_inline)) {
      Vec<A> total = bias ? load(bias + c, span) : Vec<A>{};
      for (int64_t part = 0; part < kParts; ++part)
        total += load(sums + part * size + r * p.out_features + c, span);
      store(y + r * p.out_features + c, total, span);
    });
}

template <class T> void run(const Linear& p, int64_t threads) {
  Scratch<x_t<T>> read(p.rows * p.in_features);
  for (int64_t i = 0; i < p.rows * p.in_features; ++i)
    if constexpr (__is_same(x_t<T>, T))
      read.data()[i] = static_cast<const T*>(p.x)[i];
    else
      read.data()[i] = scalar(static_cast<const T*>(p.x)[i]);
  int64_t r = 0;
  const auto go = [&](auto rows) {
    const x_t<T>* x = read.data() + r * p.in_features;
    T* y = static_cast<T*>(p.y) + r * p.out_features;
    if (p.in_major)
      in_major<T, rows.index>(p, x, y, threads);
    else
      out_major<T, rows.index>(p, x, y, threads);
    r += rows.index;
  };
  while (r + 4 <= p.rows) go(Way<4>{});
  if (p.rows - r >= 2) go(Way<2>{});
  if (p.rows - r >= 1) go(Way<1>{});
}

}  // namespace

void launch(const Linear& p, int64_t threads) {
  if (p.rows == 0 || p.out_features == 0) return;
  for_dtype(p.dtype, false, [&](auto element, auto) { run<decltype(element)>(p, threads); });
}

}  // namespace fastlm::cpu::FASTLM_ISA
