// fastlm._cpu: the shared bindings, and what only the CPU has: its instruction sets and its
// recycling pool.
#define FASTLM_DEVICE cpu
#define FASTLM_DEVICE_TYPE dlpack::kCpu
#include "../bandwidth.h"
#include "../bindings.h"
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

}  // namespace fastlm::cpu

PYBIND11_MODULE(_cpu, m) {
  using namespace fastlm::cpu;
  using namespace pybind11::literals;
  namespace py = pybind11;
  m.doc() = "fastlm's kernels for the CPU";
  bind(m);
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
