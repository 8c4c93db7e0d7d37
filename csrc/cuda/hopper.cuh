// What compute capability 9.0 adds, behind named functions: mbarriers, copies of whole tiles by the
// tensor memory accelerator (TMA), and products of a warpgroup of 128 threads (wgmma).
//
// Tiles in shared memory are panels of 64 columns: 128 bytes a row, whose packs of 16 bytes are
// swizzled as in mma.cuh's Tile (pack k of row r lies at place k ^ (r % 8)), which is TMA's and
// wgmma's own 128-byte swizzle. A panel starts at a multiple of 1024 bytes.
#pragma once

#include <cuda.h>  // types alone: the driver's function is looked up when it is needed

#include "mma.cuh"

namespace fastlm::cuda {

constexpr int kWarpgroup = 128, kPanel = 64, kPanelRowBytes = 128;

// Whether the build is for sm_90a too. If not, attention_hopper_*.cu are left out of it.
constexpr bool built_for_hopper() {
  for (const int arch : {__CUDA_ARCH_LIST__})
    if (arch == 900) return true;
  return false;
}
inline bool is_hopper() {
  int device = 0, major = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "cudaDeviceGetAttribute");
  return major == 9;
}

// ---- mbarriers ----

using Mbarrier = uint64_t;

__device__ inline void initialize(Mbarrier* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
__device__ inline void arrive(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
__device__ inline void arrive_expecting(Mbarrier* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Until the phase of that parity has ended. A fresh barrier's phase -1 has: its parity is 1.
__device__ inline void wait(Mbarrier* barrier, uint32_t parity) {
  uint32_t passed = 0;
  while (!passed)
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(passed)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
}

// Where a ring of buffers stands: the one that comes next, and which time round it is.
template <int kStages> struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// ---- other synchronisation ----

// Ordinary writes to shared memory before it are seen by TMA and wgmma after it.
__device__ inline void fence_async() { asm volatile("fence.proxy.async;" ::: "memory"); }

// Barriers 1 to 15 among some of a block's threads. `threads` counts those that arrive as well.
__device__ inline void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ inline void arrive_threads(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// A counter in the device's memory, and with it what was written before it was.
__device__ inline unsigned load_acquire(const unsigned* counter) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
__device__ inline void store_release(unsigned* counter, unsigned value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

// Registers of each thread of a warpgroup from here on: what one gives back, others can have.
template <int kCount> __device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount> __device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- TMA ----

// Copies the panel of rows from `row` on and columns from `column` on of a head; what lies outside
// the tensor becomes zeros. The barrier learns of the bytes.
__device__ inline void load_panel(void* to, const CUtensorMap& map, Mbarrier* barrier, int column,
                                  int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}
// The other way; what lies outside is not written. Bulk stores are waited for by who issued them.
__device__ inline void store_panel(const CUtensorMap& map, const void* from, int column, int row,
                                   int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          &map),
      "r"(shared_address(from)), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}
// Bytes as they lie, a multiple of 16, between addresses that are.
__device__ inline void load_bytes(void* to, const void* from, uint32_t bytes, Mbarrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
__device__ inline void store_bytes(void* to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
// The same, added to the floats that are there.
__device__ inline void add_floats(float* to, const float* from, uint32_t bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
      "r"(shared_address(from)), "r"(bytes)
      : "memory");
}
__device__ inline void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until their sources may be overwritten; until they are done.
__device__ inline void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ inline void wait_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// ---- wgmma ----

// A panel, or some of its rows, as an operand. With rows as k (transposed) and more than 64
// columns, the next panel lies `panel_bytes` further on.
__device__ inline uint64_t operand(const void* start, uint32_t panel_bytes = 16) {
  constexpr uint64_t kEightRows = 8 * kPanelRowBytes, kSwizzle128 = 1;
  return uint64_t((shared_address(start) & 0x3ffff) >> 4) | uint64_t(panel_bytes >> 4) << 16 |
         (kEightRows >> 4) << 32 | kSwizzle128 << 62;
}
__device__ inline uint64_t further(uint64_t operand, uint32_t bytes) {
  return operand + (bytes >> 4);
}

// Before the first product of a batch, and after registers that they use have been written.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most kLeft committed batches are under way.
template <int kLeft> __device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
// The compiler does not know that products write registers after they are issued: between issue and
// wait, and just after the wait, this keeps its accesses to them in place.
template <int kColumns> __device__ void pin(Fragment<kColumns>& d) {
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[n][i])::"memory");
}

#define FASTLM_FOUR(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define FASTLM_D64                                                                                \
  FASTLM_FOUR(0), FASTLM_FOUR(1), FASTLM_FOUR(2), FASTLM_FOUR(3), FASTLM_FOUR(4), FASTLM_FOUR(5), \
      FASTLM_FOUR(6), FASTLM_FOUR(7)
#define FASTLM_D128                                                                              \
  FASTLM_D64, FASTLM_FOUR(8), FASTLM_FOUR(9), FASTLM_FOUR(10), FASTLM_FOUR(11), FASTLM_FOUR(12), \
      FASTLM_FOUR(13), FASTLM_FOUR(14), FASTLM_FOUR(15)
#define FASTLM_LIST64                                                                     \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTLM_LIST128                                                                      \
  FASTLM_LIST64                                                                             \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
  "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// d += A B, or = without `add`; both operands in shared memory, each K-major or transposed.
#define FASTLM_SHARED_PRODUCT(N, TYPE, A, B, ADD, TRANSPOSE_A, TRANSPOSE_B)                  \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" ADD                                      \
               ", 0;\n"                                                                      \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE " {" FASTLM_LIST##N    \
               "}, %" A ", %" B ", p, 1, 1, %" TRANSPOSE_A ", %" TRANSPOSE_B ";\n}"          \
               : FASTLM_D##N                                                                 \
               : "l"(a), "l"(b), "r"(int(add)), "n"(int(kTransposeA)), "n"(int(kTransposeB)) \
               : "memory")
// The same with A, 16 columns of a result, in registers.
#define FASTLM_REGISTER_PRODUCT(N, TYPE, A0, A1, A2, A3, B, ADD, TRANSPOSE_B)                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" ADD                                         \
               ", 0;\n"                                                                         \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE " {" FASTLM_LIST##N       \
               "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" B ", p, 1, 1, %" TRANSPOSE_B ";\n}" \
               : FASTLM_D##N                                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)),             \
                 "n"(int(kTransposeB))                                                          \
               : "memory")

template <class T> constexpr bool kIsBf16 = std::is_same_v<T, bf16>;

// d (64 x kN, by a warpgroup) += A (64 x 16) B (16 x kN); asynchronous.
template <class T, int kN, bool kTransposeA, bool kTransposeB>
__device__ void multiply_async(float (*d)[4], uint64_t a, uint64_t b, bool add) {
  if constexpr (kN == 64 && kIsBf16<T>)
    FASTLM_SHARED_PRODUCT(64, "bf16.bf16", "32", "33", "34", "35", "36");
  else if constexpr (kN == 64)
    FASTLM_SHARED_PRODUCT(64, "f16.f16", "32", "33", "34", "35", "36");
  else if constexpr (kIsBf16<T>)
    FASTLM_SHARED_PRODUCT(128, "bf16.bf16", "64", "65", "66", "67", "68");
  else
    FASTLM_SHARED_PRODUCT(128, "f16.f16", "64", "65", "66", "67", "68");
}
template <class T, int kN, bool kTransposeB>
__device__ void multiply_async(float (*d)[4], const uint32_t (&a)[4], uint64_t b, bool add) {
  if constexpr (kN == 64 && kIsBf16<T>)
    FASTLM_REGISTER_PRODUCT(64, "bf16.bf16", "32", "33", "34", "35", "36", "37", "38");
  else if constexpr (kN == 64)
    FASTLM_REGISTER_PRODUCT(64, "f16.f16", "32", "33", "34", "35", "36", "37", "38");
  else if constexpr (kIsBf16<T>)
    FASTLM_REGISTER_PRODUCT(128, "bf16.bf16", "64", "65", "66", "67", "68", "69", "70");
  else
    FASTLM_REGISTER_PRODUCT(128, "f16.f16", "64", "65", "66", "67", "68", "69", "70");
}

#undef FASTLM_FOUR
#undef FASTLM_D64
#undef FASTLM_D128
#undef FASTLM_LIST64
#undef FASTLM_LIST128
#undef FASTLM_SHARED_PRODUCT
#undef FASTLM_REGISTER_PRODUCT

// ---- on the host ----

// A tensor of four dimensions, the last contiguous: sizes from the last on, strides of the others
// in bytes, multiples of 16.
struct Extents {
  const void* data;
  uint64_t sizes[4], strides[3];
};

// From it TMA copies panels of `rows` rows of the third dimension.
template <class T> CUtensorMap panel_map(const Extents& t, uint32_t rows) {
  using Encode = decltype(cuTensorMapEncodeTiled);
  static Encode* const encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                           cudaEnableDefault, &status),
          "cuTensorMapEncodeTiled");
    if (!found)
      throw std::runtime_error("the NVIDIA driver has no cuTensorMapEncodeTiled: update it");
    return reinterpret_cast<Encode*>(found);
  }();
  CUtensorMap map;
  const uint32_t box[] = {kPanel, rows, 1, 1}, steps[] = {1, 1, 1, 1};
  const CUresult result =
      encode(&map, kIsBf16<T> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             4, const_cast<void*>(t.data), t.sizes, t.strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(int(result)));
  return map;
}

}  // namespace fastlm::cuda
