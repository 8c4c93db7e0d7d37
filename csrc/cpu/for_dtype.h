// From the dtype and size of a call to the instance of a kernel that serves them.
#pragma once

#include "../dtype.h"
#include "simd.h"

namespace fastlm::cpu::FASTLM_ISA {

template <bool kValue> struct Flag {
  static constexpr bool value = kValue;
};

// f(element, Flag<whether results are streamed>) for the element type of a dtype. float64 is here
// for gradcheck and is never streamed.
template <class F> void for_dtype(DType dtype, bool large, const F& f) {
  switch (dtype) {
    case DType::f32: return large ? f(float{}, Flag<true>{}) : f(float{}, Flag<false>{});
    case DType::bf16: return large ? f(bf16{}, Flag<true>{}) : f(bf16{}, Flag<false>{});
    default: return f(double{}, Flag<false>{});
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA
