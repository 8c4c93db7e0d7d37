// The part of DLPack 1.x's C ABI (github.com/dmlc/dlpack) that crosses our boundary: a borrowed
// tensor in (DLPackExchangeAPI) and an owned block of memory out (DLManagedTensor). Layouts are
// fixed by that ABI.
#pragma once

#include <cstdint>

namespace fastlm::dlpack {

struct Version {
  uint32_t major, minor;
};
struct Device {
  int32_t type, id;
};  // type: 1 CPU, 2 CUDA
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};  // code: 0 int, 2 float, 4 bfloat

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null means contiguous
  uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

struct ExchangeHeader {
  Version version;
  ExchangeHeader* previous;
};

struct Exchange {
  ExchangeHeader header;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*borrow)(void* object, Tensor* out);  // may be null
  void* current_stream;
};

inline constexpr const char* kExchangeCapsule = "dlpack_exchange_api";
inline constexpr int32_t kCpu = 1, kCuda = 2;

}  // namespace fastlm::dlpack
