// attention of few queries over many keys, as decoding with a cache has it, and the append to the
// cache.
//
// A block takes a slice of a sequence's keys for up to four rows, which are queries of the heads
// that share a key head: keys and values are read once for all of them, 16 bytes per lane, and
// slices are as many as fill the device (split-KV). As many lanes as a row has packs share a key
// (half as many where that is more than a warp: kCount is a lane's share); each such group of lanes
// has its own online softmax over every n-th key of the slice. Their results are joined by shuffles
// within a warp, through shared memory within a block, and by a second kernel over slices, always
// in the same order.
#include "attention.cuh"

namespace fastlm::cuda {
namespace {

constexpr int kDecodeRows = 4, kMostQueries = 8, kMostHeadDim = 256, kLeastKeys = 64;
constexpr int kWarps = kThreads / 32;

// What of a row is known after some of its keys: their output, the largest score, and the sum of
// exponentials relative to that. The output is divided by the sum at every step, because a sum of
// large values could overflow.
template <int kCount> struct Partial {
  float peak = -INFINITY, total = 0.0f, out[kCount] = {};

  template <class T> __device__ void join(const Partial& other, const Scale<T>& scale) {
    const float highest = fmaxf(peak, other.peak);
    const float base = scale.base(highest);
    const float ours = total * scale.power(peak, base);
    const float theirs = other.total * scale.power(other.peak, base);
    peak = highest;
    total = ours + theirs;
    const float inverse = total == 0 ? 0.0f : __fdividef(1.0f, total);
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      out[i] = out[i] * (ours * inverse) + other.out[i] * (theirs * inverse);
  }
};

// Where slices leave their results: (row, slice, 2 + value_head_dim), peak and total before the
// output.
struct Slices {
  float* partial;
  int count;
  __device__ float* at(int64_t row, int slice, int64_t value_head_dim) const {
    return partial + (row * count + slice) * (2 + value_head_dim);
  }
};

// Rows of a sequence and key head are (query, head in group); this is their place in lse and o.
struct DecodeRow {
  int query;
  int64_t head;
  __device__ DecodeRow(const AttentionShape& s, int64_t kv_head, int row) {
    const int group = int(s.heads / s.kv_heads);
    query = row / group;
    head = kv_head * group + row % group;
  }
  __device__ int64_t linear(const AttentionShape& s, int64_t batch) const {
    return (batch * s.heads + head) * s.queries + query;
  }
};

template <class T, int kCount, bool kBias>
__global__ void __launch_bounds__(kThreads)
    attention_decode_kernel(const AttentionForward p, const Scale<T> scale, const Slices slices,
                            const int lanes_per_key, const bool vector) {
  __shared__ float exchange[kWarps][kDecodeRows][2 + kMostHeadDim];
  const AttentionShape& s = p.shape;
  const int rows = int(s.queries * (s.heads / s.kv_heads));
  const int value_head_dim = int(s.value_head_dim);
  const int row_groups = (rows + kDecodeRows - 1) / kDecodeRows;
  const int64_t kv_head = blockIdx.y / row_groups, batch = blockIdx.z;
  const int first_row = int(blockIdx.y) % row_groups * kDecodeRows;
  const Sequence seq(s, batch, 0);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = lane % lanes_per_key * kCount;
  const int in_row = int(s.head_dim) - column, in_value = value_head_dim - column;
  float q[kDecodeRows][kCount];
  int lowest[kDecodeRows], highest[kDecodeRows];
#pragma unroll
  for (int r = 0; r < kDecodeRows; ++r) {
    const DecodeRow row(s, kv_head, first_row + r);
    const bool live = first_row + r < rows;
    lowest[r] = live ? seq.lowest(row.query) : 0;
    highest[r] = live ? seq.highest(row.query) : -1;
    load(row_of<T>(p.q, batch, live ? row.query : 0, live ? row.head : 0) + column,
         live ? in_row : 0, vector, q[r]);
  }
  const int per_slice = (seq.keys + slices.count - 1) / slices.count;
  const int begin = int(blockIdx.x) * per_slice, end = min(begin + per_slice, seq.keys);
  const int keys_per_warp = 32 / lanes_per_key;
  Partial<kCount> parts[kDecodeRows];
  // Every lane of a warp goes through the loop equally often: the shuffles need them all.
  for (int at = begin + warp * keys_per_warp; at < end; at += kWarps * keys_per_warp) {
    const int key = at + lane / lanes_per_key;
    float k[kCount], v[kCount];
    const bool live = key < end;
    const int64_t safe = live ? key : begin;
    load(row_of<T>(p.k, batch, safe, kv_head) + column, live ? in_row : 0, vector, k);
    load(row_of<T>(p.v, batch, safe, kv_head) + column, live ? in_value : 0, vector, v);
#pragma unroll
    for (int r = 0; r < kDecodeRows; ++r) {
      float score = 0;
#pragma unroll
      for (int i = 0; i < kCount; ++i) score = fmaf(q[r][i], k[i], score);
      for (int other = lanes_per_key / 2; other > 0; other /= 2)
        score += __shfl_xor_sync(~0u, score, other);
      if (scale.shaped) score = scale.shape(score);
      if (key >= end || key < lowest[r] || key > highest[r]) continue;
      if (kBias) {
        const DecodeRow row(s, kv_head, first_row + r);
        score += HeadBias(s, seq, row.head).at<T>(row.query, key);
      }
      Partial<kCount> one;
      one.peak = score;
      one.total = 1.0f;
#pragma unroll
      for (int i = 0; i < kCount; ++i) one.out[i] = v[i];
      parts[r].join(one, scale);
    }
  }
#pragma unroll
  for (int r = 0; r < kDecodeRows; ++r) {
    for (int other = lanes_per_key; other < 32; other *= 2) {
      Partial<kCount> theirs;
      theirs.peak = __shfl_xor_sync(~0u, parts[r].peak, other);
      theirs.total = __shfl_xor_sync(~0u, parts[r].total, other);
#pragma unroll
      for (int i = 0; i < kCount; ++i) theirs.out[i] = __shfl_xor_sync(~0u, parts[r].out[i], other);
      parts[r].join(theirs, scale);
    }
    if (lane >= lanes_per_key) continue;
    exchange[warp][r][0] = parts[r].peak;
    exchange[warp][r][1] = parts[r].total;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (i < in_value) exchange[warp][r][2 + column + i] = parts[r].out[i];
  }
  __syncthreads();
  for (int r = 0; r < kDecodeRows && first_row + r < rows; ++r) {
    const DecodeRow row(s, kv_head, first_row + r);
    float* const slice = slices.at(row.linear(s, batch), int(blockIdx.x), value_head_dim);
    for (int d = threadIdx.x; d == 0 || d < value_head_dim; d += kThreads) {
      Partial<1> all;
      for (int w = 0; w < kWarps; ++w)
        all.join({exchange[w][r][0], exchange[w][r][1], {exchange[w][r][2 + d]}}, scale);
      if (d < value_head_dim) slice[2 + d] = all.out[0];
      if (d > 0) continue;
      slice[0] = all.peak;
      slice[1] = all.total;
    }
  }
}

// A block per query and head joins its slices; reads them once, writes o and lse once.
template <class T>
__global__ void __launch_bounds__(kThreads)
    attention_join_kernel(const AttentionForward p, const Scale<T> scale, const Slices slices) {
  const AttentionShape& s = p.shape;
  const int64_t query = blockIdx.x, head = blockIdx.y, batch = blockIdx.z;
  const Sequence seq(s, batch, head);
  const int64_t row = (batch * s.heads + head) * s.queries + query;
  for (int d = threadIdx.x; d == 0 || d < s.value_head_dim; d += kThreads) {
    Partial<1> all;
    for (int i = 0; i < slices.count; ++i) {
      const float* slice = slices.at(row, i, s.value_head_dim);
      all.join({slice[0], slice[1], {d < s.value_head_dim ? slice[2 + d] : 0.0f}}, scale);
    }
    if (d == 0) p.lse[seq.lse_start + query] = scale.lse(all.peak, all.total);
    if (d < s.value_head_dim)
      row_of<T>(p.o, batch, query, head)[d] = narrow<T>(seq.overrun ? NAN : all.out[0]);
  }
}

// Elements of kBytes, whatever they mean. Rows past the capacity are not written.
template <class Element>
__global__ void __launch_bounds__(kThreads) cache_append_kernel(const CacheAppend p) {
  const int64_t i = blockIdx.x, batch = blockIdx.z, head = blockIdx.y;
  const int64_t to = p.seqlens[batch] + i;
  if (to >= p.capacity) return;
  for (int d = threadIdx.x; d < p.head_dim; d += kThreads)
    row_of<Element>(p.k_cache, batch, to, head)[d] = row_of<Element>(p.k, batch, i, head)[d];
  for (int d = threadIdx.x; d < p.value_head_dim; d += kThreads)
    row_of<Element>(p.v_cache, batch, to, head)[d] = row_of<Element>(p.v, batch, i, head)[d];
}

}  // namespace

bool is_decode(const AttentionShape& s) {
  return s.queries <= kMostQueries && !s.cu_seqlens_q && s.dropout_p == 0;
}

void launch_decode(const AttentionForward& p, cudaStream_t stream) {
  const AttentionShape& s = p.shape;
  for_shape(s, [&](auto element, auto width, auto biased) {
    using T = decltype(element);
    constexpr int kCount = most(kPack<T>, decltype(width)::value / 32);
    int lanes = 1;
    while (lanes * kCount < most(s.head_dim, s.value_head_dim)) lanes *= 2;
    const int64_t rows = s.queries * (s.heads / s.kv_heads);
    const int64_t blocks = s.batch * s.kv_heads * ceil_div(rows, kDecodeRows);
    const int64_t fills = ceil_div(4 * multiprocessors(), blocks);
    const int64_t count = most(1, least(fills, s.keys / kLeastKeys));
    const int64_t results = s.batch * s.heads * s.queries * count;
    const Workspace partial(results * (2 + s.value_head_dim), stream);
    const Slices slices{partial.data(), int(count)};
    const dim3 grid(unsigned(count), unsigned(blocks / s.batch), unsigned(s.batch));
    attention_decode_kernel<T, kCount, decltype(biased)::value><<<grid, kThreads, 0, stream>>>(
        p, Scale<T>(s), slices, lanes, all_vectors(s, {p.q, p.k, p.v}));
    check_launch("attention_decode");
    const dim3 joins(unsigned(s.queries), unsigned(s.heads), unsigned(s.batch));
    attention_join_kernel<T><<<joins, kThreads, 0, stream>>>(p, Scale<T>(s), slices);
    check_launch("attention_join");
  });
}

void launch(const CacheAppend& p, int64_t stream) {
  if (p.batch == 0 || p.length == 0 || p.kv_heads == 0) return;
  const dim3 grid(unsigned(p.length), unsigned(p.kv_heads), unsigned(p.batch));
  if (p.dtype == DType::f32)
    cache_append_kernel<uint32_t><<<grid, kThreads, 0, stream_of(stream)>>>(p);
  else
    cache_append_kernel<uint16_t><<<grid, kThreads, 0, stream_of(stream)>>>(p);
  check_launch("cache_append");
}

}  // namespace fastlm::cuda
