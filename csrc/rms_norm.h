// rms_norm: the seam where CPU, CUDA and binding meet.
#pragma once

#include "dtype.h"

namespace fastlm {

// y = x * rstd * weight, row by row, with rstd = 1 / sqrt(average(x^2) + eps). rstd is kept for
// backward: float32, or float64 when x is.
struct RmsNormForward {
  const void *x, *weight;  // (rows, cols); (cols), or null
  void *y, *rstd;          // like x; (rows)
  int64_t rows, cols;
  double eps;
  DType dtype, weight_dtype;  // of x and y; of weight
};

// With h = x * rstd and g = dy * weight:
//   dx = rstd * (g - h * average(g * h));  dweight = sum over rows of dy * h
struct RmsNormBackward {
  const void *dy, *x, *weight, *rstd;
  void *dx, *dweight;  // dweight (cols), or null
  int64_t rows, cols;
  DType dtype, weight_dtype;
};

namespace cpu {
void launch(const RmsNormForward& p, int64_t threads);
void launch(const RmsNormBackward& p, int64_t threads);
}  // namespace cpu
namespace cuda {
void launch(const RmsNormForward& p, int64_t stream);
void launch(const RmsNormBackward& p, int64_t stream);
}  // namespace cuda

}  // namespace fastlm
