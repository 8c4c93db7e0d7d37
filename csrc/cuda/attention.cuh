// What attention's kernels share: sequences, which keys a query sees, tiles, scores and dropout.
//
// A block has four warps of 16 rows: a tile of 64 queries (or keys, where keys are what it owns).
// It goes through the other side in tiles of 64 rows, fewer where heads are wide, so that 6 % of a
// causal triangle at 1024 is wasted and two blocks fit on a multiprocessor. Heads of up to 256 take
// 97 KB at most, which every device from sm_80 on has, but for backward in float32: 161 KB.
#pragma once

#include "../attention.h"
#include "mma.cuh"
#include "philox.cuh"
#include "reduce.cuh"

namespace fastlm::cuda {

constexpr int kRows = 64, kThreads = 128;
template <class T, int kDim>
constexpr int kColumns = kDim == 64       ? 64
                         : sizeof(T) == 4 ? 8
                         : kDim == 128    ? 32
                                          : 16;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// From raw scores q k to exponentials. With a softcap or a bias scores are shaped first. In 16 bits
// the scale is folded into base 2, one multiply-add; in float32 the difference is taken in base e,
// because a rounded scale times log2(e) would put scores of 20 off by 1e-6.
template <class T> struct Scale {
  static constexpr bool kWide = sizeof(T) == 4;
  float softmax, softcap, natural, factor;
  bool shaped;

  explicit Scale(const AttentionShape& s)
      : softmax(float(s.softmax_scale)),
        softcap(float(s.softcap)),
        shaped(s.softcap > 0 || !(s.softmax_scale > 0) || s.bias.any()) {
    natural = shaped ? 1.0f : softmax;
    factor = kWide ? natural : float((shaped ? 1.0 : s.softmax_scale) * 1.4426950408889634);
  }
  __device__ float shape(float raw) const {
    return softcap > 0 ? softcap * tanhf(raw * softmax / softcap) : raw * softmax;
  }
  // d shaped / d raw, given the shaped score.
  __device__ float slope(float score) const {
    return softcap > 0 ? softmax * (1.0f - (score / softcap) * (score / softcap)) : softmax;
  }
  // What exponentials are relative to; where no key was seen, 0: they are all 0 then.
  __device__ float base(float peak) const { return peak > -INFINITY ? peak * factor : 0.0f; }
  __device__ float power(float score, float base) const {
    const float exponent = fmaf(score, factor, -base);
    return exp2f(kWide ? exponent * kLog2e : exponent);
  }
  // `headroom`: what exponentials were relative to beyond the peak, in the base of `power`.
  __device__ double lse(float peak, float total, float headroom = 0.0f) const {
    return double(base(peak) + headroom) * (kWide ? 1.0 : 0.6931471805599453) + log(double(total));
  }
  // exp(score - lse). In float32 lse is in two parts: one would put every probability of a row off.
  __device__ float probability(float score, float lse, float rest) const {
    const float power = fmaf(score, natural, -lse);
    return exp2f((kWide ? power - rest : power) * kLog2e);
  }
};

// One sequence of the batch: where it starts in q and k, how long it is, and what its queries see.
struct Sequence {
  int64_t index, batch, first_query, first_key, lse_start;
  int queries, keys, window_left, window_right;
  bool overrun;  // more keys than the cache holds: the result is NaN

  __device__ Sequence(const AttentionShape& s, int64_t b, int64_t head)
      : index(b),
        batch(b),
        first_query(0),
        first_key(0),
        queries(int(s.queries)),
        keys(int(s.keys)),
        window_left(int(s.window_left)),
        window_right(int(s.window_right)),
        overrun(false) {
    if (s.cu_seqlens_q) {
      batch = 0;  // packed: one row of tokens
      first_query = s.cu_seqlens_q[b];
      first_key = s.cu_seqlens_k[b];
      queries = int(s.cu_seqlens_q[b + 1] - first_query);
      keys = int(s.cu_seqlens_k[b + 1] - first_key);
    } else if (s.seqlens_k) {
      overrun = s.seqlens_k[b] > keys;
      keys = min(keys, s.seqlens_k[b]);
    }
    lse_start = batch * s.lse_batch_stride + head * s.lse_head_stride + first_query;
  }
  // The keys that a query sees: from lowest to highest, none where lowest > highest.
  __device__ int highest(int query) const {
    return window_right < 0 ? keys - 1 : min(keys - 1, query + keys - queries + window_right);
  }
  __device__ int lowest(int query) const {
    return window_left < 0 ? 0 : max(0, query + keys - queries - window_left);
  }
  // The queries that see a key: from earliest to latest, none where earliest > latest.
  __device__ int earliest(int key) const {
    return window_right < 0 ? 0 : max(0, key - keys + queries - window_right);
  }
  __device__ int latest(int key) const {
    if (key >= keys) return -1;
    return window_left < 0 ? queries - 1 : min(queries - 1, key - keys + queries + window_left);
  }
  __device__ bool sees(int query, int key) const {
    return query < queries && key >= lowest(query) && key <= highest(query);
  }
  // Whether every query of a tile sees every key of another: no mask is needed.
  __device__ bool all_seen(int query, int query_end, int key, int key_end) const {
    return query_end <= queries && key >= lowest(query_end - 1) && key_end - 1 <= highest(query);
  }
};

// What is added to the scores of one head: the mask and ALiBi. Kernels with a flag for it have none
// of this without.
struct HeadBias {
  const ScoreBias& bias;
  int64_t first;  // of the mask's elements
  int queries, keys;
  float slope;

  __device__ HeadBias(const AttentionShape& s, const Sequence& seq, int64_t head)
      : bias(s.bias),
        first(seq.batch * s.bias.mask_batch_stride + head * s.bias.mask_head_stride),
        queries(seq.queries),
        keys(seq.keys),
        slope(s.bias.alibi_slopes
                  ? s.bias.alibi_slopes[seq.index * s.bias.alibi_batch_stride + head]
                  : 0.0f) {}
  template <class T> __device__ float at(int query, int key) const {
    if (query >= queries || key >= keys) return 0.0f;
    const float alibi = slope * fabsf(float(query + keys - queries - key));
    if (!bias.mask) return -alibi;
    const int64_t i = first + query * bias.mask_query_stride + key * bias.mask_key_stride;
    if (bias.mask_dtype == DType::u8)
      return static_cast<const uint8_t*>(bias.mask)[i] ? -alibi : -INFINITY;
    const bool wide = sizeof(T) == 4 || bias.mask_dtype == DType::f32;
    const float added =
        wide ? static_cast<const float*>(bias.mask)[i] : widen(static_cast<const T*>(bias.mask)[i]);
    // Finite in base 2 too: where every key is hidden by a huge number, torch's softmax is uniform.
    return (added < -2e38f && added > -INFINITY ? -2e38f : added) - alibi;
  }
};

// The tiles of queries that see any of the keys from `key` on, of every head of a group in turn.
struct QueryTiles {
  int first, per_head, count;

  __device__ QueryTiles(const Sequence& seq, int key, int keys, int width, int group) {
    const int lowest = seq.earliest(key), highest = seq.latest(key + keys - 1);
    first = lowest / width;
    per_head = highest < lowest ? 0 : highest / width + 1 - first;
    count = per_head * group;
  }
};

template <class T> __device__ T* row_of(const Bshd& t, int64_t batch, int64_t row, int64_t head) {
  return static_cast<T*>(t.data) + batch * t.batch_stride + row * t.row_stride +
         head * t.head_stride;
}

// Starts the copy of kCount rows into a tile; rows and columns that there are not become zeros.
// Without `vector`, where rows do not start at multiples of 16 bytes, element by element.
template <int kCount, class T, int kDim>
__device__ void load_tile(Tile<T, kDim> tile, const T* from, int64_t stride, int rows, int head_dim,
                          bool vector) {
  constexpr int kAcross = Tile<T, kDim>::kPacksPerRow;
  for (int i = threadIdx.x; i < kCount * kAcross; i += kThreads) {
    const int row = i / kAcross, column = i % kAcross * kPack<T>;
    const int count = row < rows ? head_dim - column : 0;
    const T* source = count > 0 ? from + row * stride + column : from;
    T* to = tile.pack(row, i % kAcross);
    if (vector) {
      copy_async_16(to, source, count > 0 ? 16 : 0);
    } else {
      float values[kPack<T>];
      load(source, count, false, values);
      store(to, kPack<T>, true, values);
    }
  }
}

// Rows of a tile to global memory, 16 bytes at a time where `vector`.
template <class T, int kDim>
__device__ void store_tile(Tile<T, kDim> tile, T* to, int64_t stride, int rows, int head_dim,
                           bool vector) {
  constexpr int kAcross = Tile<T, kDim>::kPacksPerRow;
  for (int i = threadIdx.x; i < kRows * kAcross; i += kThreads) {
    const int row = i / kAcross, column = i % kAcross * kPack<T>;
    if (row >= rows || column >= head_dim) continue;
    float values[kPack<T>];
    load(tile.pack(row, i % kAcross), kPack<T>, true, values);
    store(to + row * stride + column, head_dim - column, vector, values);
  }
}

// A warp's 16 rows of a result, each times a factor, into its rows of a tile.
template <class T, int kDim>
__device__ void put_fragment(Tile<T, kDim> tile, const Fragment<kDim>& d, float upper,
                             float lower) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      *tile.element(row + i / 2 * 8, n * 8 + lane % 4 * 2 + i % 2) =
          narrow<T>(d[n][i] * (i < 2 ? upper : lower));
}

// The factors of two neighbouring keys, the first of them even.
__device__ inline float2 dropout_factors(const DropoutRule& rule, uint64_t row, int key) {
  const Random4 random = philox(uint64_t(*rule.seed), uint32_t(key / 4), row);
  const bool second = key % 4 != 0;
  return {rule.factor(second ? random.word[2] : random.word[0]),
          rule.factor(second ? random.word[3] : random.word[1])};
}

__device__ inline float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(~0u, v, 1));
  return fmaxf(v, __shfl_xor_sync(~0u, v, 2));
}
__device__ inline float quad_sum(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

// ---- on the host ----

inline bool is_vector(const Bshd& t, int64_t element_bytes) {
  return is_aligned(t.data) && t.batch_stride * element_bytes % 16 == 0 &&
         t.row_stride * element_bytes % 16 == 0 && t.head_stride * element_bytes % 16 == 0;
}
inline bool all_vectors(const AttentionShape& s, std::initializer_list<Bshd> tensors) {
  const int64_t bytes = s.dtype == DType::f32 ? 4 : 2;
  for (const Bshd& t : tensors)
    if (!is_vector(t, bytes)) return false;
  return s.head_dim * bytes % 16 == 0 && s.value_head_dim * bytes % 16 == 0;
}

// The kernels that attention.cu chooses from: few queries, any call, and those of 9.0.
bool is_decode(const AttentionShape& s);
void launch_decode(const AttentionForward& p, cudaStream_t stream);
void launch_tiles(const AttentionForward& p, cudaStream_t stream);
void launch_tiles(const AttentionBackward& p, cudaStream_t stream);
void launch_hopper(const AttentionForward& p, cudaStream_t stream);
void launch_hopper(const AttentionBackward& p, cudaStream_t stream);

// -inf outside the columns from first(h) to last(h), in the thread's rows h = 0 and 1.
template <int kN, class First, class Last>
__device__ void mask_outside(Fragment<kN>& scores, const First& first, const Last& last) {
  const int lane_column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int lowest = first(h) - lane_column, highest = last(h) - lane_column;
#pragma unroll
    for (int n = 0; n < kN / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (n * 8 + i < lowest || n * 8 + i > highest) scores[n][2 * h + i] = -INFINITY;
  }
}

// f(element, std::integral_constant<width of a kernel's tiles>, std::bool_constant<whether scores
// have a bias>) for a call.
template <class F> void for_shape(const AttentionShape& s, const F& f) {
  const int64_t widest = most(s.head_dim, s.value_head_dim);
  if (widest > 256)
    throw std::invalid_argument("attention: head_dim: expected at most 256 for CUDA, got " +
                                std::to_string(widest));
  const auto with = [&](auto element, auto width) {
    s.bias.any() ? f(element, width, std::true_type{}) : f(element, width, std::false_type{});
  };
  for_dtype(s.dtype, "attention", [&](auto element) {
    if (widest <= 64)
      with(element, std::integral_constant<int, 64>{});
    else if (widest <= 128)
      with(element, std::integral_constant<int, 128>{});
    else
      with(element, std::integral_constant<int, 256>{});
  });
}

}  // namespace fastlm::cuda
