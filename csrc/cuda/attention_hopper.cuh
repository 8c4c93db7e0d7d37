// What attention's Hopper kernels share: which calls they take, tensor maps, the ranges of tiles.
#pragma once

#include "attention.cuh"
#include "hopper.cuh"

namespace fastlm::cuda {

// Two warpgroups compute and one fetches; a warp that computes has 16 rows.
constexpr int kConsumers = 2 * kWarpgroup, kHopperThreads = kConsumers + kWarpgroup;
constexpr int kConsumerWarps = kConsumers / 32, kOwnRows = 128;

// Which warpgroup computes, 0 or 1, or -1: the one that fetches. By a shuffle, so that the compiler
// knows it to be the same for a warp: products in branches that may diverge are serialised.
__device__ inline int consumer() { return __shfl_sync(~0u, int(threadIdx.x) / kWarpgroup, 0) - 1; }

// Tells the compiler what hopper_takes refuses: sizes are then constants of the launch.
__device__ inline const AttentionShape& unpacked(const AttentionShape& s) {
  __builtin_assume(s.cu_seqlens_q == nullptr);
  __builtin_assume(s.seqlens_k == nullptr);
  return s;
}

// By one lane of each warp that computes: it has read a buffer.
__device__ inline void release(Mbarrier* empty) {
  if (threadIdx.x % 32 == 0) arrive(empty);
}

// kCount rows of a head into a tile's panels; the barrier has been told of the bytes.
template <class T, int kDim, int kCount>
__device__ void load_panels(T* to, const CUtensorMap& map, Mbarrier* full, int row, int64_t head,
                            int64_t batch) {
  for (int panel = 0; panel < kDim / kPanel; ++panel)
    load_panel(to + panel * kCount * kPanel, map, full, panel * kPanel, row, int(head), int(batch));
}

// 2^x, with results below 2^-126 as 0.
__device__ inline float exp2_special(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// A result of a warpgroup, 64 x kDim, into panels of kStride rows, each row times its factor.
template <class T, int kDim, int kStride>
__device__ void put_panels(T* panels, const Fragment<kDim>& d, float upper, float lower) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float factor = h ? lower : upper;
      const Tile<T, kPanel> panel{panels + n / 8 * kStride * kPanel};
      *reinterpret_cast<uint32_t*>(panel.element(row + h * 8, n % 8 * 8 + lane % 4 * 2)) =
          pair<T>(d[n][2 * h] * factor, d[n][2 * h + 1] * factor);
    }
}

// Which elements of a result dropout keeps, a bit each: drawn when registers are free, which they
// are not when the result is there. words(n) draws for eight columns.
template <int kN> struct Kept {
  uint32_t bits[kN / 64];

  template <class Words> __device__ void draw(const DropoutRule& rule, const Words& words) {
#pragma unroll
    for (int n = 0; n < kN / 8; ++n) {
      const Random4 random = words(n);
      if (n % 8 == 0) bits[n / 8] = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        bits[n / 8] |= uint32_t(rule.keeps(random.word[i])) << (n % 8 * 4 + i);
      // Otherwise the compiler keeps what it compared instead of the bits.
      if (n % 8 == 7) asm volatile("" : "+r"(bits[n / 8]));
    }
  }
  __device__ bool at(int n, int i) const { return bits[n / 8] >> (n % 8 * 4 + i) & 1; }
};

// 16 columns of a result as an operand of the next product.
template <class T, int kN>
__device__ void as_operand(uint32_t (&a)[4], const Fragment<kN>& d, int step) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    a[i] = pair<T>(d[2 * step + i / 2][i % 2 * 2], d[2 * step + i / 2][i % 2 * 2 + 1]);
}

// ---- on the host ----

// A (batch, length, heads, head_dim) tensor. A dimension of one element may have any stride.
inline Extents extents_of(const Bshd& t, int64_t batch, int64_t length, int64_t heads,
                          int64_t head_dim) {
  const auto bytes = [](int64_t count, int64_t stride) {
    return uint64_t(count > 1 ? stride * 2 : 16);
  };
  return {t.data,
          {uint64_t(head_dim), uint64_t(length), uint64_t(heads), uint64_t(batch)},
          {bytes(length, t.row_stride), bytes(heads, t.head_stride), bytes(batch, t.batch_stride)}};
}

inline bool has_map(const Extents& t) {
  for (const uint64_t stride : t.strides)
    if (stride == 0 || stride % 16 != 0 || stride >= uint64_t(1) << 40) return false;
  return is_aligned(t.data) && t.sizes[0] % 8 == 0;
}

// f(element, std::integral_constant<width of a kernel's tiles>) for a call in 16 bits.
template <class F> void for_hopper_shape(const AttentionShape& s, const F& f) {
  const auto with = [&](auto element) {
    if (s.head_dim <= 64)
      f(element, std::integral_constant<int, 64>{});
    else
      f(element, std::integral_constant<int, 128>{});
  };
  s.dtype == DType::bf16 ? with(bf16{}) : with(f16{});
}

inline bool has_dropout(const AttentionShape& s) { return s.dropout_p > 0; }

// Whether a call is one for these kernels: its shape, its tensors with queries, those with keys.
inline bool hopper_takes(const AttentionShape& s, std::initializer_list<Bshd> of_queries,
                         std::initializer_list<Bshd> of_keys) {
  const int64_t widest = has_dropout(s) ? 64 : 128;  // wider, drawing would run out of registers
  if (s.dtype == DType::f32 || s.head_dim > widest || s.value_head_dim != s.head_dim ||
      s.head_dim == 0 || s.cu_seqlens_q || s.seqlens_k || s.keys == 0 || s.softcap > 0 ||
      s.bias.any() || !(s.softmax_scale > 0))
    return false;
  for (const Bshd& t : of_queries)
    if (!has_map(extents_of(t, s.batch, s.queries, s.heads, s.head_dim))) return false;
  for (const Bshd& t : of_keys)
    if (!has_map(extents_of(t, s.batch, s.keys, s.kv_heads, s.head_dim))) return false;
  return is_hopper();
}

}  // namespace fastlm::cuda
