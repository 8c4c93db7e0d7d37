// attention backward: dq in one kernel, dk and dv in another, each with its sums in registers and
// no atomics, so that the same call gives the same bits. That computes scores twice: 7 products
// where 5 would do with atomic additions to dq.
//
// Both recompute probabilities from the scores and lse, and use delta = sum over head_dim of
// dout * o, less the gradient of lse. A first kernel writes delta and lse, as two floats, of each
// query. With scores s, probabilities p and dropout factors f:
//   dv = (p f)^T dout;  ds = p (f (dout v^T) - delta) * ds / d(q k^T);  dq = ds k;  dk = ds^T q
//
// dq: a block owns 64 queries and goes through tiles of keys. dk, dv: a block owns 64 keys and goes
// through tiles of queries of each query head of its group, with scores transposed, so that what a
// block owns is always the rows of the result. The other side comes through two buffers that
// cp.async fills while the other is used; each side is read from memory once per block. Past a
// head_dim of 128 registers hold one sum and not two: blocks come in pairs, the even of dk and the
// odd of dv, and scores are computed three times.
#include "attention.cuh"

namespace fastlm::cuda {
namespace {

// ---- lse and delta ----

// (3, queries of all heads): lse, what it was rounded by, and delta. Of a query that saw no key lse
// is infinity: its probabilities are 0.
struct QueryRows {
  float* data;
  int64_t count;
  __device__ float* row(int which) const { return data + which * count; }
};

// A warp per query and head. Reads dout and o once.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    attention_delta_kernel(const AttentionBackward p, const QueryRows rows) {
  const Sequence seq(p.shape, blockIdx.z, blockIdx.y);
  const int query = int(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (query >= seq.queries) return;
  const T* o = row_of<T>(p.o, seq.batch, seq.first_query + query, blockIdx.y);
  const T* dout = row_of<T>(p.dout, seq.batch, seq.first_query + query, blockIdx.y);
  float sum = 0;
  for (int d = threadIdx.x % 32; d < p.shape.value_head_dim; d += 32)
    sum += widen(o[d]) * widen(dout[d]);
  sum = warp_sum(sum);
  if (threadIdx.x % 32 != 0) return;
  const int64_t at = seq.lse_start + query;
  const double lse = p.lse[at];
  const bool sees = lse != -INFINITY;
  rows.row(0)[at] = sees ? float(lse) : INFINITY;
  rows.row(1)[at] = sees ? float(lse - double(float(lse))) : 0.0f;
  rows.row(2)[at] = sum - (p.dlse ? float(p.dlse[at]) : 0.0f);
}

// ---- scores and their gradients ----

template <class T> struct Rules {
  Scale<T> scale;
  DropoutRule dropout;
};

// What of a query its row says.
struct QueryRow {
  float lse, rest, delta;
};

// Of one element: score becomes p f, product = dout v^T becomes ds.
template <class T>
__device__ void differentiate(float& score, float& product, bool seen, float bias,
                              const QueryRow& query, float dropped, const Scale<T>& scale) {
  const float shaped = scale.shaped ? scale.shape(score) : score;
  const float p = seen ? scale.probability(shaped + bias, query.lse, query.rest) : 0.0f;
  product = seen ? p * (dropped * product - query.delta) * scale.slope(shaped) : 0.0f;
  score = p * dropped;
}

// ---- dq ----

template <class T, int kDim> struct BackwardTiles {
  static constexpr int kOwn = kRows * kDim, kOther = kColumns<T, kDim> * kDim;
  static constexpr int kTileBytes = (2 * kOwn + 4 * kOther) * int(sizeof(T));
  static constexpr int kBytes = kTileBytes + 6 * kColumns<T, kDim> * int(sizeof(float));
  unsigned char* shared;

  __device__ Tile<T, kDim> own(int which) const {
    return {reinterpret_cast<T*>(shared) + which * kOwn};
  }
  __device__ Tile<T, kDim> other(int stage, int which) const {
    return {reinterpret_cast<T*>(shared) + 2 * kOwn + (stage * 2 + which) * kOther};
  }
  __device__ float* of_queries(int stage, int which) const {  // a row of QueryRows
    return reinterpret_cast<float*>(shared + kTileBytes) + (stage * 3 + which) * kColumns<T, kDim>;
  }
};

template <class T, int kDim, bool kBias>
__global__ void __launch_bounds__(kThreads, 2)
    attention_dq_kernel(const AttentionBackward p, const Rules<T> rules, const QueryRows rows,
                        const bool vector) {
  constexpr int kN = kColumns<T, kDim>;
  extern __shared__ __align__(128) unsigned char shared[];
  const BackwardTiles<T, kDim> tiles{shared};
  const AttentionShape& s = p.shape;
  const Sequence seq(s, blockIdx.z, blockIdx.y);
  const int query = int(gridDim.x - 1 - blockIdx.x) * kRows;
  if (query >= seq.queries) return;
  const int queries = min(kRows, seq.queries - query);
  const int head_dim = int(s.head_dim), value_head_dim = int(s.value_head_dim);
  const int64_t head = blockIdx.y, kv_head = head / (s.heads / s.kv_heads);
  const int first = seq.lowest(query) / kN, end = (seq.highest(query + queries - 1) + kN) / kN;
  const auto fetch = [&](int tile) {
    const int key = tile * kN, stage = tile % 2;
    const T* k = row_of<T>(p.k, seq.batch, seq.first_key + key, kv_head);
    const T* v = row_of<T>(p.v, seq.batch, seq.first_key + key, kv_head);
    load_tile<kN>(tiles.other(stage, 0), k, p.k.row_stride, seq.keys - key, head_dim, vector);
    load_tile<kN>(tiles.other(stage, 1), v, p.v.row_stride, seq.keys - key, value_head_dim, vector);
  };
  load_tile<kRows>(tiles.own(0), row_of<T>(p.q, seq.batch, seq.first_query + query, head),
                   p.q.row_stride, queries, head_dim, vector);
  load_tile<kRows>(tiles.own(1), row_of<T>(p.dout, seq.batch, seq.first_query + query, head),
                   p.dout.row_stride, queries, value_head_dim, vector);
  if (first < end) fetch(first);
  commit_copies();
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
  const int row = query + warp_row + lane / 4;
  const HeadBias bias(s, seq, head);
  QueryRow of_row[2] = {};
  for (int h = 0; h < 2; ++h) {
    const int64_t at = seq.lse_start + row + h * 8;
    if (row + h * 8 < seq.queries) of_row[h] = {rows.row(0)[at], rows.row(1)[at], rows.row(2)[at]};
  }
  Fragment<kDim> dq = {};
  for (int tile = first; tile < end; ++tile) {
    if (tile + 1 < end) fetch(tile + 1);
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    Fragment<kN> scores = {}, products = {};
    multiply_transposed<kN>(scores, tiles.own(0), warp_row, tiles.other(tile % 2, 0));
    multiply_transposed<kN>(products, tiles.own(1), warp_row, tiles.other(tile % 2, 1));
    const bool unmasked = seq.all_seen(query, query + kRows, tile * kN, tile * kN + kN);
#pragma unroll
    for (int n = 0; n < kN / 8; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int key = tile * kN + n * 8 + lane % 4 * 2, at = row + h * 8;
        float2 f = {1.0f, 1.0f};
        if (rules.dropout.seed)
          f = dropout_factors(rules.dropout, uint64_t(seq.lse_start + at), key);
        float2 added = {0.0f, 0.0f};
        if (kBias) added = {bias.at<T>(at, key), bias.at<T>(at, key + 1)};
        differentiate(scores[n][2 * h], products[n][2 * h], unmasked || seq.sees(at, key), added.x,
                      of_row[h], f.x, rules.scale);
        differentiate(scores[n][2 * h + 1], products[n][2 * h + 1],
                      unmasked || seq.sees(at, key + 1), added.y, of_row[h], f.y, rules.scale);
      }
    multiply<kN>(dq, products, tiles.other(tile % 2, 0));
    __syncthreads();
  }
  wait_copies<0>();
  __syncthreads();
  put_fragment(tiles.own(0), dq, 1.0f, 1.0f);
  __syncthreads();
  store_tile(tiles.own(0), row_of<T>(p.dq, seq.batch, seq.first_query + query, head),
             p.dq.row_stride, queries, head_dim, vector);
}

// ---- dk, dv ----

__device__ inline float dropout_factor(const DropoutRule& rule, uint64_t row, int key) {
  if (!rule.seed) return 1.0f;
  const float2 both = dropout_factors(rule, row, key / 2 * 2);
  return key % 2 ? both.y : both.x;
}

// Blocks to a tile of keys: one has both sums, or one has dk and the next dv.
template <int kDim> constexpr int kBlocksPerTile = kDim > 128 ? 2 : 1;

template <class T, int kDim, bool kBias>
__global__ void __launch_bounds__(kThreads, 2)
    attention_dkdv_kernel(const AttentionBackward p, const Rules<T> rules, const QueryRows rows_of,
                          const bool vector) {
  constexpr int kN = kColumns<T, kDim>;
  constexpr bool kBoth = kBlocksPerTile<kDim> == 1;
  const bool dv_alone = !kBoth && blockIdx.x % 2 == 1;
  extern __shared__ __align__(128) unsigned char shared[];
  const BackwardTiles<T, kDim> tiles{shared};
  const AttentionShape& s = p.shape;
  const int group = int(s.heads / s.kv_heads);
  const int head_dim = int(s.head_dim), value_head_dim = int(s.value_head_dim);
  const Sequence seq(s, blockIdx.z, int64_t(blockIdx.y) * group);
  const int key = int(blockIdx.x) / kBlocksPerTile<kDim> * kRows;
  if (key >= seq.keys) return;
  const int keys = min(kRows, seq.keys - key);
  const QueryTiles query_tiles(seq, key, keys, kN, group);
  const auto fetch = [&](int tile) {
    const int query = (query_tiles.first + tile % query_tiles.per_head) * kN, stage = tile % 2;
    const int in_group = tile / query_tiles.per_head, rows = seq.queries - query;
    const int64_t head = int64_t(blockIdx.y) * group + in_group;
    load_tile<kN>(tiles.other(stage, 0), row_of<T>(p.q, seq.batch, seq.first_query + query, head),
                  p.q.row_stride, rows, head_dim, vector);
    load_tile<kN>(tiles.other(stage, 1),
                  row_of<T>(p.dout, seq.batch, seq.first_query + query, head), p.dout.row_stride,
                  rows, value_head_dim, vector);
    const int64_t at = seq.lse_start + in_group * s.lse_head_stride + query;
    for (int i = threadIdx.x; i < 3 * kN; i += kThreads) {
      const bool live = i % kN < rows;
      copy_async_4(tiles.of_queries(stage, i / kN) + i % kN,
                   rows_of.row(i / kN) + at + (live ? i % kN : 0), live ? 4 : 0);
    }
  };
  load_tile<kRows>(tiles.own(0), row_of<T>(p.k, seq.batch, seq.first_key + key, blockIdx.y),
                   p.k.row_stride, keys, head_dim, vector);
  load_tile<kRows>(tiles.own(1), row_of<T>(p.v, seq.batch, seq.first_key + key, blockIdx.y),
                   p.v.row_stride, keys, value_head_dim, vector);
  if (query_tiles.count > 0) fetch(0);
  commit_copies();
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
  const int row = key + warp_row + lane / 4;  // the thread's first key
  Fragment<kDim> sum = {};                    // dk, or dv where it is alone
  Fragment<kBoth ? kDim : 8> dv = {};
  for (int tile = 0; tile < query_tiles.count; ++tile) {
    if (tile + 1 < query_tiles.count) fetch(tile + 1);
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    const int stage = tile % 2, query = (query_tiles.first + tile % query_tiles.per_head) * kN;
    const int in_group = tile / query_tiles.per_head;
    const int64_t lse_row = seq.lse_start + in_group * s.lse_head_stride + query;
    const HeadBias bias(s, seq, int64_t(blockIdx.y) * group + in_group);
    Fragment<kN> scores = {}, products = {};
    multiply_transposed<kN>(scores, tiles.own(0), warp_row, tiles.other(stage, 0));
    multiply_transposed<kN>(products, tiles.own(1), warp_row, tiles.other(stage, 1));
    const bool unmasked = seq.all_seen(query, query + kN, key, key + kRows);
#pragma unroll
    for (int n = 0; n < kN / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = n * 8 + lane % 4 * 2 + i % 2, at = row + i / 2 * 8;
        const bool seen = unmasked || seq.sees(query + column, at);
        const float f = dropout_factor(rules.dropout, uint64_t(lse_row + column), at);
        const float added = kBias ? bias.at<T>(query + column, at) : 0.0f;
        const QueryRow of_query{tiles.of_queries(stage, 0)[column],
                                tiles.of_queries(stage, 1)[column],
                                tiles.of_queries(stage, 2)[column]};
        differentiate(scores[n][i], products[n][i], seen, added, of_query, f, rules.scale);
      }
    if constexpr (kBoth) multiply<kN>(dv, scores, tiles.other(stage, 1));
    if (dv_alone) memcpy(products, scores, sizeof products);
    multiply<kN>(sum, products, tiles.other(stage, dv_alone));
    __syncthreads();
  }
  wait_copies<0>();
  __syncthreads();
  const auto write = [&](const Fragment<kDim>& result, Tile<T, kDim> by_way_of, const Bshd& to,
                         int width) {
    put_fragment(by_way_of, result, 1.0f, 1.0f);
    __syncthreads();
    store_tile(by_way_of, row_of<T>(to, seq.batch, seq.first_key + key, blockIdx.y), to.row_stride,
               keys, width, vector);
  };
  if constexpr (kBoth) write(dv, tiles.own(1), p.dv, value_head_dim);
  if (dv_alone)
    write(sum, tiles.own(0), p.dv, value_head_dim);
  else
    write(sum, tiles.own(0), p.dk, head_dim);
}

// ---- launches ----

template <class T, int kDim, bool kBias>
void backward(const AttentionBackward& p, const QueryRows& rows, cudaStream_t stream) {
  const AttentionShape& s = p.shape;
  constexpr int kShared = BackwardTiles<T, kDim>::kBytes;
  const Rules<T> rules{Scale<T>(s), DropoutRule(s.seed, s.dropout_p)};
  const bool vector = all_vectors(s, {p.dout, p.q, p.k, p.v, p.dq, p.dk, p.dv});
  if (s.queries > 0) {
    const dim3 grid(unsigned(ceil_div(s.queries, kRows)), unsigned(s.heads), unsigned(s.batch));
    allow_shared(attention_dq_kernel<T, kDim, kBias>, kShared, "attention_dq");
    attention_dq_kernel<T, kDim, kBias>
        <<<grid, kThreads, kShared, stream>>>(p, rules, rows, vector);
    check_launch("attention_dq");
  }
  if (s.keys > 0) {
    const dim3 grid(unsigned(ceil_div(s.keys, kRows) * kBlocksPerTile<kDim>), unsigned(s.kv_heads),
                    unsigned(s.batch));
    allow_shared(attention_dkdv_kernel<T, kDim, kBias>, kShared, "attention_dkdv");
    attention_dkdv_kernel<T, kDim, kBias>
        <<<grid, kThreads, kShared, stream>>>(p, rules, rows, vector);
    check_launch("attention_dkdv");
  }
}

}  // namespace

void launch_tiles(const AttentionBackward& p, cudaStream_t stream) {
  const AttentionShape& s = p.shape;
  // As long as lse: packed, that is heads * tokens.
  const int64_t count = s.cu_seqlens_q ? s.heads * s.lse_head_stride : s.batch * s.lse_batch_stride;
  const Workspace memory(3 * count, stream);
  const QueryRows rows{memory.data(), count};
  for_shape(s, [&](auto element, auto width, auto biased) {
    using T = decltype(element);
    if (count > 0 && s.queries > 0) {
      const dim3 grid(unsigned(ceil_div(s.queries, kThreads / 32)), unsigned(s.heads),
                      unsigned(s.batch));
      attention_delta_kernel<T><<<grid, kThreads, 0, stream>>>(p, rows);
      check_launch("attention_delta");
    }
    backward<T, decltype(width)::value, decltype(biased)::value>(p, rows, stream);
  });
}

}  // namespace fastlm::cuda
