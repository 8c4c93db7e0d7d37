// fastlm._cpu: the shared bindings, and what only the CPU has: its instruction sets and its
// recycling pool.
#define FASTLM_DEVICE cpu
#define FASTLM_DEVICE_TYPE dlpack::kCpu
namespace fastlm::cpu {
struct CurrentDevice {
  explicit CurrentDevice(int) {}  // there is one
};
}  // namespace fastlm::cpu
#include "../bandwidth.h"
#include "../bindings.h"
#include "../linear.h"
#include "../linear_cross_entropy.h"
#include "dispatch.h"
#include "memory.h"

namespace fastlm::cpu {

// A DLPack capsule that torch.utils.dlpack.from_dlpack turns into a tensor.
py::capsule empty(const std::vector<int64_t>& shape, int code, int bits) {
  const dlpack::DataType dtype{uint8_t(code), uint8_t(bits), 1};
  PyObject* capsule = PyCapsule_New(
      new_tensor(shape.data(), int(shape.size()), dtype), "dltensor", [](PyObject* self) {
        // Renamed to "used_dltensor" by whoever took the tensor; otherwise nobody did.
        if (!PyCapsule_IsValid(self, "dltensor")) return;
        auto* tensor = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(self, "dltensor"));
        tensor->deleter(tensor);
      });
  return py::reinterpret_steal<py::capsule>(capsule);
}

// One pass of "read", "copy" or "in_place" traffic over float32 tensors of one size.
void traffic(const std::string& kind, const TensorView& target, const TensorView& source,
             int64_t threads) {
  const Traffic traffic = kind == "read"   ? Traffic::read
                          : kind == "copy" ? Traffic::copy
                                           : Traffic::in_place;
  check_size(target, source.count(), DType::f32, "traffic: target");
  check_size(source, source.count(), DType::f32, "traffic: source");
  const Bandwidth p{static_cast<const float*>(source.data), static_cast<float*>(target.data),
                    source.count(), traffic};
  const py::gil_scoped_release unlocked;
  launch(p, threads);
}

void linear(const TensorView& y, const TensorView& x, const TensorView& weight,
            const OptionalView& bias, bool in_major, int64_t threads) {
  check_floating(x, "linear: input");
  const int64_t rows = rows_of(x), in_features = cols_of(x), out_features = cols_of(y);
  check_size(y, rows * out_features, x.dtype, "linear: output");
  check_size(bias, out_features, x.dtype, "linear: bias");
  check_size(weight, in_features * out_features, x.dtype, "linear: weight");
  const Linear p{x.data,      weight.data,  data(bias), y.data, rows,
                 in_features, out_features, in_major,   x.dtype};
  const py::gil_scoped_release unlocked;
  launch(p, threads);
}

// loss: None where lse is there; dloss and gradients: None where they are not wanted.
void linear_cross_entropy(const OptionalView& loss, const TensorView& lse, const OptionalView& dx,
                          const OptionalView& dlinear_weight, const OptionalView& dlinear_bias,
                          const OptionalView& dloss, const TensorView& x,
                          const TensorView& linear_weight, const OptionalView& linear_bias,
                          const TensorView& target, const OptionalView& weight,
                          int64_t ignore_index, double label_smoothing, double lse_square_scale,
                          double softcap, int64_t threads) {
  const std::string op = "linear_cross_entropy: ";
  check_floating(x, (op + "x").c_str());
  const int64_t rows = rows_of(x), features = cols_of(x), classes = rows_of(linear_weight);
  check_size(linear_weight, classes * features, x.dtype, (op + "linear_weight").c_str());
  check_size(linear_bias, classes, x.dtype, (op + "linear_bias").c_str());
  check_size(target, rows, DType::i64, (op + "target").c_str());
  check_size(weight, classes, statistics_dtype(x), (op + "weight").c_str());
  check_size(loss, rows, statistics_dtype(x), (op + "loss").c_str());
  check_size(lse, rows, DType::f64, (op + "lse").c_str());
  check_size(dloss, rows, statistics_dtype(x), (op + "dloss").c_str());
  check_like(dx, x, (op + "dx").c_str());
  check_like(dlinear_weight, linear_weight, (op + "dlinear_weight").c_str());
  check_size(dlinear_bias, classes, x.dtype, (op + "dlinear_bias").c_str());
  const LinearCrossEntropy p{x.data,
                             linear_weight.data,
                             data(linear_bias),
                             static_cast<const int64_t*>(target.data),
                             data(weight),
                             data(loss),
                             static_cast<double*>(lse.data),
                             data(dloss),
                             data(dx),
                             data(dlinear_weight),
                             data(dlinear_bias),
                             rows,
                             features,
                             classes,
                             {ignore_index, label_smoothing, lse_square_scale, softcap},
                             x.dtype,
                             loss.has_value(),
                             dloss.has_value()};
  const py::gil_scoped_release unlocked;
  launch(p, threads);
}

}  // namespace fastlm::cpu

PYBIND11_MODULE(_cpu, m) {
  using namespace fastlm::cpu;
  using namespace pybind11::literals;
  namespace py = pybind11;
  m.doc() = "fastlm's kernels for the CPU";
  bind(m);
  m.def("linear", &linear);
  m.def("linear_cross_entropy", &linear_cross_entropy);
  m.def("isa", &isa);
  m.def("available_isas", &available_isas);
  m.def("set_isa", &set_isa);
  m.def("traffic", &traffic);
  m.def("empty", &empty);
  m.def("empty_cache", &empty_cache);
  m.def("set_memory_limit", &set_memory_limit);
  m.def("memory_stats", [] {
    const MemoryStats s = memory_stats();
    return py::dict("in_use"_a = s.in_use, "held"_a = s.held, "limit"_a = s.limit);
  });
}
