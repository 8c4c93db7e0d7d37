// Causal attention forward with cp.async, ldmatrix and mma.m16n8k16: four warps, 64 x 64 tiles, a
// double buffer for keys and values. One template argument plants a fault.
#include <cuda_bf16.h>
#include <cstdint>

constexpr int kTile = 64, kWidth = 64, kThreads = 128, kPacks = kWidth / 8;

enum class Fault { kNone, kWaitGroup, kNoBarrier, kNotTransposed };

__device__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
// 16-byte packs are swizzled so that the eight rows of an ldmatrix hit eight different bank groups.
__device__ uint32_t pack_address(const __nv_bfloat16* tile, int row, int pack) {
  return shared_address(tile + row * kWidth + (pack ^ (row % 8)) * 8);
}
__device__ void load_tile(__nv_bfloat16* tile, const __nv_bfloat16* global, int first, int length) {
  for (int i = threadIdx.x; i < kTile * kPacks; i += kThreads) {
    const int row = i / kPacks, pack = i % kPacks;
    const bool inside = first + row < length;
    const __nv_bfloat16* from = global + size_t(inside ? first + row : 0) * kWidth + pack * 8;
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(pack_address(tile, row, pack)),
        "l"(from), "r"(inside ? 16 : 0)
        : "memory");
  }
}
__device__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft> __device__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}
template <bool kTransposed> __device__ void ldmatrix(uint32_t (&r)[4], uint32_t address) {
  if (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
__device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(~0u, v, 1));
  return fmaxf(v, __shfl_xor_sync(~0u, v, 2));
}
__device__ float quad_sum(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

template <Fault kFault>
__device__ void attend(const __nv_bfloat16* q, const __nv_bfloat16* k, const __nv_bfloat16* v,
                       __nv_bfloat16* o, int length, float scale) {
  extern __shared__ __align__(128) __nv_bfloat16 tiles[];
  constexpr int kElements = kTile * kWidth;
  __nv_bfloat16 *queries = tiles, *keys = tiles + kElements, *values = tiles + 3 * kElements;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = blockIdx.x * kTile;
  const size_t base = size_t(blockIdx.y) * length * kWidth;
  load_tile(queries, q + base, first, length);
  load_tile(keys, k + base, 0, length);
  load_tile(values, v + base, 0, length);
  commit();
  float acc[kWidth / 8][4] = {}, peak[2] = {-INFINITY, -INFINITY}, total[2] = {};
  for (int tile = 0; tile <= int(blockIdx.x); ++tile) {
    const int next = (tile + 1) % 2 * kElements, now = tile % 2 * kElements;
    if (tile < int(blockIdx.x)) {
      load_tile(keys + next, k + base, (tile + 1) * kTile, length);
      load_tile(values + next, v + base, (tile + 1) * kTile, length);
    }
    commit();
    wait<kFault == Fault::kWaitGroup ? 2 : 1>();
    __syncthreads();
    float scores[8][4] = {};
    for (int step = 0; step < kWidth / 16; ++step) {
      uint32_t a[4], b[4];
      ldmatrix<false>(a, pack_address(queries, warp * 16 + lane % 16, step * 2 + lane / 16));
      for (int n = 0; n < 8; n += 2) {
        ldmatrix<false>(
            b, pack_address(keys + now, n * 8 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
        mma(scores[n], a, b[0], b[1]);
        mma(scores[n + 1], a, b[2], b[3]);
      }
    }
    for (int h = 0; h < 2; ++h) {
      const int row = first + warp * 16 + lane / 4 + 8 * h;
      float top = peak[h];
      for (int n = 0; n < 8; ++n)
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          const int col = tile * kTile + n * 8 + lane % 4 * 2 + i % 2;
          scores[n][i] = col <= row && col < length ? scores[n][i] * scale : -INFINITY;
          top = fmaxf(top, scores[n][i]);
        }
      top = quad_max(top);
      const float shrink = __expf(peak[h] - top);
      peak[h] = top, total[h] *= shrink;
      for (int n = 0; n < 8; ++n)
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          scores[n][i] = __expf(scores[n][i] - top), total[h] += scores[n][i];
          acc[n][i] *= shrink;
        }
    }
    for (int step = 0; step < kTile / 16; ++step) {
      const uint32_t a[4] = {pack(scores[2 * step][0], scores[2 * step][1]),
                             pack(scores[2 * step][2], scores[2 * step][3]),
                             pack(scores[2 * step + 1][0], scores[2 * step + 1][1]),
                             pack(scores[2 * step + 1][2], scores[2 * step + 1][3])};
      for (int n = 0; n < kWidth / 8; n += 2) {
        uint32_t b[4];
        ldmatrix<kFault != Fault::kNotTransposed>(
            b, pack_address(values + now, step * 16 + lane % 16, n + lane / 16));
        mma(acc[n], a, b[0], b[1]);
        mma(acc[n + 1], a, b[2], b[3]);
      }
    }
    if (kFault != Fault::kNoBarrier) __syncthreads();  // the buffer just read is refilled next
  }
  for (int h = 0; h < 2; ++h) {
    const float inverse = 1 / quad_sum(total[h]);
    const int row = first + warp * 16 + lane / 4 + 8 * h;
    for (int n = 0; n < kWidth / 8 && row < length; ++n)
      *reinterpret_cast<uint32_t*>(o + base + size_t(row) * kWidth + n * 8 + lane % 4 * 2) =
          pack(acc[n][2 * h] * inverse, acc[n][2 * h + 1] * inverse);
  }
  wait<0>();
}

#define ATTENTION(NAME, FAULT)                                                     \
  extern "C" __global__ void __launch_bounds__(kThreads)                           \
      NAME(const __nv_bfloat16* q, const __nv_bfloat16* k, const __nv_bfloat16* v, \
           __nv_bfloat16* o, int length, float scale) {                            \
    attend<FAULT>(q, k, v, o, length, scale);                                      \
  }
ATTENTION(attention_forward, Fault::kNone)
ATTENTION(attention_wait_group, Fault::kWaitGroup)
ATTENTION(attention_no_barrier, Fault::kNoBarrier)
ATTENTION(attention_not_transposed, Fault::kNotTransposed)
