// attention backward on Hopper: dq, dk and dv in one pass of five products, by TMA, wgmma and
// specialised warps, and deterministic.
//
// A block owns 128 keys of one head, 64 a warpgroup, and goes through the tiles of queries that see
// them, of each query head of its group. Scores and probabilities are transposed, keys by queries,
// so that they are operands of dv = p^T dout and dk = ds^T q as they stand in registers; ds also
// goes through shared memory for dq = ds k, which all keys of a block add to. One thread fetches
// queries and dout into two buffers ahead of the products.
//
// A block's part of dq is added to memory by the copy engine in float32. Blocks take turns at each
// tile of queries, from the last keys that it sees to the first: always the same order, so the same
// bits. With a causal mask nobody waits: block j reaches tile i in step i - j, just after block
// j + 1. Two warps do nothing but wait for a turn and issue the addition. Blocks number themselves
// as they start, so that who is waited for has started.
//
// A kernel before it writes delta = sum over head_dim of dout * o and lse in base 2 by tiles, one
// after it rounds dq. Reads q and dout once per block, k and v once; memory sees dq once per block
// of keys and tile of queries, in L2.
//
// Before changing it: the order of turns and the tiles of a block must agree (Tiles), or blocks
// wait for ever. consume() is one long function because ptxas spills where parts of it are their
// own.
#include "attention_hopper_exchange.cuh"

namespace fastlm::cuda {
namespace {

constexpr int kKeys = 2 * kRows;

struct BackwardMaps {
  CUtensorMap dout, q, k, v, dk, dv;
};

template <class T> struct Call {
  AttentionBackward p;
  Scale<T> scale;
  DropoutRule dropout;
  Exchange exchange;
  int key_tiles;
};

template <class T, int kDim> struct BackwardShared {
  static constexpr int kQueries = kTileQueries<kDim>;
  T k[kKeys * kDim], v[kKeys * kDim], q[2][kQueries * kDim], dout[2][kQueries * kDim];
  T ds[2][kKeys * kQueries];
  float dq[2][kPart], rows[2][2][kQueries];
  Mbarrier keys_full, full[2], empty[2], dq_full[2], dq_empty[2];
  unsigned ticket;
};

// The keys of a block and the tiles of queries that see them, one after the other.
template <class T, int kDim> struct Tiles {
  static constexpr int kQueries = BackwardShared<T, kDim>::kQueries;
  int64_t batch, kv_head, group;
  int block, key;
  Sequence seq;
  QueryTiles range;

  __device__ Tiles(const Call<T>& call, unsigned ticket)
      : batch(ticket / call.key_tiles / call.p.shape.kv_heads),
        kv_head(ticket / call.key_tiles % call.p.shape.kv_heads),
        group(call.p.shape.heads / call.p.shape.kv_heads),
        block(call.key_tiles - 1 - int(ticket % call.key_tiles)),
        key(block * kKeys),
        seq(unpacked(call.p.shape), batch, kv_head * group),
        range(seq, key, min(kKeys, seq.keys - key), kQueries, int(group)) {}

  __device__ int index(int step) const { return range.first + step % range.per_head; }
  __device__ int query(int step) const { return index(step) * kQueries; }
  __device__ int64_t head(int step) const { return kv_head * group + step / range.per_head; }
  // The head's number among those of all batches.
  __device__ int64_t row(int step, int64_t heads) const { return batch * heads + head(step); }
  // How many blocks add to a tile of queries before this one does.
  __device__ unsigned turn(int step) const {
    const int last_query = min(query(step) + kQueries, seq.queries) - 1;
    return unsigned(seq.highest(last_query) / kKeys - block);
  }
};

// ---- the thread that fetches ----

template <class T, int kDim>
__device__ void produce(const Call<T>& call, const BackwardMaps& maps, const Tiles<T, kDim>& tiles,
                        BackwardShared<T, kDim>& shared) {
  constexpr int kQueries = Tiles<T, kDim>::kQueries;
  arrive_expecting(&shared.keys_full, 2 * sizeof shared.k);
  load_panels<T, kDim, kKeys>(shared.k, maps.k, &shared.keys_full, tiles.key, tiles.kv_head,
                              tiles.batch);
  load_panels<T, kDim, kKeys>(shared.v, maps.v, &shared.keys_full, tiles.key, tiles.kv_head,
                              tiles.batch);
  Ring<2> ring;
  for (int step = 0; step < tiles.range.count; ++step, ring.advance()) {
    Mbarrier* const full = &shared.full[ring.stage];
    const int64_t head = tiles.head(step);
    const int64_t tile = call.exchange.tile(tiles.row(step, call.p.shape.heads), tiles.index(step));
    wait(&shared.empty[ring.stage], ring.parity ^ 1);
    arrive_expecting(full, 2 * sizeof shared.q[0] + sizeof shared.rows[0]);
    load_panels<T, kDim, kQueries>(shared.q[ring.stage], maps.q, full, tiles.query(step), head,
                                   tiles.batch);
    load_bytes(shared.rows[ring.stage], call.exchange.rows + tile * 2 * kQueries,
               sizeof shared.rows[0], full);
    load_panels<T, kDim, kQueries>(shared.dout[ring.stage], maps.dout, full, tiles.query(step),
                                   head, tiles.batch);
  }
}

// ---- the threads that add to dq, one for each warpgroup ----

template <class T, int kDim>
__device__ void add_parts(const Call<T>& call, const Tiles<T, kDim>& tiles,
                          BackwardShared<T, kDim>& shared, int warpgroup) {
  uint32_t parity = 0;
  for (int step = 0; step < tiles.range.count; ++step, parity ^= 1) {
    const int64_t tile = call.exchange.tile(tiles.row(step, call.p.shape.heads), tiles.index(step));
    const unsigned turn = tiles.turn(step);
    unsigned* const turns = call.exchange.turns + 2 * tile + warpgroup;
    wait(&shared.dq_full[warpgroup], parity);
    while (load_acquire(turns) != turn) __nanosleep(20);
    fence_async();
    if (turn == 0)
      store_bytes(call.exchange.part(tile, warpgroup), shared.dq[warpgroup], kPart * 4);
    else
      add_floats(call.exchange.part(tile, warpgroup), shared.dq[warpgroup], kPart * 4);
    commit_stores();
    wait_stores();
    arrive(&shared.dq_empty[warpgroup]);
    fence_async();
    store_release(turns, turn + 1);
  }
}

// ---- the warpgroups that compute ----

// Barrier 1: both warpgroups.
__device__ inline void sync_consumers() { sync_threads(1, kConsumers); }

// d (64 x kN) = A B^T, of kDim columns each, in panels of kKeys and kN rows.
template <class T, int kDim, int kN>
__device__ void multiply_rows(Fragment<kN>& d, const T* a, const T* b) {
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    const int panel = step * 16 / kPanel, column = step * 16 % kPanel;
    multiply_async<T, kN, false, false>(d, operand(a + panel * kKeys * kPanel + column),
                                        operand(b + panel * kN * kPanel + column), step > 0);
  }
}

// d (64 x kDim) += A (64 x kN, in registers) B, kN rows of kDim columns.
template <class T, int kDim, int kN>
__device__ void multiply_columns(Fragment<kDim>& d, const uint32_t (&a)[kN / 16][4], const T* b) {
#pragma unroll
  for (int step = 0; step < kN / 16; ++step)
    multiply_async<T, kDim, true>(d, a[step], operand(b + step * 16 * kPanel, kN * kPanelRowBytes),
                                  true);
}

// Random words for the thread's elements in eight columns of queries: `row` is the mask's row of
// the first of its two, `key` the first of its two keys. A draw is for one query and four keys,
// which four lanes hold: each draws for one of the four pairs of query and key, and they exchange
// words as a transposition does.
__device__ inline Random4 draw(const DropoutRule& rule, int64_t row, int key) {
  const int quarter = threadIdx.x / 4 % 4;
  Random4 random = philox(uint64_t(*rule.seed), uint32_t(key + quarter / 2 * 8) / 4,
                          uint64_t(row + quarter % 2));
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & bit) continue;
      const bool upper = quarter & bit;
      uint32_t &low = random.word[j], &high = random.word[j | bit];
      const uint32_t theirs = __shfl_xor_sync(~0u, upper ? low : high, 4 * bit);
      (upper ? low : high) = theirs;
    }
  return random;
}

// Of one tile: scores become p f, products = dout v^T become ds / softmax_scale. `row` is the
// thread's first key. Queries that there are not have an infinite lse.
template <class T, int kQueries, bool kDropout>
__device__ void differentiate(Fragment<kQueries>& scores, Fragment<kQueries>& products,
                              const Call<T>& call, const Sequence& seq, int query, int row,
                              const float (&rows)[2][kQueries], const Kept<kQueries>& kept) {
  const int lane = threadIdx.x % 32, first_key = row - row % kRows;
  if (!seq.all_seen(query, query + kQueries, first_key, first_key + kRows))
    mask_outside<kQueries>(
        scores, [&](int h) { return seq.earliest(row + h * 8) - query; },
        [&](int h) { return seq.latest(row + h * 8) - query; });
#pragma unroll
  for (int n = 0; n < kQueries / 8; ++n) {
    const int column = n * 8 + lane % 4 * 2;
    const float2 lse = *reinterpret_cast<const float2*>(&rows[0][column]);
    const float2 delta = *reinterpret_cast<const float2*>(&rows[1][column]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float power = fmaf(scores[n][i], call.scale.factor, -(i % 2 ? lse.y : lse.x));
      const float p = exp2_special(power), of = i % 2 ? delta.y : delta.x;
      const float factor = !kDropout ? 1.0f : kept.at(n, i) ? call.dropout.scale : 0.0f;
      products[n][i] = p * (factor * products[n][i] - of);
      scores[n][i] = p * factor;
    }
  }
}

// A tile of dq: this warpgroup's queries, or where a tile has 64, its half of the columns.
template <class T, int kDim>
__device__ void multiply_keys(Fragment<kPanel>& dq, const T* ds, const T* k, int warpgroup) {
  constexpr int kPanelSize = kKeys * kPanel;
  const T* const a = ds + (kDim == 64 ? warpgroup * kPanelSize : 0);
  const T* const b = k + (kDim == 64 ? 0 : warpgroup * kPanelSize);
#pragma unroll
  for (int step = 0; step < kKeys / 16; ++step)
    multiply_async<T, kPanel, true, true>(dq, operand(a + step * 16 * kPanel),
                                          operand(b + step * 16 * kPanel), step > 0);
}

template <class T, int kDim, bool kDropout>
__device__ void consume(const Call<T>& call, const BackwardMaps& maps, const Tiles<T, kDim>& tiles,
                        BackwardShared<T, kDim>& shared) {
  constexpr int kQueries = Tiles<T, kDim>::kQueries;
  const int mine = consumer(), lane = threadIdx.x % 32;
  const int own = threadIdx.x / 32 % 4 * 16 + lane / 4, row = tiles.key + mine * kRows + own;
  Fragment<kDim> dk = {}, dv = {};
  Ring<2> ring;
  wait(&shared.keys_full, 0);
  for (int step = 0; step < tiles.range.count; ++step, ring.advance()) {
    const T *q = shared.q[ring.stage], *dout = shared.dout[ring.stage];
    const T* const own_keys = shared.k + mine * kRows * kPanel;
    Kept<kQueries> kept;
    if (kDropout) {
      const int64_t mask_row = tiles.seq.lse_start + tiles.query(step) + lane % 4 * 2 +
                               step / tiles.range.per_head * call.p.shape.lse_head_stride;
      kept.draw(call.dropout, [&](int n) { return draw(call.dropout, mask_row + n * 8, row); });
    }
    Fragment<kQueries> scores, products;
    wait(&shared.full[ring.stage], ring.parity);
    begin_products();
    multiply_rows<T, kDim, kQueries>(scores, own_keys, q);
    multiply_rows<T, kDim, kQueries>(products, shared.v + mine * kRows * kPanel, dout);
    commit_products();
    wait_products<0>();
    pin<kQueries>(scores);
    pin<kQueries>(products);
    differentiate<T, kQueries, kDropout>(scores, products, call, tiles.seq, tiles.query(step), row,
                                         shared.rows[ring.stage], kept);
    uint32_t p[kQueries / 16][4], ds[kQueries / 16][4];
#pragma unroll
    for (int i = 0; i < kQueries / 16; ++i) {
      as_operand<T, kQueries>(p[i], scores, i);
      as_operand<T, kQueries>(ds[i], products, i);
    }
    begin_products();
    multiply_columns<T, kDim, kQueries>(dv, p, dout);
    multiply_columns<T, kDim, kQueries>(dk, ds, q);
    commit_products();
    T* const exchanged = shared.ds[ring.stage];
#pragma unroll
    for (int i = 0; i < kQueries / 16; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = i * 16 + j / 2 * 8 + lane % 4 * 2;
        const Tile<T, kPanel> panel{exchanged + column / kPanel * kKeys * kPanel};
        *reinterpret_cast<uint32_t*>(
            panel.element(mine * kRows + own + j % 2 * 8, column % kPanel)) = ds[i][j];
      }
    fence_async();
    sync_consumers();
    Fragment<kPanel> dq;
    begin_products();
    multiply_keys<T, kDim>(dq, exchanged, shared.k, mine);
    commit_products();
    wait_products<1>();
    pin<kDim>(dk);
    pin<kDim>(dv);
    release(&shared.empty[ring.stage]);
    wait_products<0>();
    pin<kPanel>(dq);
    wait(&shared.dq_empty[mine], step % 2 ^ 1);
    float4* const part = reinterpret_cast<float4*>(shared.dq[mine]) + threadIdx.x % kWarpgroup;
#pragma unroll
    for (int n = 0; n < kPanel / 8; ++n)
      part[n * kWarpgroup] = {dq[n][0], dq[n][1], dq[n][2], dq[n][3]};
    fence_async();
    arrive(&shared.dq_full[mine]);
  }
  sync_consumers();  // nobody reads keys and values any more: results take their places
  const float scale = call.scale.softmax;
  T* const own_dk = shared.k + mine * kRows * kPanel;
  T* const own_dv = shared.v + mine * kRows * kPanel;
  put_panels<T, kDim, kKeys>(own_dk, dk, scale, scale);
  put_panels<T, kDim, kKeys>(own_dv, dv, 1.0f, 1.0f);
  fence_async();
  sync_threads(2 + mine, kWarpgroup);
  if (threadIdx.x % kWarpgroup != 0) return;
  for (int panel = 0; panel < kDim / kPanel; ++panel) {
    const int from = panel * kKeys * kPanel, first = tiles.key + mine * kRows;
    store_panel(maps.dk, own_dk + from, panel * kPanel, first, int(tiles.kv_head),
                int(tiles.batch));
    store_panel(maps.dv, own_dv + from, panel * kPanel, first, int(tiles.kv_head),
                int(tiles.batch));
  }
  commit_stores();
  wait_stores();
}

template <class T, int kDim, bool kDropout>
__global__ void __launch_bounds__(kHopperThreads, 1)
    attention_hopper_backward_kernel(const Call<T> call,
                                     const __grid_constant__ BackwardMaps maps) {
  using Shared = BackwardShared<T, kDim>;
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    if (shared_address(memory) % 1024 != 0) __trap();  // the swizzle counts from there
    shared.ticket = atomicAdd(call.exchange.ticket, 1u);
    initialize(&shared.keys_full, 1);
    for (int i = 0; i < 2; ++i) {
      initialize(&shared.full[i], 1);
      initialize(&shared.empty[i], kConsumerWarps);
      initialize(&shared.dq_full[i], kWarpgroup);
      initialize(&shared.dq_empty[i], 1);
    }
    fence_async();
  }
  __syncthreads();
  const Tiles<T, kDim> tiles(call, shared.ticket);
  if (consumer() < 0) {
    give_registers<24>();
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 != 0) return;
    if (warp == 0) produce<T, kDim>(call, maps, tiles, shared);
    if (warp == 1 || warp == 2) add_parts<T, kDim>(call, tiles, shared, warp - 1);
  } else {
    take_registers<240>();
    consume<T, kDim, kDropout>(call, maps, tiles, shared);
  }
}

template <class T, int kDim, bool kDropout>
void backward(const AttentionBackward& p, cudaStream_t stream) {
  using Shared = BackwardShared<T, kDim>;
  constexpr int kQueries = Shared::kQueries;
  const AttentionShape& s = p.shape;
  const int tiles = int(ceil_div(s.queries, kQueries)), key_tiles = int(ceil_div(s.keys, kKeys));
  const int64_t all = s.batch * s.heads * tiles;
  const Workspace memory(all * (2 * kPart + 2 * kQueries + 2) + 4, stream);
  Exchange exchange{memory.data(), memory.data() + all * 2 * kPart, nullptr, nullptr, tiles};
  exchange.turns = reinterpret_cast<unsigned*>(exchange.rows + all * 2 * kQueries);
  exchange.ticket = exchange.turns + 2 * all;
  const unsigned heads = unsigned(s.heads), batch = unsigned(s.batch);

  const dim3 rows(unsigned(ceil_div(tiles * kQueries, kThreads / (kDim / kPack<T>))), heads, batch);
  attention_hopper_delta_kernel<T, kDim><<<rows, kThreads, 0, stream>>>(p, exchange, kQueries);
  check_launch("attention_hopper_delta");

  const auto map = [&](const Bshd& t, int64_t length, int64_t count, int tile) {
    return panel_map<T>(extents_of(t, s.batch, length, count, s.head_dim), uint32_t(tile));
  };
  const BackwardMaps maps{
      map(p.dout, s.queries, s.heads, kQueries), map(p.q, s.queries, s.heads, kQueries),
      map(p.k, s.keys, s.kv_heads, kKeys),       map(p.v, s.keys, s.kv_heads, kKeys),
      map(p.dk, s.keys, s.kv_heads, kRows),      map(p.dv, s.keys, s.kv_heads, kRows)};
  const Call<T> call{p, Scale<T>(s), DropoutRule(s.seed, s.dropout_p), exchange, key_tiles};
  const auto kernel = attention_hopper_backward_kernel<T, kDim, kDropout>;
  allow_shared(kernel, sizeof(Shared), "attention_hopper_backward");
  const unsigned blocks = unsigned(key_tiles * s.batch * s.kv_heads);
  kernel<<<blocks, kHopperThreads, sizeof(Shared), stream>>>(call, maps);
  check_launch("attention_hopper_backward");

  const dim3 parts(unsigned(2 * tiles), heads, batch);
  attention_hopper_dq_kernel<T, kDim>
      <<<parts, kThreads, 0, stream>>>(p, exchange, float(s.softmax_scale));
  check_launch("attention_hopper_dq");
}

}  // namespace

void launch_hopper(const AttentionBackward& p, cudaStream_t stream) {
  for_hopper_shape(p.shape, [&](auto element, auto width) {
    using T = decltype(element);
    constexpr int kDim = decltype(width)::value;
    if (!has_dropout(p.shape)) return backward<T, kDim, false>(p, stream);
    if constexpr (kDim == 64) return backward<T, kDim, true>(p, stream);
  });
}

}  // namespace fastlm::cuda
