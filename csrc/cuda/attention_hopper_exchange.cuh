// What the blocks of attention's backward on Hopper exchange through memory, and the two small
// kernels around the large one: lse and delta before it, dq to its dtype after it.
#pragma once

#include "attention_hopper.cuh"

namespace fastlm::cuda {
namespace {

constexpr int kPart = kRows * kPanel;  // a warpgroup's part of dq: 64 x 64
template <int kDim> constexpr int kTileQueries = kDim == 64 ? 128 : 64;  // as registers allow

// In the stream's memory: dq by head, tile of queries and warpgroup, its elements in the order that
// threads hold them; lse in base 2 and delta of a tile; whose turn it is at each part of dq.
struct Exchange {
  float *dq, *rows;
  unsigned *turns, *ticket;
  int tiles;  // of queries, in a head

  __device__ int64_t tile(int64_t head, int i) const { return head * tiles + i; }
  __device__ float* part(int64_t tile, int warpgroup) const {
    return dq + (tile * 2 + warpgroup) * kPart;
  }
};

// ---- before: lse in base 2 and delta, by tiles; turns begin at 0 ----

// kDim / 8 lanes a query. Reads dout and o once. Queries that there are not, or that see no key,
// get an lse of infinity: their probabilities are 0.
template <class T, int kDim>
__global__ void __launch_bounds__(kThreads)
    attention_hopper_delta_kernel(const AttentionBackward p, const Exchange exchange,
                                  const int tile_queries) {
  constexpr int kLanes = kDim / kPack<T>;
  const AttentionShape& s = p.shape;
  const int64_t head = blockIdx.y, batch = blockIdx.z;
  const int query = (int(blockIdx.x) * kThreads + int(threadIdx.x)) / kLanes;
  const int column = threadIdx.x % kLanes * kPack<T>;
  if (query >= exchange.tiles * tile_queries) return;
  const Sequence seq(unpacked(s), batch, head);
  const bool live = query < seq.queries;
  const int64_t count = live ? s.head_dim - column : 0;
  float o[kPack<T>], dout[kPack<T>], sum = 0;
  load(row_of<T>(p.o, batch, live ? query : 0, head) + column, count, true, o);
  load(row_of<T>(p.dout, batch, live ? query : 0, head) + column, count, true, dout);
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) sum = fmaf(o[i], dout[i], sum);
#pragma unroll
  for (int lane = kLanes / 2; lane > 0; lane /= 2) sum += __shfl_xor_sync(~0u, sum, lane);
  if (column > 0) return;
  const int64_t tile = exchange.tile(batch * s.heads + head, query / tile_queries);
  const float lse = live ? float(p.lse[seq.lse_start + query]) : INFINITY;
  float* const rows = exchange.rows + tile * 2 * tile_queries + query % tile_queries;
  rows[0] = lse > -INFINITY ? lse * kLog2e : INFINITY;
  rows[tile_queries] = live && p.dlse ? sum - float(p.dlse[seq.lse_start + query]) : sum;
  if (query % tile_queries == 0) exchange.turns[2 * tile] = exchange.turns[2 * tile + 1] = 0;
  if (query == 0 && head == 0 && batch == 0) *exchange.ticket = 0;
}

// ---- after: dq to its dtype ----

// A block has one part of a tile: a thread four times eight columns of a query. Queries that no
// block has added to get zeros.
template <class T, int kDim>
__global__ void __launch_bounds__(kThreads)
    attention_hopper_dq_kernel(const AttentionBackward p, const Exchange exchange,
                               const float scale) {
  constexpr int kQueries = kTileQueries<kDim>;
  const AttentionShape& s = p.shape;
  const int part = blockIdx.x % 2, tile_of_head = blockIdx.x / 2;
  const int64_t head = blockIdx.y, batch = blockIdx.z;
  const int64_t tile = exchange.tile(batch * s.heads + head, tile_of_head);
  const int first_query = tile_of_head * kQueries + (kDim == 64 ? part * kRows : 0);
  const int first_column = kDim == 64 ? 0 : part * kPanel;
  const bool added = exchange.turns[2 * tile + part] > 0;
  const float2* const from = reinterpret_cast<const float2*>(exchange.part(tile, part));
#pragma unroll
  for (int i = 0; i < kPart / 8 / kThreads; ++i) {
    const int place = i * kThreads + int(threadIdx.x), n = place % 8, row = place / 8;
    const int query = first_query + row, column = first_column + n * 8;
    if (query >= s.queries || column >= s.head_dim) continue;
    float values[8] = {};
    if (added) {
      const int thread = row / 16 * 32 + row % 8 * 4, upper = row / 8 % 2;
#pragma unroll
      for (int quad = 0; quad < 4; ++quad) {
        const float2 two = from[(n * kWarpgroup + thread + quad) * 2 + upper];
        values[2 * quad] = two.x * scale;
        values[2 * quad + 1] = two.y * scale;
      }
    }
    store(row_of<T>(p.dq, batch, query, head) + column, s.head_dim - column, true, values);
  }
}

}  // namespace
}  // namespace fastlm::cuda
