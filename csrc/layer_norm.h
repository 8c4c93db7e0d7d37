// layer_norm and add_layer_norm: the seam where CPU, CUDA and binding meet.
#pragma once

#include "dtype.h"

namespace fastlm {

// z = dropout(x) + residual, or x itself where residual is null;  y = (z - mean) * rstd * weight +
// bias, row by row. mean and rstd are kept for backward: float32, or float64 when x is. Dropout
// keeps element (row, col) where word col % 4 of philox(seed; col / 4, row) is at or above
// dropout_p * 2^32 (philox.h), and scales it by 1 / (1 - dropout_p).
struct LayerNormForward {
  const void *x, *residual, *weight,
      *bias;                  // x, residual (rows, cols); weight and bias (cols), or null
  const int64_t* seed;        // one number, or null where dropout_p is 0
  void *y, *z, *mean, *rstd;  // y, z like x, z null where residual is; mean, rstd (rows)
  int64_t rows, cols;
  double eps, dropout_p;
  DType dtype, weight_dtype;  // of x, residual, y and z; of weight and bias
};

// With h = (z - mean) * rstd and g = dy * weight:
//   dz = rstd * (g - average(g) - h * average(g * h)) + dz_out;  dx = dz * keep / (1 - dropout_p)
//   dweight = sum over rows of dy * h;  dbias = sum over rows of dy
struct LayerNormBackward {
  const void *dy, *dz_out, *z, *weight, *mean,
      *rstd;  // dz_out: the gradient that z itself got, or null
  const int64_t* seed;
  void *dz, *dx, *dweight, *dbias;  // dx null where dropout_p is 0: it equals dz
  int64_t rows, cols;
  double dropout_p;
  DType dtype, weight_dtype;
};

namespace cpu {
void launch(const LayerNormForward& p, int64_t threads);
void launch(const LayerNormBackward& p, int64_t threads);
}  // namespace cpu
namespace cuda {
void launch(const LayerNormForward& p, int64_t stream);
void launch(const LayerNormBackward& p, int64_t stream);
}  // namespace cuda

}  // namespace fastlm
