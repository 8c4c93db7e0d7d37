// attention forward on Hopper (after Shah et al. 2024, "FlashAttention-3"): the sums of
// attention_forward.cu by TMA, wgmma and specialised warps.
//
// A block stays on its multiprocessor and takes one tile of 128 queries after the other. One thread
// fetches: queries into one of two buffers, so that those of the next tile come while this one
// ends, keys and values, 128 at a time, into rings; mbarriers say when a buffer is full and empty.
// Two warpgroups of 64 queries each keep scores and output in registers. While one computes
// exponentials the other has the tensor cores: they hand each other the turn. Within a warpgroup
// the product of the next scores is under way during that of the last probabilities with values.
// Queries, keys and values are read once per tile of queries, from L2 for most tiles of a head;
// output and lse are written once.
//
// What makes short causal sequences fast: tiles with the most keys come first, heads in groups
// whose keys and values stay in L2; of the tile on the diagonal the upper warpgroup computes half;
// a maximum that rises by less than 2^8 does not rescale the output; and a quarter of the
// exponentials is a polynomial, because at head_dim 64 the special function units would otherwise
// be busy for as long as the tensor cores.
//
// Before changing it: both warpgroups and the fetching thread must go through the same tiles, or
// they wait for ever; a buffer is released by each of the eight warps that read it.
#include "attention_hopper.cuh"
#include "attention_softmax.cuh"

namespace fastlm::cuda {
namespace {

constexpr int kKeys = 128, kSlack = 8;
constexpr int64_t kL2Share = 16 << 20;  // bytes of keys and values that heads in work may have

struct ForwardMaps {
  CUtensorMap q, k, v, o;
};

struct Place {
  int64_t head;  // of all batches
  int query;
};

// Tiles of queries in order of work.
struct Schedule {
  int64_t heads, together, count;  // heads that share L2 at a time; tiles of all heads
  int tiles;                       // of a head

  explicit Schedule(const AttentionShape& s)
      : heads(s.batch * s.heads), tiles(int(ceil_div(s.queries, kOwnRows))) {
    const int64_t bytes = 4 * s.keys * s.head_dim;
    together = least(heads, most(1, kL2Share / bytes) * (s.heads / s.kv_heads));
    count = heads * tiles;
  }
  __device__ Place at(int64_t i) const {
    const int64_t first = i / (together * tiles) * together, rest = i - first * tiles;
    const int64_t here = min(together, heads - first);
    return {first + rest % here, (tiles - 1 - int(rest / here)) * kOwnRows};
  }
};

template <class T> struct Call {
  AttentionForward p;
  Scale<T> scale;
  DropoutRule dropout;
  Schedule schedule;
  float headroom;
};

template <class T, int kDim> struct ForwardShared {
  static constexpr int kStages = kDim == 64 ? 4 : 2;
  T q[2][kOwnRows * kDim], k[kStages][kKeys * kDim], v[kStages][kKeys * kDim], o[2][kRows * kDim];
  Mbarrier q_full[2], q_empty[2];
  Mbarrier k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

// A tile of queries and the tiles of keys that it sees, from `first` to before `end`.
struct Work {
  int64_t batch, head;
  int query, first, end;
  Sequence seq;

  __device__ Work(const AttentionShape& s, Place place)
      : batch(place.head / s.heads),
        head(place.head % s.heads),
        query(place.query),
        seq(unpacked(s), batch, head) {
    first = seq.lowest(query) / kKeys;
    end = (seq.highest(min(query + kOwnRows, seq.queries) - 1) + kKeys) / kKeys;
  }
};

// ---- the thread that fetches ----

template <class T, int kDim, int kCount>
__device__ void fetch(T* to, const CUtensorMap& map, Mbarrier* full, int row, int64_t head,
                      int64_t batch) {
  arrive_expecting(full, kCount * kDim * sizeof(T));
  load_panels<T, kDim, kCount>(to, map, full, row, head, batch);
}

template <class T, int kDim>
__device__ void produce(const Call<T>& call, const ForwardMaps& maps,
                        ForwardShared<T, kDim>& shared) {
  const AttentionShape& s = call.p.shape;
  Ring<2> q;
  Ring<ForwardShared<T, kDim>::kStages> kv;
  for (int64_t i = blockIdx.x; i < call.schedule.count; i += gridDim.x) {
    const Work work(s, call.schedule.at(i));
    const int64_t kv_head = work.head / (s.heads / s.kv_heads);
    if (work.first >= work.end) continue;
    wait(&shared.q_empty[q.stage], q.parity ^ 1);
    fetch<T, kDim, kOwnRows>(shared.q[q.stage], maps.q, &shared.q_full[q.stage], work.query,
                             work.head, work.batch);
    q.advance();
    for (int tile = work.end - 1; tile >= work.first; --tile) {
      wait(&shared.k_empty[kv.stage], kv.parity ^ 1);
      fetch<T, kDim, kKeys>(shared.k[kv.stage], maps.k, &shared.k_full[kv.stage], tile * kKeys,
                            kv_head, work.batch);
      wait(&shared.v_empty[kv.stage], kv.parity ^ 1);
      fetch<T, kDim, kKeys>(shared.v[kv.stage], maps.v, &shared.v_full[kv.stage], tile * kKeys,
                            kv_head, work.batch);
      kv.advance();
    }
  }
}

// ---- the warpgroups that compute ----

// Barriers among threads that compute: whose turn it is on the tensor cores, and a warpgroup's own.
__device__ inline int turn_of(int warpgroup) { return 1 + warpgroup; }
__device__ inline int within(int warpgroup) { return 3 + warpgroup; }

// 2^x for a finite x, to 2^-18.6, on the multiply-add units: a polynomial of what rounding leaves,
// minimax in relative error, whose exponent is then raised.
__device__ inline float exp2_polynomial(float x) {
  constexpr float kRounding = 12582912.0f;  // adding it leaves integers in the lowest bits
  const float least = fmaxf(x, -126.0f), shifted = least + kRounding;
  const float rest = least - (shifted - kRounding);
  float power = fmaf(0.00957010407f, rest, 0.0559178665f);
  power = fmaf(power, rest, 0.240247443f);
  power = fmaf(power, rest, 0.693121791f);
  power = fmaf(power, rest, 0.999999285f);
  return __int_as_float(__float_as_int(power) + (__float_as_int(shifted) << 23));
}

// The scores of 64 queries and kCount keys.
template <int kCount, class T, int kDim>
__device__ void multiply_scores(float (*scores)[4], const T* q, const T* k) {
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    const int panel = step * 16 / kPanel, column = step * 16 % kPanel;
    multiply_async<T, kCount, false, false>(scores, operand(q + panel * kOwnRows * kPanel + column),
                                            operand(k + panel * kKeys * kPanel + column), step > 0);
  }
}

// out += probabilities times values, or = without `add`.
template <class T, int kDim>
__device__ void multiply_values(Fragment<kDim>& out, const uint32_t (&p)[kKeys / 16][4], const T* v,
                                bool add) {
#pragma unroll
  for (int step = 0; step < kKeys / 16; ++step)
    multiply_async<T, kDim, true>(
        out, p[step], operand(v + step * 16 * kPanel, kKeys * kPanelRowBytes), add || step > 0);
}

// What a warpgroup knows of its 64 queries while it goes through the tiles of keys.
template <class T, int kDim, bool kDropout> struct Rows {
  Fragment<kDim> out = {};
  Softmax softmax;
  uint32_t probabilities[kKeys / 16][4];
  Kept<kKeys> kept;

  __device__ void draw_kept(const Call<T>& call, const Work& work, int row, int key) {
    if (kDropout)
      kept.draw(call.dropout,
                [&](int n) { return draw(call.dropout, work.seq.lse_start + row, key + n * 8); });
  }
  // Scores of a tile to probabilities, which are left in `scores`.
  __device__ void exponentiate(Fragment<kKeys>& scores, const Call<T>& call, const Work& work,
                               int query, int row, int key) {
    const auto special = [](float score, float factor, float base) {
      return exp2_special(fmaf(score, factor, -base));
    };
    const float factor = call.scale.factor;
    if (mask<kKeys>(scores, work.seq, query, row, key))
      softmax.update<kSlack, kKeys>(scores, call.scale, [&](float score, float base, int n) {
        return n % 4 == 3 ? exp2_polynomial(fmaf(score, factor, -base))
                          : special(score, factor, base);
      });
    else
      softmax.update<kSlack, kKeys>(scores, call.scale, [&](float score, float base, int) {
        return special(score, factor, base);
      });
    if constexpr (kDropout) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[n][i] *= kept.at(n, i) ? call.dropout.scale : 0.0f;
    }
  }
  __device__ void keep(const Fragment<kKeys>& scores) {
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step)
      as_operand<T, kKeys>(probabilities[step], scores, step);
  }
};

template <class T, int kDim, bool kDropout>
__device__ void attend(Rows<T, kDim, kDropout>& rows, const Call<T>& call, const Work& work,
                       ForwardShared<T, kDim>& shared, Ring<2>& q,
                       Ring<ForwardShared<T, kDim>::kStages>& k,
                       Ring<ForwardShared<T, kDim>::kStages>& v) {
  const int mine = consumer(), query = work.query + mine * kRows;
  const int row = query + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
  const T* queries = shared.q[q.stage] + mine * kRows * kPanel;
  int tile = work.end - 1;
  const bool half = work.seq.highest(query + kRows - 1) < tile * kKeys + kKeys / 2;
  bool add = false;
  Fragment<kKeys> scores;
  wait(&shared.q_full[q.stage], q.parity);
  wait(&shared.k_full[k.stage], k.parity);
  begin_products();
  multiply_scores<kKeys / 2, T, kDim>(scores, queries, shared.k[k.stage]);
  if (!half) {
    begin_products();
    multiply_scores<kKeys / 2, T, kDim>(scores + kKeys / 16, queries,
                                        shared.k[k.stage] + kKeys / 2 * kPanel);
  }
  commit_products();
  rows.draw_kept(call, work, row, tile * kKeys);
  wait_products<0>();
  pin<kKeys>(scores);
  release(&shared.k_empty[k.stage]);
  k.advance();
  rows.exponentiate(scores, call, work, query, row, tile * kKeys);
  rows.keep(scores);
  while (--tile >= work.first) {
    wait(&shared.k_full[k.stage], k.parity);
    sync_threads(turn_of(mine), kConsumers);
    begin_products();
    multiply_scores<kKeys, T, kDim>(scores, queries, shared.k[k.stage]);
    commit_products();
    wait(&shared.v_full[v.stage], v.parity);
    multiply_values<T, kDim>(rows.out, rows.probabilities, shared.v[v.stage], add);
    commit_products();
    arrive_threads(turn_of(1 - mine), kConsumers);
    rows.draw_kept(call, work, row, tile * kKeys);
    wait_products<1>();
    pin<kKeys>(scores);
    release(&shared.k_empty[k.stage]);
    k.advance();
    rows.exponentiate(scores, call, work, query, row, tile * kKeys);
    wait_products<0>();
    pin<kDim>(rows.out);
    release(&shared.v_empty[v.stage]);
    v.advance();
    rescale<kDim>(rows.out, rows.softmax.shrink);
    rows.keep(scores);
    add = true;
  }
  release(&shared.q_empty[q.stage]);
  q.advance();
  wait(&shared.v_full[v.stage], v.parity);
  begin_products();
  multiply_values<T, kDim>(rows.out, rows.probabilities, shared.v[v.stage], add);
  commit_products();
  wait_products<0>();
  pin<kDim>(rows.out);
  release(&shared.v_empty[v.stage]);
  v.advance();
}

template <class T, int kDim, bool kDropout>
__device__ void write_rows(Rows<T, kDim, kDropout>& rows, const Call<T>& call, const Work& work,
                           const ForwardMaps& maps, T* panels) {
  const int mine = consumer(), query = work.query + mine * kRows, lane = threadIdx.x % 32;
  const int row = query + threadIdx.x / 32 % 4 * 16 + lane / 4;
  const bool first = threadIdx.x % kWarpgroup == 0;
  float inverse[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float total = quad_sum(rows.softmax.total[h]);
    inverse[h] = total > 0 ? 1.0f / total : 0.0f;
    if (lane % 4 == 0 && row + h * 8 < work.seq.queries)
      call.p.lse[work.seq.lse_start + row + h * 8] =
          call.scale.lse(rows.softmax.peak[h], total, rows.softmax.headroom);
  }
  if (first) wait_stores_read();  // of the tile before
  sync_threads(within(mine), kWarpgroup);
  put_panels<T, kDim, kRows>(panels, rows.out, inverse[0], inverse[1]);
  fence_async();
  sync_threads(within(mine), kWarpgroup);
  if (!first || query >= work.seq.queries) return;
  for (int panel = 0; panel < kDim / kPanel; ++panel)
    store_panel(maps.o, panels + panel * kRows * kPanel, panel * kPanel, query, int(work.head),
                int(work.batch));
  commit_stores();
}

template <class T, int kDim, bool kDropout>
__device__ void consume(const Call<T>& call, const ForwardMaps& maps,
                        ForwardShared<T, kDim>& shared) {
  Ring<2> q;
  Ring<ForwardShared<T, kDim>::kStages> k, v;
  if (consumer() == 1) arrive_threads(turn_of(0), kConsumers);  // the first turn
  for (int64_t i = blockIdx.x; i < call.schedule.count; i += gridDim.x) {
    const Work work(call.p.shape, call.schedule.at(i));
    Rows<T, kDim, kDropout> rows;
    rows.softmax.headroom = call.headroom;
    if (work.first < work.end) attend<T, kDim, kDropout>(rows, call, work, shared, q, k, v);
    write_rows<T, kDim, kDropout>(rows, call, work, maps, shared.o[consumer()]);
  }
  if (consumer() == 0) sync_threads(turn_of(0), kConsumers);  // takes the last turn
  if (threadIdx.x % kWarpgroup == 0) wait_stores();
}

template <class T, int kDim, bool kDropout>
__global__ void __launch_bounds__(kHopperThreads, 1)
    attention_hopper_forward_kernel(const Call<T> call, const __grid_constant__ ForwardMaps maps) {
  using Shared = ForwardShared<T, kDim>;
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    if (shared_address(memory) % 1024 != 0) __trap();  // the swizzle counts from there
    for (int stage = 0; stage < 2; ++stage) {
      initialize(&shared.q_full[stage], 1);
      initialize(&shared.q_empty[stage], kConsumerWarps);
    }
    for (int stage = 0; stage < Shared::kStages; ++stage) {
      initialize(&shared.k_full[stage], 1);
      initialize(&shared.v_full[stage], 1);
      initialize(&shared.k_empty[stage], kConsumerWarps);
      initialize(&shared.v_empty[stage], kConsumerWarps);
    }
    fence_async();
  }
  __syncthreads();
  if (consumer() < 0) {
    give_registers<24>();
    if (threadIdx.x == 0) produce<T, kDim>(call, maps, shared);
  } else {
    take_registers<240>();
    consume<T, kDim, kDropout>(call, maps, shared);
  }
}

template <class T, int kDim, bool kDropout>
void forward(const AttentionForward& p, cudaStream_t stream) {
  const AttentionShape& s = p.shape;
  const Call<T> call{p, Scale<T>(s), DropoutRule(s.seed, s.dropout_p), Schedule(s),
                     headroom_of<T>(s, kSlack)};
  const auto map = [&](const Bshd& t, int64_t length, int64_t heads, int rows) {
    return panel_map<T>(extents_of(t, s.batch, length, heads, s.head_dim), uint32_t(rows));
  };
  const ForwardMaps maps{map(p.q, s.queries, s.heads, kOwnRows),
                         map(p.k, s.keys, s.kv_heads, kKeys), map(p.v, s.keys, s.kv_heads, kKeys),
                         map(p.o, s.queries, s.heads, kRows)};
  constexpr int kShared = sizeof(ForwardShared<T, kDim>);
  const auto kernel = attention_hopper_forward_kernel<T, kDim, kDropout>;
  allow_shared(kernel, kShared, "attention_hopper_forward");
  const unsigned blocks = unsigned(least(call.schedule.count, multiprocessors()));
  kernel<<<blocks, kHopperThreads, kShared, stream>>>(call, maps);
  check_launch("attention_hopper_forward");
}

}  // namespace

void launch_hopper(const AttentionForward& p, cudaStream_t stream) {
  const AttentionShape& s = p.shape;
  for_hopper_shape(s, [&](auto element, auto width) {
    using T = decltype(element);
    constexpr int kDim = decltype(width)::value;
    if (!has_dropout(s)) return forward<T, kDim, false>(p, stream);
    if constexpr (kDim == 64) return forward<T, kDim, true>(p, stream);
  });
}

}  // namespace fastlm::cuda
