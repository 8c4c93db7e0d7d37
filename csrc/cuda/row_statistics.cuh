// The statistics of a row in layer_norm's forward kernels.
#pragma once

#include "../layer_norm.h"
#include "reduce.cuh"

namespace fastlm::cuda {

// From the sum of a row divided by its length, which is rounded, and the sums of the differences
// from that and of their squares. What the mean was rounded by is all that a constant row differs
// from it.
struct RowStatistics {
  float mean, rest, rstd;

  __device__ RowStatistics(const LayerNormForward& p, float rounded_mean,
                           const float (&rest_and_squares)[2])
      : mean(rounded_mean),
        // rms_norm has no mean.
        rest(p.mean ? rest_and_squares[0] / float(p.cols) : 0.0f) {
    // Fused: where both terms overflow it is inf, and not inf - inf.
    const float variance = fmaf(-rest, rest, rest_and_squares[1] / float(p.cols));
    rstd = 1.0f / sqrtf((variance < 0.0f ? 0.0f : variance) + float(p.eps));
  }
  __device__ float h(float z) const { return ((z - mean) - rest) * rstd; }
  __device__ void save(const LayerNormForward& p, int64_t row) const {
    if (p.mean) static_cast<float*>(p.mean)[row] = mean + rest;
    static_cast<float*>(p.rstd)[row] = rstd;
  }
};

}  // namespace fastlm::cuda
