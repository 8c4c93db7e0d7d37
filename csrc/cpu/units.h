// What matrix products multiply. A Unit is an element in the type that sums are kept in or, where
// the processor has vdpbf16ps, two bfloat16 neighbours along the depth.
#pragma once

#include "simd.h"

namespace fastlm::cpu::FASTLM_ISA {

// What a product multiplies: A is what it adds up in, Unit what one lane of a vector holds, Stored
// what b's rows are read from.
template <class T, class S = T> struct Elements {
  using A = T;
  using Unit = T;
  using Stored = S;
  static FASTLM_INLINE Vec<T> row(const S* p) { return load(p); }
  static FASTLM_INLINE Vec<A> add(Vec<A> sum, Unit element, Vec<Unit> row) {
    return sum + all(element) * row;
  }
};

// How T is read into Units: from neighbours along the depth, or across it.
template <class T> struct Kind : Elements<acc_t<T>, T> {
  using Unit = acc_t<T>;
  static constexpr int64_t kElements = 1;  // of a Unit
  static FASTLM_INLINE Vec<Unit> along(const T* p, int64_t left) {
    return left >= kLanes<Unit> ? load(p) : load(p, Part{left});
  }
  template <int kVectors>
  static FASTLM_INLINE void across(Vec<Unit> (&out)[kVectors], const T* p, int64_t lanes,
                                   const T*) {
#pragma GCC unroll 2
    for (int64_t v = 0; v < kVectors; ++v, p += kLanes<Unit>, lanes -= kLanes<Unit>)
      out[v] = lanes >= kLanes<Unit> ? load(p) : lanes > 0 ? load(p, Part{lanes}) : Vec<Unit>{};
  }
};

#if defined(__AVX512BF16__)
template <> struct Kind<bf16> {
  using A = float;
  using Unit = uint32_t;
  using Stored = Unit;
  static constexpr int64_t kElements = 2;
  static FASTLM_INLINE Vec<uint32_t> row(const uint32_t* p) {
    Vec<uint32_t> v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static FASTLM_INLINE Vec<float> add(Vec<float> sum, uint32_t pair, Vec<uint32_t> row) {
    return bit_cast<Vec<float>>(_mm512_dpbf16_ps(
        bit_cast<__m512>(sum), bit_cast<__m512bh>(all(pair)), bit_cast<__m512bh>(row)));
  }
  static FASTLM_INLINE Vec<uint32_t> along(const bf16* p, int64_t left) {
    Vec<uint32_t> pairs{};
    if (left >= 2 * kLanes<float>)
      memcpy(&pairs, p, sizeof pairs);
    else
      memcpy(&pairs, p, size_t(left) * sizeof *p);
    return pairs;
  }
  // next: the same lanes of the next element along the depth, or null after the last.
  static FASTLM_INLINE void across(Vec<uint32_t> (&out)[2], const bf16* p, int64_t lanes,
                                   const bf16* next) {
    const Halves a = halves(p, lanes), b = next ? halves(next, lanes) : Halves{};
    const Halves low = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    out[0] = bit_cast<Vec<uint32_t>>(__builtin_shuffle(a, b, low));
    out[1] = bit_cast<Vec<uint32_t>>(__builtin_shuffle(a, b, low + 16));
  }

 private:
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes)));
  static FASTLM_INLINE Halves halves(const bf16* p, int64_t lanes) {
    Halves v{};
    if (lanes >= 2 * kLanes<float>)
      memcpy(&v, p, sizeof v);
    else
      memcpy(&v, p, size_t(most(lanes, 0)) * sizeof *p);
    return v;
  }
};
#endif

template <class T> using unit_t = typename Kind<T>::Unit;
template <class T> constexpr int64_t units_of(int64_t depth) {
  return ceil_div(depth, Kind<T>::kElements);
}

}  // namespace fastlm::cpu::FASTLM_ISA
