// TensorView: what a kernel needs to know of a tensor, read from any object that looks like
// torch's.
//
// torch's ABI changes with every release, so nothing of it is linked or included. The facts come
// through the DLPack exchange table on the object's type when there is one (torch 2.10 and later;
// about 50 ns), and through the attributes data_ptr, shape, stride, dtype and device otherwise.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "dlpack.h"
#include "dtype.h"

namespace fastlm {

namespace py = pybind11;

constexpr int kMaxDims = 8;

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::other;
  int device_type = dlpack::kCpu, device_id = 0;
  int dims = 0;
  int64_t shape[kMaxDims] = {}, strides[kMaxDims] = {};  // strides in elements

  int64_t count() const {
    int64_t n = 1;
    for (int d = 0; d < dims; ++d) n *= shape[d];
    return n;
  }
  bool contiguous() const {
    if (count() == 0) return true;  // whatever its strides say
    int64_t expected = 1;
    for (int d = dims - 1; d >= 0; --d) {
      if (shape[d] != 1 && strides[d] != expected) return false;
      expected *= shape[d];
    }
    return true;
  }
};

using OptionalView = std::optional<TensorView>;

inline void* data(const OptionalView& view) { return view ? view->data : nullptr; }

inline std::string describe(const TensorView& t) {
  std::string text = "(";
  for (int d = 0; d < t.dims; ++d) text += (d ? ", " : "") + std::to_string(t.shape[d]);
  return text + ") " + name_of(t.dtype) + (t.device_type == dlpack::kCpu ? " cpu" : " cuda");
}

inline DType dtype_of(dlpack::DataType type) {
  if (type.lanes != 1) return DType::other;
  switch (type.code * 256 + type.bits) {
    case 0 * 256 + 32: return DType::i32;
    case 0 * 256 + 64: return DType::i64;
    case 1 * 256 + 8: return DType::u8;
    case 2 * 256 + 16: return DType::f16;
    case 2 * 256 + 32: return DType::f32;
    case 2 * 256 + 64: return DType::f64;
    case 4 * 256 + 16: return DType::bf16;
    default: return DType::other;
  }
}

inline DType dtype_of(const std::string& torch_name) {
  for (DType dtype :
       {DType::f32, DType::f64, DType::bf16, DType::f16, DType::u8, DType::i32, DType::i64})
    if (torch_name == std::string("torch.") + name_of(dtype)) return dtype;
  return DType::other;
}

inline const dlpack::Exchange* exchange_of(PyTypeObject* type) {
  // Two entries: a process holds tensors and parameters.
  static PyTypeObject* types[2] = {};
  static const dlpack::Exchange* exchanges[2] = {};
  static int oldest = 0;
  for (int i = 0; i < 2; ++i)
    if (type == types[i]) return exchanges[i];
  const dlpack::Exchange* exchange = nullptr;
  if (PyObject* capsule =
          PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__")) {
    exchange = static_cast<const dlpack::Exchange*>(
        PyCapsule_GetPointer(capsule, dlpack::kExchangeCapsule));
    Py_DECREF(capsule);
  }
  PyErr_Clear();  // no attribute: an older torch, which the attributes below serve
  const bool usable = exchange && exchange->header.version.major == 1 && exchange->borrow;
  types[oldest] = type;
  exchanges[oldest] = usable ? exchange : nullptr;
  oldest = 1 - oldest;
  return usable ? exchange : nullptr;
}

// The shape and strides of a tensor: of more than kMaxDims dimensions the first ones are merged,
// which a contiguous tensor allows.
template <class Shape, class Stride>
void set_sizes(TensorView& view, int dims, const Shape& shape, const Stride& stride) {
  const int merged = dims > kMaxDims ? dims - kMaxDims : 0;
  view.dims = dims - merged;
  for (int d = 0; d < view.dims; ++d) {
    view.shape[d] = shape(d + merged);
    view.strides[d] = stride(d + merged);
  }
  for (int d = 0; d < merged; ++d) {
    if (shape(d) != 1 && stride(d) != shape(d + 1) * stride(d + 1))
      throw py::value_error("expected a contiguous tensor or at most 8 dimensions, got " +
                            std::to_string(dims) + " dimensions that are not contiguous");
    view.shape[0] *= shape(d);
  }
}

inline bool borrow(py::handle object, TensorView& view) {
  const dlpack::Exchange* exchange = exchange_of(Py_TYPE(object.ptr()));
  dlpack::Tensor tensor;
  if (!exchange) return false;
  if (exchange->borrow(object.ptr(), &tensor) != 0) throw py::error_already_set();
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.dtype = dtype_of(tensor.dtype);
  view.device_type = tensor.device.type;
  view.device_id = tensor.device.id;
  const auto contiguous_stride = [&](int dim) {
    int64_t stride = 1;
    for (int d = tensor.ndim - 1; d > dim; --d) stride *= tensor.shape[d];
    return stride;
  };
  set_sizes(
      view, tensor.ndim, [&](int d) { return tensor.shape[d]; },
      [&](int d) { return tensor.strides ? tensor.strides[d] : contiguous_stride(d); });
  return true;
}

inline void read_attributes(py::handle object, TensorView& view) {
  const py::tuple shape = object.attr("shape"), strides = object.attr("stride")();
  view.data = reinterpret_cast<void*>(object.attr("data_ptr")().cast<uintptr_t>());
  view.dtype = dtype_of(py::str(object.attr("dtype")).cast<std::string>());
  const py::object device = object.attr("device"), index = device.attr("index");
  view.device_type =
      device.attr("type").cast<std::string>() == "cpu" ? dlpack::kCpu : dlpack::kCuda;
  view.device_id = index.is_none() ? 0 : index.cast<int>();
  set_sizes(
      view, static_cast<int>(shape.size()), [&](int d) { return shape[d].cast<int64_t>(); },
      [&](int d) { return strides[d].cast<int64_t>(); });
}

}  // namespace fastlm

namespace pybind11::detail {

template <> struct type_caster<fastlm::TensorView> {
  PYBIND11_TYPE_CASTER(fastlm::TensorView, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    if (source.is_none() || !hasattr(source, "data_ptr")) return false;
    if (!fastlm::borrow(source, value)) fastlm::read_attributes(source, value);
    return true;
  }
};

}  // namespace pybind11::detail
