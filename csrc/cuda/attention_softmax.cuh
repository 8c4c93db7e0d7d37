// What attention's forward kernels do between their two products, in registers: masks, the online
// softmax and dropout.
#pragma once

#include "attention.cuh"

namespace fastlm::cuda {

// By how much exponentials are made smaller than relative to the maximum, in the base of
// Scale::power, so that their sum with large values overflows nowhere before it is divided; `slack`
// is how far the maximum may stay behind, in base 2. Values below 2^-90 are rounded more for it.
// float16's are too small to overflow, and its exponentials must not become smaller.
template <class T> float headroom_of(const AttentionShape& s, int slack = 0) {
  if (std::is_same_v<T, f16>) return 0.0f;
  int bits = 0;
  while ((int64_t(1) << bits) < s.keys) ++bits;
  return float(bits + slack) * (Scale<T>::kWide ? kLn2 : 1.0f);
}

// Two rows of a thread: running maximum of the scores and sum of exponentials.
struct Softmax {
  float peak[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
  float shrink[2];        // what the last update asks of the output so far
  float headroom = 0.0f;  // by how much exponentials are smaller than relative to the maximum

  // Scores to probabilities relative to the maximum. power(score, base, n) is the exponential of a
  // score in eight columns n. The maximum may stay behind by kSlack, in powers of `scale`'s base:
  // then no output shrinks, and probabilities are larger than 1 by as much.
  template <int kSlack, int kN, class T, class Power>
  __device__ void update(Fragment<kN>& scores, const Scale<T>& scale, const Power& power) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float highest = peak[h];
#pragma unroll
      for (int n = 0; n < kN / 8; ++n)
        highest = fmaxf(highest, fmaxf(scores[n][2 * h], scores[n][2 * h + 1]));
      highest = quad_max(highest);
      if (kSlack > 0 && (highest - peak[h]) * scale.factor <= float(kSlack)) highest = peak[h];
      const float seen = scale.base(highest), base = seen + headroom;
      shrink[h] = scale.power(peak[h], seen);
      peak[h] = highest;
      total[h] *= shrink[h];
#pragma unroll
      for (int n = 0; n < kN / 8; ++n)
#pragma unroll
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          scores[n][i] = power(scores[n][i], base, n);
          total[h] += scores[n][i];
        }
    }
  }
};

template <int kDim> __device__ void rescale(Fragment<kDim>& out, const float (&factors)[2]) {
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) out[n][i] *= factors[i / 2];
}

// -inf where a query does not see a key; whether every query sees every key. `row` is the thread's
// first query. Queries past the last are not masked.
template <int kN>
__device__ bool mask(Fragment<kN>& scores, const Sequence& seq, int tile_query, int row, int key) {
  if (seq.all_seen(tile_query, tile_query + kRows, key, key + kN)) return true;
  mask_outside<kN>(
      scores, [&](int h) { return seq.lowest(row + h * 8) - key; },
      [&](int h) { return seq.highest(row + h * 8) - key; });
  return false;
}

// Random words for the thread's elements in eight columns of keys: `row` is the mask's row of its
// first query, `key` the first column. A draw is for four keys, which two neighbouring lanes hold:
// the even one draws for the first row, the odd one for the second, and they exchange halves.
__device__ inline Random4 draw(const DropoutRule& rule, int64_t row, int key) {
  const bool odd = threadIdx.x % 2;
  const uint32_t four = uint32_t(key) / 4 + threadIdx.x % 4 / 2;
  const Random4 mine = philox(uint64_t(*rule.seed), four, uint64_t(row + odd * 8));
  const auto& word = mine.word;
  const uint32_t theirs[2] = {__shfl_xor_sync(~0u, odd ? word[0] : word[2], 1),
                              __shfl_xor_sync(~0u, odd ? word[1] : word[3], 1)};
  if (odd) return {{theirs[0], theirs[1], word[2], word[3]}};
  return {{word[0], word[1], theirs[0], theirs[1]}};
}

template <int kN>
__device__ void drop(Fragment<kN>& probabilities, const DropoutRule& rule, int64_t row, int key) {
  if (!rule.seed) return;
#pragma unroll
  for (int n = 0; n < kN / 8; ++n) {
    const Random4 random = draw(rule, row, key + n * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) probabilities[n][i] *= rule.factor(random.word[i]);
  }
}

}  // namespace fastlm::cuda
