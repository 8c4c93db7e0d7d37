// gelu and dropout: the seam where CPU, CUDA and binding meet.
#pragma once

#include "dtype.h"

namespace fastlm {

// y = gelu(x + bias). tanh form: 0.5 u (1 + tanh(sqrt(2/pi) (u + 0.044715 u^3))); else 0.5 u (1 +
// erf(u / sqrt 2)).
struct GeluForward {
  const void *x, *bias;  // x (rows, cols); bias (cols), or null
  void* y;
  int64_t rows, cols;
  bool tanh_form;
  DType dtype;
};

// dx = dy * gelu'(x + bias); dbias = sum over rows of dx.
struct GeluBackward {
  const void *dy, *x, *bias;
  void *dx, *dbias;  // dbias null where bias is
  int64_t rows, cols;
  bool tanh_form;
  DType dtype;
};

// y = x * keep / (1 - p), with the mask of LayerNormForward; its own backward, given dy for x.
struct Dropout {
  const void* x;
  const int64_t* seed;
  void* y;
  int64_t rows, cols;
  double p;
  DType dtype;
};

namespace cpu {
void launch(const GeluForward& p, int64_t threads);
void launch(const GeluBackward& p, int64_t threads);
void launch(const Dropout& p, int64_t threads);
}  // namespace cpu
namespace cuda {
void launch(const GeluForward& p, int64_t stream);
void launch(const GeluBackward& p, int64_t stream);
void launch(const Dropout& p, int64_t stream);
}  // namespace cuda

}  // namespace fastlm
