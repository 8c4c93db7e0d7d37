// The register tile of a matrix product, which attention and linear_cross_entropy share.
#pragma once

#include "units.h"

namespace fastlm::cpu::FASTLM_ISA {

constexpr int64_t kTileVectors = 2;

// c (kRows, kTileVectors vectors) = or += a (kRows, depth) b (depth, kTileVectors vectors), in
// Units.
template <class Kind, int kRows, bool kAdd, class C>
FASTLM_INLINE void product_tile(int64_t depth, const typename Kind::Unit* a, int64_t a_row,
                                int64_t a_col, const typename Kind::Stored* b, int64_t ldb, C* c,
                                int64_t ldc) {
  using A = typename Kind::A;
  using Row = Vec<typename Kind::Unit>;
  // From zero even when adding: a sum of short sums rounds less than one long one.
  Vec<A> sums[kRows][kTileVectors] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    Row row[kTileVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) row[v] = Kind::row(b + k * ldb + v * kLanes<A>);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v)
        sums[r][v] = Kind::add(sums[r][v], a[r * a_row + k * a_col], row[v]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) {
      C* out = c + r * ldc + v * kLanes<A>;
      store(out, kAdd ? load(out) + sums[r][v] : sums[r][v]);
    }
}

}  // namespace fastlm::cpu::FASTLM_ISA
