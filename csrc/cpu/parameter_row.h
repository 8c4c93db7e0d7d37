// A row of parameters between the dtype it is stored in and the one that kernels compute in.
#pragma once

#include "../dtype.h"
#include "simd.h"

namespace fastlm::cpu::FASTLM_ISA {

// A parameter row in the accumulation type, or `absent` everywhere.
template <class A> void widen_row(const void* source, DType dtype, int64_t cols, A absent, A* out) {
  for (int64_t c = 0; c < cols; ++c) {
    if (!source)
      out[c] = absent;
    else if (dtype == DType::bf16)
      out[c] = scalar(static_cast<const bf16*>(source)[c]);
    else if (dtype == DType::f32)
      out[c] = A(static_cast<const float*>(source)[c]);
    else
      out[c] = A(static_cast<const double*>(source)[c]);
  }
}

template <class A> void narrow_row(const A* source, DType dtype, int64_t cols, void* out) {
  for (int64_t c = 0; c < cols; ++c) {
    if (dtype == DType::bf16)
      put(static_cast<bf16*>(out) + c, float(source[c]));
    else if (dtype == DType::f32)
      static_cast<float*>(out)[c] = float(source[c]);
    else
      static_cast<double*>(out)[c] = double(source[c]);
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA
