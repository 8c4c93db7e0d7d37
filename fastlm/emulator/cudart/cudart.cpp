// The part of the CUDA runtime that an extension's host code calls, for an extension whose kernels
// run in the emulator: linked in place of cudart, it hands every launch to Python (extension.py).
//
// There is one device, its memory is the host's, and a launch has ended when it returns, so streams
// and their order need nothing. What is not here is missing when the extension is imported; add it.
#include <cuda.h>
#include <cuda_runtime_api.h>
#undef cudaGetDeviceProperties

#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
struct Allocation {  // and for each of its bytes, whether it has been written
  uint64_t address, bytes;
  uint8_t* written;
};
// Returns a cudaError_t. The arguments are those of cudaLaunchKernel, then all allocations.
using Launcher = int (*)(const char* kernel, const uint32_t* grid, const uint32_t* block,
                         uint64_t shared, void** arguments, const Allocation*, uint64_t count);

struct Device {
  int arch = 80;
  std::unordered_map<const void*, std::string> names;  // of kernels, by their host function
  std::unordered_map<const void*, int> shared_limits;  // that cudaFuncSetAttribute has raised
  std::map<uint64_t, std::vector<uint8_t>> memory;     // by address: `written` of an Allocation
};

Device& device() {  // used by constructors of other files: made when first needed
  static Device instance;
  return instance;
}
thread_local Launcher launcher = nullptr;
thread_local std::vector<Configuration> configurations;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

constexpr int kDefaultShared = 48 * 1024, kMultiprocessors = 4;
int most_shared() { return (device().arch >= 90 ? 227 : 163) * 1024; }

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// This thread's launches go to `to` from now on: two Extensions may share one library.
EXPORT void emulator_connect(Launcher to, int arch) {
  launcher = to;
  device().arch = arch;
}

// The fault of a kernel has been raised: host code that did not ask for it shall not find it later.
EXPORT void emulator_raised() {
  if (last_error == cudaErrorLaunchFailure) last_error = cudaSuccess;
}

// ---- what nvcc's stubs call ----

extern "C" {

void** __cudaRegisterFatBinary(void* binary) { return static_cast<void**>(binary); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  device().names[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configurations.push_back({grid, block, shared, static_cast<cudaStream_t>(stream)});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration top = configurations.back();
  configurations.pop_back();
  *grid = top.grid, *block = top.block, *shared = top.shared;
  *static_cast<cudaStream_t*>(stream) = top.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}

// ---- launches ----

cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t) {
  const auto limit = device().shared_limits.find(host);
  const int allowed = limit == device().shared_limits.end() ? kDefaultShared : limit->second;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (blocks == 0 || grid.y > 65535 || grid.z > 65535 || threads == 0 || threads > 1024)
    return remember(cudaErrorInvalidConfiguration);
  if (shared > size_t(allowed)) return remember(cudaErrorInvalidValue);
  std::vector<Allocation> memory;
  for (auto& [address, written] : device().memory)
    memory.push_back({address, written.size(), written.data()});
  const uint32_t grid_size[] = {grid.x, grid.y, grid.z}, block_size[] = {block.x, block.y, block.z};
  return remember(
      static_cast<cudaError_t>(launcher(device().names.at(host).c_str(), grid_size, block_size,
                                        shared, arguments, memory.data(), memory.size())));
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared,
                          stream);
}
cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value > most_shared()) return remember(cudaErrorInvalidValue);
  device().shared_limits[host] = value;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int,
                                                                   size_t, unsigned) {
  *blocks = 1;
  return cudaSuccess;
}

// ---- the driver's functions that are asked for by name ----

// Writes the emulator's own tensor map (runtime/async.h).
static CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                             void* address, const cuuint64_t* sizes, const cuuint64_t* strides,
                             const cuuint32_t* box, const cuuint32_t* steps,
                             CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                             CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  struct {
    uint64_t address, strides[4];
    uint32_t sizes[5], box[5], steps[5];
    uint32_t rank_minus_one, type, interleave, swizzle, fill, unused[2];
  } ours = {};
  // tensormap.replace counts f32.ftz before f64 and bf16, the driver after them.
  constexpr uint32_t kTypes[] = {0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 8};
  static_assert(sizeof ours == sizeof(CUtensorMap));
  if (rank < 1 || rank > 5 || type > 10 || reinterpret_cast<uint64_t>(address) % 16 != 0)
    return CUDA_ERROR_INVALID_VALUE;
  ours.address = reinterpret_cast<uint64_t>(address);
  for (uint32_t i = 0; i < rank; ++i) {
    if (sizes[i] == 0 || box[i] == 0 || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
    ours.sizes[i] = uint32_t(sizes[i]), ours.box[i] = box[i], ours.steps[i] = steps[i];
    if (i == 0) continue;
    if (strides[i - 1] % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
    ours.strides[i - 1] = strides[i - 1];
  }
  ours.rank_minus_one = rank - 1, ours.type = kTypes[type], ours.interleave = interleave;
  ours.swizzle = swizzle, ours.fill = fill;
  std::memcpy(map, &ours, sizeof ours);
  return CUDA_SUCCESS;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  const bool known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(encode_tiled) : nullptr;
  if (status) *status = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return known ? cudaSuccess : remember(cudaErrorSymbolNotFound);
}

// ---- errors, devices, streams ----

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : "cudaError";
}
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    default: return "the emulator found a fault in the kernel";
  }
}
cudaError_t cudaGetDevice(int* number) {
  *number = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int number) {
  return number == 0 ? cudaSuccess : remember(cudaErrorInvalidDevice);
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = kMultiprocessors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = device().arch / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = device().arch % 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = kDefaultShared; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = most_shared(); break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    default: return remember(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

// ---- memory: filled with NaN, as what a kernel forgets to write must not pass for a result ----

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  *pointer = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (!*pointer) return remember(cudaErrorMemoryAllocation);
  std::memset(*pointer, 0xff, bytes);
  device().memory[reinterpret_cast<uint64_t>(*pointer)].resize(bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* pointer) {
  device().memory.erase(reinterpret_cast<uint64_t>(pointer));
  std::free(pointer);
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t) {
  return cudaMalloc(pointer, bytes);
}
cudaError_t cudaMallocFromPoolAsync(void** pointer, size_t bytes, cudaMemPool_t, cudaStream_t) {
  return cudaMalloc(pointer, bytes);
}
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return cudaFree(pointer); }
cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) {
  *pool = nullptr;
  return cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
static void mark_written(void* pointer, size_t bytes) {
  const auto begin = reinterpret_cast<uint64_t>(pointer);
  auto after = device().memory.upper_bound(begin);
  if (after == device().memory.begin()) return;
  auto& [address, written] = *--after;
  const uint64_t first = begin - address;
  for (uint64_t i = first; i < first + bytes && i < written.size(); ++i) written[i] = 1;
}
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  std::memset(pointer, value, bytes);
  mark_written(pointer, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  std::memcpy(to, from, bytes);
  mark_written(to, bytes);
  return cudaSuccess;
}

}  // extern "C"
