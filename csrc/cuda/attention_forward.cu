// attention forward: online softmax (Milakov and Gimelshein 2018; Dao et al. 2022).
//
// A block computes 64 queries of one head. It reads its queries once, keys and values once per
// block of queries, through two buffers that cp.async fills while the other is used, and writes its
// output and lse once. Four warps take 16 queries each: scores and output stay in registers, and a
// row's maximum and sum need two shuffles. Blocks with the most keys start first.
//
// Before changing it: both barriers of the loop are needed. The first makes the copies of all
// threads visible, the second keeps the buffer that is refilled next from those that still read it.
#include "attention_softmax.cuh"

namespace fastlm::cuda {
namespace {

template <class T, int kDim> struct ForwardTiles {
  static constexpr int kOther = kColumns<T, kDim> * kDim;  // elements of a tile of keys
  static constexpr int kBytes = (kRows * kDim + 4 * kOther) * int(sizeof(T));
  Tile<T, kDim> q;
  T* buffers;
  __device__ explicit ForwardTiles(unsigned char* shared)
      : q{reinterpret_cast<T*>(shared)}, buffers(q.data + kRows * kDim) {}
  __device__ Tile<T, kDim> k(int stage) const { return {buffers + stage * 2 * kOther}; }
  __device__ Tile<T, kDim> v(int stage) const { return {buffers + (stage * 2 + 1) * kOther}; }
};

// Raw scores to those that a softmax takes. `row` is the thread's first query, `key` its first key.
template <int kN, bool kBias, class T>
__device__ void shape(Fragment<kN>& scores, const Scale<T>& scale, const HeadBias& bias, int row,
                      int key) {
#pragma unroll
  for (int n = 0; n < kN / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[n][i] = scale.shape(scores[n][i]);
      if (kBias) scores[n][i] += bias.at<T>(row + i / 2 * 8, key + n * 8 + i % 2);
    }
}

template <class T, int kDim, bool kBias>
__global__ void __launch_bounds__(kThreads, 2)
    attention_forward_kernel(const AttentionForward p, const Scale<T> scale, const float headroom,
                             const DropoutRule rule, const bool vector) {
  constexpr int kN = kColumns<T, kDim>;
  extern __shared__ __align__(128) unsigned char shared[];
  const ForwardTiles<T, kDim> tiles(shared);
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
    load_tile<kN>(tiles.k(stage), k, p.k.row_stride, seq.keys - key, head_dim, vector);
    load_tile<kN>(tiles.v(stage), v, p.v.row_stride, seq.keys - key, value_head_dim, vector);
  };
  load_tile<kRows>(tiles.q, row_of<T>(p.q, seq.batch, seq.first_query + query, head),
                   p.q.row_stride, queries, head_dim, vector);
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
  const int row = query + warp_row + lane / 4;
  const HeadBias bias(s, seq, head);
  if (first < end) fetch(first);
  commit_copies();
  Fragment<kDim> out = {};
  Softmax softmax;
  softmax.headroom = headroom;
  for (int tile = first; tile < end; ++tile) {
    if (tile + 1 < end) fetch(tile + 1);
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    Fragment<kN> scores = {};
    multiply_transposed<kN>(scores, tiles.q, warp_row, tiles.k(tile % 2));
    if (scale.shaped) shape<kN, kBias>(scores, scale, bias, row, tile * kN + lane % 4 * 2);
    mask<kN>(scores, seq, query, row, tile * kN);
    softmax.update<0, kN>(scores, scale,
                          [&](float score, float base, int) { return scale.power(score, base); });
    rescale<kDim>(out, softmax.shrink);
    drop<kN>(scores, rule, seq.lse_start + row, tile * kN);
    multiply<kN>(out, scores, tiles.v(tile % 2));
    __syncthreads();
  }
  wait_copies<0>();
  __syncthreads();  // without a key, others may still be writing queries
  float inverse[2];
  for (int h = 0; h < 2; ++h) {
    const float total = quad_sum(softmax.total[h]);
    inverse[h] = seq.overrun ? NAN : total > 0 ? 1.0f / total : 0.0f;
    if (lane % 4 == 0 && row + h * 8 < seq.queries)
      p.lse[seq.lse_start + row + h * 8] = scale.lse(softmax.peak[h], total, softmax.headroom);
  }
  put_fragment(tiles.q, out, inverse[0], inverse[1]);
  __syncthreads();
  store_tile(tiles.q, row_of<T>(p.o, seq.batch, seq.first_query + query, head), p.o.row_stride,
             queries, value_head_dim, vector);
}

}  // namespace

void launch_tiles(const AttentionForward& p, cudaStream_t stream) {
  const AttentionShape& s = p.shape;
  for_shape(s, [&](auto element, auto width, auto biased) {
    using T = decltype(element);
    constexpr int kDim = decltype(width)::value;
    const auto kernel = attention_forward_kernel<T, kDim, decltype(biased)::value>;
    allow_shared(kernel, ForwardTiles<T, kDim>::kBytes, "attention_forward");
    const dim3 grid(unsigned(ceil_div(s.queries, kRows)), unsigned(s.heads), unsigned(s.batch));
    kernel<<<grid, kThreads, ForwardTiles<T, kDim>::kBytes, stream>>>(
        p, Scale<T>(s), headroom_of<T>(s), DropoutRule(s.seed, s.dropout_p),
        all_vectors(s, {p.q, p.k, p.v, p.o}));
    check_launch("attention_forward");
  });
}

}  // namespace fastlm::cuda
