// What the bindings check of every tensor before a launch, and the messages.
#pragma once

#include <pybind11/pybind11.h>

#include "tensor.h"

namespace fastlm::FASTLM_DEVICE {

constexpr int kDeviceType = FASTLM_DEVICE_TYPE;

[[noreturn]] inline void refuse(const std::string& argument, const std::string& accepted,
                                const TensorView& got) {
  throw py::value_error(argument + ": expected " + accepted + ", got " + describe(got));
}

inline void check_here(const TensorView& t, const char* argument) {
  if (t.device_type != kDeviceType) refuse(argument, "a tensor on this module's device", t);
  if (!t.contiguous()) refuse(argument, "a contiguous tensor", t);
}
inline void check_floating(const TensorView& t, const char* argument) {
  check_here(t, argument);
  if (!is_floating(t.dtype)) refuse(argument, "a floating-point dtype", t);
}
inline void check_like(const TensorView& t, const TensorView& model, const char* argument) {
  check_here(t, argument);
  if (t.dtype != model.dtype || t.count() != model.count())
    refuse(argument, "the dtype and size of " + describe(model), t);
}
inline void check_like(const OptionalView& t, const TensorView& model, const char* argument) {
  if (t) check_like(*t, model, argument);
}
inline DType statistics_dtype(const TensorView& x) {
  return x.dtype == DType::f64 ? DType::f64 : DType::f32;
}
inline void check_size(const TensorView& t, int64_t count, DType dtype, const char* argument) {
  check_here(t, argument);
  if (t.count() != count || t.dtype != dtype)
    refuse(argument, std::to_string(count) + " elements of " + name_of(dtype), t);
}
inline void check_size(const OptionalView& t, int64_t count, DType dtype, const char* argument) {
  if (t) check_size(*t, count, dtype, argument);
}

inline int64_t cols_of(const TensorView& x) { return x.dims ? x.shape[x.dims - 1] : 1; }
inline int64_t rows_of(const TensorView& x) {
  int64_t rows = 1;
  for (int d = 0; d + 1 < x.dims; ++d) rows *= x.shape[d];
  return rows;
}

}  // namespace fastlm::FASTLM_DEVICE
