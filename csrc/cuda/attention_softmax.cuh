// What attention's forward kernels do between their two products, in registers: masks, the online
// softmax and dropout.
#pragma once

#include "attention.cuh"

namespace fastlm::cuda {

// Two rows of a thread: running maximum of the scores and sum of exponentials.
struct Softmax {
  float peak[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
  float shrink[2];  // what the last update asks of the output so far

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
      const float base = scale.base(highest);
      shrink[h] = scale.power(peak[h], base);
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

// Softcap, and -inf where a query does not see a key; whether every query sees every key. `row` is
// the thread's first query.
template <int kN, class T>
__device__ bool shape_and_mask(Fragment<kN>& scores, const Scale<T>& scale, const Sequence& seq,
                               int tile_query, int row, int key) {
  const int lane = threadIdx.x % 32;
  const bool unmasked = seq.all_seen(tile_query, tile_query + kRows, key, key + kN);
  if (unmasked && !scale.shaped) return true;
#pragma unroll
  for (int n = 0; n < kN / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (scale.shaped) scores[n][i] = scale.shape(scores[n][i]);
      const bool seen = unmasked || seq.sees(row + i / 2 * 8, key + n * 8 + lane % 4 * 2 + i % 2);
      if (!seen) scores[n][i] = -INFINITY;
    }
  return unmasked;
}

template <int kN>
__device__ void drop(Fragment<kN>& probabilities, const DropoutRule& rule, int64_t row, int key) {
  if (!rule.seed) return;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kN / 8; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 f = dropout_factors(rule, uint64_t(row + h * 8), key + n * 8 + lane % 4 * 2);
      probabilities[n][2 * h] *= f.x;
      probabilities[n][2 * h + 1] *= f.y;
    }
}

}  // namespace fastlm::cuda
