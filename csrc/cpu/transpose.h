// Transposition in registers.
#pragma once

#include "simd.h"

namespace fastlm::cpu::FASTLM_ISA {

// One square of lanes x lanes elements, transposed in log2(lanes) rounds: each exchanges, between
// rows `width` apart, the lanes that differ in that bit. Most rounds are one instruction a row.
template <class A> FASTLM_INLINE void transpose_square(Vec<A> (&rows)[kLanes<A>]) {
#pragma GCC unroll 8
  for (int64_t width = 1; width < kLanes<A>; width *= 2) {
    Vec<bits_t<A>> low{}, high{};
    for (int64_t i = 0; i < kLanes<A>; ++i) {
      low[i] = bits_t<A>(i & width ? i - width + kLanes<A> : i);
      high[i] = bits_t<A>(i & width ? i + kLanes<A> : i + width);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes<A>; ++i) {
      if (i & width) continue;
      const Vec<A> first = rows[i], second = rows[i + width];
      rows[i] = __builtin_shuffle(first, second, low);
      rows[i + width] = __builtin_shuffle(first, second, high);
    }
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA
