// linear: the seam where the CPU kernel and its binding meet.
#pragma once

#include "dtype.h"

namespace fastlm {

// y = x @ weight^T + bias for a few rows. The weight is contiguous as (out_features, in_features),
// or, where `in_major`, as (in_features, out_features).
struct Linear {
  const void *x, *weight, *bias;  // (rows, in_features); bias (out_features), or null
  void* y;                        // (rows, out_features)
  int64_t rows, in_features, out_features;
  bool in_major;
  DType dtype;  // of all four
};

namespace cpu {
void launch(const Linear& p, int64_t threads);
}

}  // namespace fastlm
