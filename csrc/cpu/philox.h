// Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; 7 rounds are
// the fewest that pass BigCrush): a counter-based generator, so that a mask needs no memory, no
// order and no thread.
//
// The mask of dropout, on every device: element (row, column) is dropped where word column % 4 of
//   philox(key = seed, counter = (column / 4, 0, row mod 2^32, row / 2^32))   is below   p * 2^32.
#pragma once

#include "simd.h"

namespace fastlm::cpu::FASTLM_ISA {

using Words = Vec<uint32_t>;
constexpr int64_t kWords = kLanes<uint32_t>;

// The even lanes' 64-bit products with m.
FASTLM_INLINE Vec<uint64_t> multiply_even(Words a, uint32_t m) {
#if defined(__AVX512F__)
  return bit_cast<Vec<uint64_t>>(_mm512_mul_epu32(bit_cast<__m512i>(a), _mm512_set1_epi32(int(m))));
#elif defined(__AVX2__)
  return bit_cast<Vec<uint64_t>>(_mm256_mul_epu32(bit_cast<__m256i>(a), _mm256_set1_epi32(int(m))));
#else
  return (bit_cast<Vec<uint64_t>>(a) & 0xffffffffull) * uint64_t(m);
#endif
}

FASTLM_INLINE Pair<Words> multiply(Words a, uint32_t m) {  // low and high halves
  const Vec<uint64_t> even = multiply_even(a, m);
  const Vec<uint64_t> odd = multiply_even(bit_cast<Words>(bit_cast<Vec<uint64_t>>(a) >> 32), m);
  const Vec<uint64_t> low_mask = all(uint64_t(0xffffffff));
  return {bit_cast<Words>((even & low_mask) | (odd << 32)),
          bit_cast<Words>((even >> 32) | (odd & ~low_mask))};
}

struct Random4 {
  Words word[4];
};

FASTLM_INLINE Random4 philox(uint64_t seed, Words c0, Words c2, Words c3) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  Words c1{};
  for (int round = 0; round < 7; ++round) {
    const Pair<Words> a = multiply(c0, 0xD2511F53u), b = multiply(c2, 0xCD9E8D57u);
    const Words next0 = b.high ^ c1 ^ k0, next2 = a.high ^ c3 ^ k1;
    c1 = b.low;
    c3 = a.low;
    c0 = next0;
    c2 = next2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

FASTLM_INLINE Words count_up(uint32_t start) {
  Words v{};
  for (int64_t i = 0; i < kWords; ++i) v[i] = start + uint32_t(i);
  return v;
}

// What keeps or drops: seed, threshold and scale of one call.
struct DropoutRule {
  uint64_t seed;
  uint32_t threshold;
  float scale;
  double wide_scale;

  DropoutRule(const int64_t* seed_or_null, double p)
      : seed(p > 0 ? uint64_t(*seed_or_null) : 0),
        threshold(p < 1 ? uint32_t(p * 4294967296.0) : 0xffffffffu),
        scale(p < 1 ? float(1.0 / (1.0 - p)) : 0.0f),
        wide_scale(p < 1 ? 1.0 / (1.0 - p) : 0.0) {}

  // scale or 0 for the 4 * kWords columns that start at the multiple `column` of 4.
  FASTLM_INLINE void factors(uint64_t row, int64_t column, float* out) const {
    const Words zero{};
    const Random4 r = philox(seed, count_up(uint32_t(column / 4)), zero + uint32_t(row),
                             zero + uint32_t(row >> 32));
    // Word w of lane l belongs to column 4 l + w: interleave the four words.
    const Pair<Words> a = zip_words(r.word[0], r.word[2]), b = zip_words(r.word[1], r.word[3]);
    const Pair<Words> first = zip_words(a.low, b.low), second = zip_words(a.high, b.high);
    put_factors(out, first.low);
    put_factors(out + kWords, first.high);
    put_factors(out + 2 * kWords, second.low);
    put_factors(out + 3 * kWords, second.high);
  }
  FASTLM_INLINE Vec<float> factor(Words random) const {
    return random >= threshold ? all(scale) : Vec<float>{};
  }
  // A factor in the accumulation type: in float64 it is not rounded to float32.
  FASTLM_INLINE float widened(float factor, float) const { return factor; }
  FASTLM_INLINE double widened(float factor, double) const { return factor != 0 ? wide_scale : 0; }
  // Some factors as an accumulation vector.
  template <class A, class Span> FASTLM_INLINE Vec<A> load_as(const float* p, Span span) const {
    if constexpr (sizeof(A) == sizeof(float)) return load(p, span);
    Vec<A> v{};
    for (int64_t i = 0; i < kLanes<A>; ++i) v[i] = widened(p[i], A{});
    return v;
  }

 private:
  FASTLM_INLINE void put_factors(float* out, Words random) const { store(out, factor(random)); }
  static FASTLM_INLINE Pair<Words> zip_words(Words a, Words b) {
    const Pair<Vec<float>> z = zip<float>(bit_cast<Vec<float>>(a), bit_cast<Vec<float>>(b));
    return {bit_cast<Words>(z.low), bit_cast<Words>(z.high)};
  }
};

}  // namespace fastlm::cpu::FASTLM_ISA
