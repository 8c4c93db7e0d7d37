// attention backward, with the probabilities recomputed from lse (Dao et al. 2022).
//
// With P = exp(scale q k^T + bias - lse), D = keep / (1 - p) and delta = sum over head_dim of dout
// * o, less dlse:
//   dV = (P D)^T dout;  dS = P (D (dout v^T) - delta);  dQ = scale dS k;  dK = scale dS^T q
// A work item is one head of k and v with the query heads that share it, and a slice of its keys:
// five block products per pair of blocks, all accumulated in float32 whatever the dtype. How keys
// are sliced depends on the shape alone, and the slices' dQ are added in order, so the gradients
// have the same bits with any number of threads.
#include "attention_block.h"
#include "for_dtype.h"
#include "parallel.h"
#include "scratch.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

// Enough items for some cores even when a batch has few heads; each slice packs its query heads
// anew.
constexpr int64_t kItemsWanted = 16;

template <class T> struct BackwardBlocks {
  using A = acc_t<T>;
  using U = unit_t<T>;
  // ld: head_dim padded to whole tiles; row: of Units along head_dim; and the same of v and dout.
  int64_t head_dim, ld, row, value_head_dim, value_ld, value_row;
  Scratch<A> sums;
  Scratch<U> units;
  A* dq_t;              // (query blocks, head_dim, kQueries): dq, transposed
  A *lse2, *lse2_rest;  // (queries): lse in base 2, and what it was rounded by
  A* delta;             // (queries)
  A *dk, *dv;           // (keys of the slice, ld), (keys of the slice, value_ld)
  A *p, *ds, *cap;      // (kKeys, kQueries): probabilities, score gradients, softcap's derivative
  U *q_t, *dout_t;      // (query blocks, Units of a head, kQueries): scaled q, dout, transposed
  U *q, *dout;          // (Units of queries, ld), (Units of queries, value_ld)
  U *k, *v;             // (kKeys, row), (kKeys, value_row)
  U* k_across;          // where Units are pairs: (Units of kKeys, ld),
  U* converted;         // and p or ds as a product takes it

  BackwardBlocks(int64_t queries, int64_t keys, const AttentionShape& s)
      : head_dim(s.head_dim),
        ld(padded<A>(s.head_dim)),
        row(padded_units<T>(s.head_dim)),
        value_head_dim(s.value_head_dim),
        value_ld(padded<A>(s.value_head_dim)),
        value_row(padded_units<T>(s.value_head_dim)),
        sums(queries * (s.head_dim + 3) + keys * (ld + value_ld) + 3 * kKeys * kQueries),
        units(queries * (units_of<T>(s.head_dim) + units_of<T>(s.value_head_dim) + ld + value_ld) +
              kKeys * (row + value_row + ld + kQueries)) {
    A* next = sums.data();
    const auto take = [](auto*& next, int64_t count) { return (next += count) - count; };
    dq_t = take(next, queries * head_dim);
    lse2 = take(next, queries), lse2_rest = take(next, queries), delta = take(next, queries);
    dk = take(next, keys * ld), dv = take(next, keys * value_ld);
    p = take(next, kKeys * kQueries), ds = take(next, kKeys * kQueries);
    cap = take(next, kKeys * kQueries);
    U* unit = units.data();
    q_t = take(unit, queries * units_of<T>(head_dim));
    dout_t = take(unit, queries * units_of<T>(value_head_dim));
    q = take(unit, queries * ld), dout = take(unit, queries * value_ld);
    k = take(unit, kKeys * row), v = take(unit, kKeys * value_row);
    k_across = take(unit, kKeys * ld);
    converted = take(unit, kKeys * kQueries);
  }
};

// Everything of one query head that its blocks of keys read again and again.
template <class T>
void pack_head(const AttentionBackward& p, const Sequence& seq, int64_t head, acc_t<T> scale,
               BackwardBlocks<T>& b) {
  using A = acc_t<T>;
  const int64_t first = seq.lse_index(p.shape, head, 0);
  for (int64_t query = 0; query < seq.queries; query += kQueries) {
    const int64_t rows = least(kQueries, seq.queries - query), at = seq.first_query + query;
    const T *q = row_of<T>(p.q, seq.batch, at, head),
            *dout = row_of<T>(p.dout, seq.batch, at, head);
    load_transposed(q, p.q.row_stride, rows, b.head_dim, scale,
                    b.q_t + query * units_of<T>(b.head_dim));
    load_transposed(dout, p.dout.row_stride, rows, b.value_head_dim, A(1),
                    b.dout_t + query * units_of<T>(b.value_head_dim));
    load_units_across(q, p.q.row_stride, rows, b.head_dim, b.q + units_of<T>(query) * b.ld, b.ld);
    load_units_across(dout, p.dout.row_stride, rows, b.value_head_dim,
                      b.dout + units_of<T>(query) * b.value_ld, b.value_ld);
    for (int64_t i = 0; i < kQueries; ++i) {
      Vec<A> dot{};
      if (i < rows) {
        const T* o = row_of<T>(p.o, seq.batch, at + i, head);
        sweep<A>(b.value_head_dim, [&](int64_t d, auto span) __attribute__((always_inline)) {
          dot += load(o + d, span) * load(dout + i * p.dout.row_stride + d, span);
        });
      }
      const double dlse = p.dlse && i < rows ? p.dlse[first + query + i] : 0.0;
      b.delta[query + i] = sum<A>(dot) - A(dlse);
      // +inf makes every probability 0: of a query that saw no key, and of the block's unused rows.
      const double lse = i < rows ? p.lse[first + query + i] : -INFINITY;
      const double lse2 = lse > -INFINITY || lse != lse ? lse * kLog2e : INFINITY;
      b.lse2[query + i] = A(lse2);
      b.lse2_rest[query + i] = A(lse2 == INFINITY ? 0.0 : lse2 - double(A(lse2)));
    }
  }
  memset(b.dq_t, 0, size_t(ceil_div(seq.queries, kQueries) * kQueries * b.head_dim) * sizeof(A));
}

// The five products of one pair of blocks; `key` counts in the sequence, dk and dv point at this
// block's rows.
template <class T>
void pair(const AttentionShape& s, const Sequence& seq, const DropoutRule& dropout, int64_t head,
          int64_t query, int64_t key, int64_t keys, acc_t<T> scale, acc_t<T>* dk, acc_t<T>* dv,
          BackwardBlocks<T>& b) {
  using A = acc_t<T>;
  using U = unit_t<T>;
  const int64_t rows = least(kQueries, seq.queries - query);
  const int64_t depth = units_of<T>(b.head_dim), value_depth = units_of<T>(b.value_head_dim);
  const auto lse_index = uint64_t(seq.lse_index(s, head, 0));
  product<false, T>(keys, kQueries, depth, Operand<U>{b.k, b.row, 1}, b.q_t + query * depth,
                    kQueries, b.p, kQueries);
  scale_block<T>(scale, keys, b.p);
  if (s.softcap > 0) softcap_block<A>(A(s.softcap), keys, b.p, b.cap);
  if (s.bias.any()) bias_block(s, seq, head, query, key, keys, b.p);
  mask_block(s, seq, query, key, keys, -A(INFINITY), b.p);
  product<false, T>(keys, kQueries, value_depth, Operand<U>{b.v, b.value_row, 1},
                    b.dout_t + query * value_depth, kQueries, b.ds, kQueries);
  if (s.dropout_p > 0) dropout_block(dropout, lse_index + uint64_t(query), key, keys, b.ds);
  for (int64_t q = 0; q < kQueries; q += kLanes<A>) {
    const Vec<A> lse2 = load(b.lse2 + query + q), rest = load(b.lse2_rest + query + q);
    const Vec<A> delta = load(b.delta + query + q);
    for (int64_t k = 0; k < keys; ++k) {
      const int64_t at = k * kQueries + q;
      const Vec<A> probability = exp2_bounded((load(b.p + at) - lse2) - rest);
      store(b.p + at, probability);
      store(b.ds + at, probability * (load(b.ds + at) - delta));
    }
  }
  if (s.softcap > 0)
    for (int64_t i = 0; i < keys * kQueries; ++i) b.ds[i] *= b.cap[i];
  if (s.dropout_p > 0) dropout_block(dropout, lse_index + uint64_t(query), key, keys, b.p);
  const Operand<U> k_transposed{kPairs<T> ? b.k_across : b.k, 1, kPairs<T> ? b.ld : b.row};
  const int64_t of_queries = units_of<T>(kQueries), across = units_of<T>(query);
  product<true, T>(keys, b.value_ld, units_of<T>(rows),
                   Operand<U>{over_queries<T>(b.p, keys, b.converted), of_queries, 1},
                   b.dout + across * b.value_ld, b.value_ld, dv, b.value_ld);
  product<true, T>(keys, b.ld, units_of<T>(rows),
                   Operand<U>{over_queries<T>(b.ds, keys, b.converted), of_queries, 1},
                   b.q + across * b.ld, b.ld, dk, b.ld);
  product<true, T>(b.head_dim, kQueries, units_of<T>(keys), k_transposed,
                   over_keys<T>(b.ds, keys, b.converted), kQueries, b.dq_t + query * b.head_dim,
                   kQueries);
}

template <class T> struct Slices {  // how the keys of a sequence are divided among items
  int64_t count, keys;              // keys of each, a multiple of kKeys

  explicit Slices(const AttentionShape& s) {
    const int64_t blocks = most(1, ceil_div(s.keys, kKeys));
    count = least(blocks, most(1, ceil_div(kItemsWanted, most(1, s.batch * s.kv_heads))));
    keys = ceil_div(blocks, count) * kKeys;
    count = most(1, ceil_div(s.keys, keys));
  }
};

// dk and dv of one slice of keys, and this slice's part of dq in b.dq_t, head by head through
// `finish_head`.
template <class T, class FinishHead>
void backward_slice(const AttentionBackward& p, const Sequence& seq, int64_t kv_head, int64_t first,
                    int64_t last, BackwardBlocks<T>& b, const FinishHead& finish_head) {
  using A = acc_t<T>;
  const AttentionShape& s = p.shape;
  const int64_t group = s.heads / s.kv_heads, head_dim = s.head_dim;
  const DropoutRule dropout(s.seed, s.dropout_p);
  const A scale = A(s.softcap > 0 ? s.softmax_scale : s.softmax_scale * kLog2e);
  memset(b.dk, 0, size_t(most(0, last - first) * b.ld) * sizeof(A));
  memset(b.dv, 0, size_t(most(0, last - first) * b.value_ld) * sizeof(A));
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    pack_head<T>(p, seq, head, scale, b);
    for (int64_t key = first; key < last; key += kKeys) {
      const int64_t keys = least(kKeys, last - key);
      const T* k = row_of<T>(p.k, seq.batch, seq.first_key + key, kv_head);
      load_units(k, p.k.row_stride, keys, head_dim, b.k, b.row);
      if (kPairs<T>) load_units_across(k, p.k.row_stride, keys, head_dim, b.k_across, b.ld);
      load_units(row_of<T>(p.v, seq.batch, seq.first_key + key, kv_head), p.v.row_stride, keys,
                 s.value_head_dim, b.v, b.value_row);
      for (int64_t query = 0; query < seq.queries; query += kQueries) {
        const int64_t last_query = least(query + kQueries, seq.queries) - 1;
        if (seq.highest(s, last_query) < key || seq.lowest(s, query) >= key + keys) continue;
        pair(s, seq, dropout, head, query, key, keys, scale, b.dk + (key - first) * b.ld,
             b.dv + (key - first) * b.value_ld, b);
      }
    }
    finish_head(head);
  }
  for (int64_t key = first; key < last; ++key) {
    T *dk = row_of<T>(p.dk, seq.batch, seq.first_key + key, kv_head),
      *dv = row_of<T>(p.dv, seq.batch, seq.first_key + key, kv_head);
    const A *dk_sum = b.dk + (key - first) * b.ld, *dv_sum = b.dv + (key - first) * b.value_ld;
    sweep<A>(head_dim, [&](int64_t d, auto span) __attribute__((always_inline)) {
      store(dk + d, load(dk_sum + d, span) * A(s.softmax_scale), span);
    });
    sweep<A>(s.value_head_dim, [&](int64_t d, auto span) __attribute__((always_inline)) {
      store(dv + d, load(dv_sum + d, span), span);
    });
  }
}

template <class T>
void store_dq(const AttentionBackward& p, const Sequence& seq, int64_t head, const acc_t<T>* dq_t) {
  using A = acc_t<T>;
  A scale[kQueries];
  for (A& each : scale) each = A(p.shape.softmax_scale);
  for (int64_t query = 0; query < seq.queries; query += kQueries) {
    T* dq = row_of<T>(p.dq, seq.batch, seq.first_query + query, head);
    store_transposed<T>(dq_t + query * p.shape.head_dim, scale,
                        least(kQueries, seq.queries - query), p.shape.head_dim, dq,
                        p.dq.row_stride);
  }
}

template <class T> void backward(const AttentionBackward& p, int64_t threads) {
  using A = acc_t<T>;
  const AttentionShape& s = p.shape;
  const Slices<T> slices(s);
  const int64_t queries = ceil_div(s.queries, kQueries) * kQueries,
                head_size = queries * s.head_dim;
  const bool several = slices.count > 1;
  Scratch<A> partial(several ? s.batch * s.heads * slices.count * head_size : 1);
  const auto partial_of = [&](int64_t batch, int64_t head, int64_t slice) {
    return partial.data() + ((batch * s.heads + head) * slices.count + slice) * head_size;
  };
  const int64_t work = queries * slices.keys * (3 * s.head_dim + 2 * s.value_head_dim);
  parallel_items(s.batch * s.kv_heads * slices.count, work, threads, [&](int64_t item) {
    const int64_t slice = item % slices.count, kv_head = item / slices.count % s.kv_heads;
    const int64_t batch = item / slices.count / s.kv_heads;
    const Sequence seq(s, batch);
    BackwardBlocks<T> b(queries, slices.keys, s);
    const int64_t first = slice * slices.keys, last = least(first + slices.keys, seq.keys);
    backward_slice<T>(p, seq, kv_head, first, last, b, [&](int64_t head) {
      if (several)
        memcpy(partial_of(batch, head, slice), b.dq_t, size_t(head_size) * sizeof(A));
      else
        store_dq<T>(p, seq, head, b.dq_t);
    });
  });
  if (!several) return;
  parallel_items(s.batch * s.heads, slices.count * head_size, threads, [&](int64_t item) {
    A* total = partial_of(item / s.heads, item % s.heads, 0);
    for (int64_t i = 0; i < head_size; ++i)
      for (int64_t slice = 1; slice < slices.count; ++slice)
        total[i] += total[slice * head_size + i];
    store_dq<T>(p, Sequence(s, item / s.heads), item % s.heads, total);
  });
}

}  // namespace

void launch(const AttentionBackward& p, int64_t threads) {
  for_dtype(p.shape.dtype, false,
            [&](auto element, auto) { backward<decltype(element)>(p, threads); });
}

}  // namespace fastlm::cpu::FASTLM_ISA
