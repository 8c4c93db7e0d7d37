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
#include "../cross_entropy_tile.h"
#include "../linear.h"
#include "../product.h"
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

// A matrix in any order of strides; a dimension of one element has no stride that matters.
struct Matrix {
  int64_t rows, cols, row, col;

  Matrix(const TensorView& t, const char* argument) {
    if (t.device_type != kDeviceType || t.dims != 2) refuse(argument, "a matrix on the CPU", t);
    rows = t.shape[0], cols = t.shape[1];
    row = rows > 1 ? t.strides[0] : 1, col = cols > 1 ? t.strides[1] : 1;
    if (row != 1 && col != 1) refuse(argument, "rows or columns without gaps", t);
  }
};

void product(const TensorView& out, const OptionalView& rounded, const TensorView& a,
             const TensorView& b, bool add, const OptionalView& ahead, int64_t threads) {
  if (!is_floating(a.dtype) || a.dtype == DType::f16)
    refuse("product: a", "float32, float64 or bfloat16", a);
  const Matrix mo(out, "product: out"), ma(a, "product: a"), mb(b, "product: b");
  if (mo.col != 1 || out.dtype != statistics_dtype(a))
    refuse("product: out", "contiguous columns in the accumulation dtype", out);
  if (b.dtype != a.dtype || mb.rows != ma.cols)
    refuse("product: b", "the dtype and as many rows as the columns of " + describe(a), b);
  if (mo.rows != ma.rows || mo.cols != mb.cols)
    refuse("product: out", "the rows of " + describe(a) + " and columns of " + describe(b), out);
  const Matrix mr = rounded ? Matrix(*rounded, "product: rounded") : mo;
  if (rounded &&
      (mr.rows != mo.rows || mr.cols != mo.cols || mr.col != 1 || rounded->dtype != a.dtype))
    refuse("product: rounded", "what out is, in the dtype of " + describe(a), *rounded);
  const int64_t ahead_bytes = ahead ? ahead->count() * size_of(ahead->dtype) : 0;
  const Product p{a.data,  b.data, out.data, data(rounded), ma.rows,    mb.cols,
                  ma.cols, ma.row, ma.col,   mb.row,        mb.col,     mo.row,
                  mr.row,  add,    a.dtype,  data(ahead),   ahead_bytes};
  const py::gil_scoped_release unlocked;
  launch(p, threads);
}

// Rows and classes are dlogits' or, in forward, the logits'; `kept` has x's dtype.
CrossEntropyTile tile_of(const TensorView& logits, const TensorView& kept, const TensorView& scale,
                         int64_t kept_rows, const TensorView& target, const OptionalView& weight,
                         int64_t classes, int64_t first_class, double softcap) {
  const char* op = "linear_cross_entropy";
  check_floating(kept, op);
  const bool codes = kept.dtype != DType::f64;  // which take three quarters of the bytes
  const int64_t element = size_of(kept.dtype);
  const int64_t row = codes ? (3 * element * classes + 3) / 4 : element * classes;
  if (kept.count() * element < kept_rows * row) refuse(op, "room for what is kept", kept);
  check_size(scale, codes ? kept_rows : scale.count(),
             kept.dtype == DType::bf16 ? DType::u8 : kept.dtype, op);
  check_size(target, target.count(), DType::i64, op);
  check_size(weight, classes, statistics_dtype(kept), op);
  return {logits.data,  kept.data,      scale.data, static_cast<const int64_t*>(target.data),
          data(weight), target.count(), kept_rows,  classes,
          first_class,  softcap,        kept.dtype};
}

void cross_entropy_tile_forward(const TensorView& base, const TensorView& total,
                                const TensorView& target_logit, const OptionalView& weighted,
                                const TensorView& kept, const TensorView& scale, int64_t kept_rows,
                                const TensorView& logits, const TensorView& target,
                                const OptionalView& weight, int64_t first_class, double softcap,
                                int64_t threads) {
  const char* op = "linear_cross_entropy";
  for (const TensorView* t : {&base, &total, &target_logit})
    check_size(*t, target.count(), statistics_dtype(kept), op);
  check_size(weighted, target.count(), DType::f64, op);
  check_size(logits, target.count() * cols_of(logits), statistics_dtype(kept), op);
  const CrossEntropyTileForward p{tile_of(logits, kept, scale, kept_rows, target, weight,
                                          cols_of(logits), first_class, softcap),
                                  base.data, total.data, target_logit.data,
                                  static_cast<double*>(data(weighted))};
  const py::gil_scoped_release unlocked;
  launch(p, threads);
}

void cross_entropy_tile_backward(const TensorView& dlogits, const TensorView& kept,
                                 const TensorView& scale, int64_t kept_rows,
                                 const TensorView& logits, const TensorView& target,
                                 const OptionalView& weight, const TensorView& lse,
                                 const TensorView& softmax, const TensorView& smooth,
                                 const TensorView& hard, int64_t first_class, double softcap,
                                 int64_t threads) {
  const char* op = "linear_cross_entropy";
  const int64_t rows = target.count(), classes = cols_of(dlogits);
  check_size(dlogits, rows * classes, kept.dtype, op);
  check_size(logits, (rows - kept_rows) * classes, statistics_dtype(kept), op);
  for (const TensorView* t : {&softmax, &smooth, &hard})
    check_size(*t, rows, statistics_dtype(kept), op);
  check_size(lse, rows, DType::f64, op);
  const CrossEntropyTileBackward p{
      tile_of(logits, kept, scale, kept_rows, target, weight, classes, first_class, softcap),
      dlogits.data,
      static_cast<const double*>(lse.data),
      softmax.data,
      smooth.data,
      hard.data};
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
  m.def("product", &product);
  m.def("cross_entropy_tile_forward", &cross_entropy_tile_forward);
  m.def("cross_entropy_tile_backward", &cross_entropy_tile_backward);
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
