// c = a @ b^T for 64 x 64 tiles on sm_90a: TMA loads with a 128-byte swizzle, a two-stage mbarrier
// pipeline, wgmma, and a TMA store of the result. One template argument plants a fault.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <cstdint>

struct alignas(64) TensorMap {
  unsigned char bytes[128];
};
enum class Fault { kNone, kParity, kNoProxyFence, kEarlyRefill, kNoWgmmaWait, kNoBulkWait };

constexpr int kTile = 64, kElements = kTile * kTile, kTileBytes = kElements * 2;

__device__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ void expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
__device__ void wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra "
      "AGAIN;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
__device__ void load_box(void* to, const TensorMap* map, uint64_t* barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}
__device__ uint64_t descriptor(const void* p) {
  return uint64_t((shared_address(p) & 0x3ffff) >> 4) | uint64_t(1) << 16 |
         uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
__device__ void multiply(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, "
      "1, 1, 1, 0, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b));
}

template <Fault kFault>
__device__ void gemm(const TensorMap& map_a, const TensorMap& map_b, const TensorMap& map_c,
                     int k) {
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ uint64_t full[2];
  auto* a = reinterpret_cast<__nv_bfloat16*>(memory);
  auto* b = a + 2 * kElements;
  auto* c = b + 2 * kElements;
  const int row = blockIdx.x * kTile, col = blockIdx.y * kTile, steps = (k + kTile - 1) / kTile;
  if (threadIdx.x == 0)
    for (int s = 0; s < 2; ++s)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&full[s]))
                   : "memory");
  __syncthreads();
  const auto fetch = [&](int step) {
    const int s = step % 2;
    expect(&full[s], 2 * kTileBytes);
    load_box(a + s * kElements, &map_a, &full[s], step * kTile, row);
    load_box(b + s * kElements, &map_b, &full[s], step * kTile, col);
  };
  if (threadIdx.x == 0)
    for (int step = 0; step < 2 && step < steps; ++step) fetch(step);
  float sums[32] = {};
  for (int step = 0; step < steps; ++step) {
    const int s = step % 2;
    wait(&full[s], kFault == Fault::kParity ? step % 2 : step / 2 % 2);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    for (int i = 0; i < 4; ++i)
      multiply(sums, descriptor(a + s * kElements) + 2 * i, descriptor(b + s * kElements) + 2 * i);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    if (kFault == Fault::kEarlyRefill && threadIdx.x == 0 && step + 2 < steps) fetch(step + 2);
    if (kFault != Fault::kNoWgmmaWait)
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    __syncthreads();
    if (kFault != Fault::kEarlyRefill && threadIdx.x == 0 && step + 2 < steps) fetch(step + 2);
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = 0; i < 32; ++i) {  // the tile in the layout of a 128-byte swizzle
    const int r = 16 * warp + lane / 4 + 8 * (i >> 1 & 1),
              n = 8 * (i >> 2) + lane % 4 * 2 + (i & 1);
    c[r * kTile + ((n / 8) ^ (r % 8)) * 8 + n % 8] = __float2bfloat16(sums[i]);
  }
  if (kFault != Fault::kNoProxyFence) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map_c),
        "r"(col), "r"(row), "r"(shared_address(c))
        : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    if (kFault != Fault::kNoBulkWait) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}

#define GEMM(NAME, FAULT)                                                            \
  extern "C" __global__ void __launch_bounds__(128)                                  \
      NAME(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, \
           const __grid_constant__ TensorMap c, int k) {                             \
    gemm<FAULT>(a, b, c, k);                                                         \
  }
GEMM(hopper_gemm, Fault::kNone)
GEMM(hopper_parity, Fault::kParity)
GEMM(hopper_no_proxy_fence, Fault::kNoProxyFence)
GEMM(hopper_early_refill, Fault::kEarlyRefill)
GEMM(hopper_no_wgmma_wait, Fault::kNoWgmmaWait)
GEMM(hopper_no_bulk_wait, Fault::kNoBulkWait)
