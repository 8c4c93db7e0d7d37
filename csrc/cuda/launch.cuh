// What every launch shares: errors, the device, memory for partial results, and dtypes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>

#include "../dtype.h"

namespace fastlm::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::string text = std::string(what) + ": " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion)
    text +=
        "; fastlm._cuda holds kernels for compute capability 8.0 and later: rebuild it with "
        "FASTLM_CUDA_ARCHS, or use fastlm.use(\"triton\")";
  if (error == cudaErrorInsufficientDriver)
    text += "; there is no NVIDIA driver here, or it is older than the toolkit of this build";
  throw std::runtime_error(text);
}

// After every launch: a missing device or a bad grid must not return garbage.
inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

inline cudaStream_t stream_of(int64_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  return count;
}

inline int most_shared() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  return bytes;
}

// Lets a kernel have that much dynamic shared memory; more than 48 KB must be asked for.
template <class Kernel> void allow_shared(Kernel* kernel, int bytes, const char* name) {
  if (bytes <= 48 * 1024) return;
  const auto error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaErrorInvalidValue && bytes > most_shared()) {
    cudaGetLastError();  // or the next launch would be blamed for it
    throw std::runtime_error(std::string(name) + ": needs " + std::to_string(bytes) +
                             " bytes of shared memory, this device gives a block " +
                             std::to_string(most_shared()) + "; use fastlm.use(\"triton\")");
  }
  check(error, name);
}

// Memory for partial results, allocated and freed in the stream's order: no synchronisation, and a
// CUDA graph can capture it.
class Workspace {
 public:
  Workspace(int64_t floats, cudaStream_t stream) : stream_(stream) {
    if (floats == 0) return;
    check(cudaMallocFromPoolAsync(&data_, size_t(floats) * sizeof(float), pool(), stream),
          "cudaMallocFromPoolAsync");
  }
  ~Workspace() {
    if (data_) cudaFreeAsync(data_, stream_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  float* data() const { return static_cast<float*>(data_); }

 private:
  static constexpr int kDevices = 64;

  // One per device, never trimmed: the default pool gives its memory back at each synchronisation.
  static cudaMemPool_t pool() {
    static cudaMemPool_t pools[kDevices];
    static bool made[kDevices];
    static std::mutex mutex;
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    const std::lock_guard<std::mutex> lock(mutex);
    if (!made[device]) {
      cudaMemPoolProps properties{};
      properties.allocType = cudaMemAllocationTypePinned;
      properties.location.type = cudaMemLocationTypeDevice;
      properties.location.id = device;
      check(cudaMemPoolCreate(&pools[device], &properties), "cudaMemPoolCreate");
      uint64_t everything = UINT64_MAX;
      check(cudaMemPoolSetAttribute(pools[device], cudaMemPoolAttrReleaseThreshold, &everything),
            "cudaMemPoolSetAttribute");
      made[device] = true;
    }
    return pools[device];
  }

  void* data_ = nullptr;
  cudaStream_t stream_;
};

// f(element) for the element type of a dtype.
template <class F> void for_dtype(DType dtype, const char* op, const F& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
    default:
      throw std::invalid_argument(std::string(op) +
                                  ": the CUDA kernels take float32, bfloat16 and " +
                                  "float16, got " + name_of(dtype));
  }
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }

}  // namespace fastlm::cuda
