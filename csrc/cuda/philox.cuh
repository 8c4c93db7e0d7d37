// Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the
// counters of csrc/cpu/philox.h, so that a seed gives the same mask on every device.
#pragma once

#include <cstdint>

namespace fastlm::cuda {

struct Random4 {
  uint32_t word[4];
};

__device__ inline Random4 philox(uint64_t seed, uint32_t c0, uint64_t row) {
  uint32_t c1 = 0, c2 = uint32_t(row), c3 = uint32_t(row >> 32);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const uint32_t high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const uint32_t high2 = __umulhi(c2, 0xCD9E8D57u), low2 = c2 * 0xCD9E8D57u;
    c0 = high2 ^ c1 ^ k0;
    c2 = high0 ^ c3 ^ k1;
    c1 = low2;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// What keeps or drops, of one call. The seed is in the device's memory: nobody waits for it.
struct DropoutRule {
  const int64_t* seed;  // null: keep everything
  uint32_t threshold;
  float scale;

  DropoutRule(const int64_t* seed, double p)
      : seed(p > 0 ? seed : nullptr),
        threshold(p < 1 ? uint32_t(p * 4294967296.0) : 0xffffffffu),
        scale(p < 1 ? float(1.0 / (1.0 - p)) : 0.0f) {}

  __device__ bool keeps(uint32_t random) const { return random >= threshold; }
  __device__ float factor(uint32_t random) const { return keeps(random) ? scale : 0.0f; }

  // v[i] *= scale or 0, for the columns from `column` on, a multiple of 4.
  template <int kCount>
  __device__ void apply(uint64_t row, int64_t column, float (&v)[kCount]) const {
    if (!seed) return;
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const Random4 random = philox(uint64_t(*seed), uint32_t((column + i) / 4), row);
#pragma unroll
      for (int w = 0; w < 4; ++w) v[i + w] *= factor(random.word[w]);
    }
  }
};

}  // namespace fastlm::cuda
