// attention forward: online softmax (Milakov and Gimelshein 2018; Dao et al. 2022) over blocks of
// 64 queries x 64 keys.
//
// A work item is 64 queries of one head. It holds Q^T, the output's transpose and one block of
// scores, K and V in L1 and L2, and reads K and V from the caches once per 64 queries. Every block
// of keys costs 2 * 64 * 64 * head_dim multiply-adds on registers and one exponential per score;
// the rescaling of the output is skipped while no maximum grows.
//
// The output is divided by the sum of exponentials at the end. Where values are so large that their
// sum overflows before, the item is computed again with smaller exponentials.
#include "attention_block.h"
#include "attention_decode.h"
#include "for_dtype.h"
#include "parallel.h"
#include "scratch.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

template <class T> struct ForwardBlocks {
  using A = acc_t<T>;
  using U = unit_t<T>;
  int64_t k_row, v_row;
  Scratch<A> sums;
  Scratch<U> units;
  A *out, *scores;   // (value_head_dim, queries), (keys, queries)
  U *q, *k, *v, *p;  // (head_dim, queries), (keys, k_row), (keys, v_row), (keys, queries)
  // The running maximum, in base 2, and the sum of exponentials of each query.
  A peak[kQueries], total[kQueries];
  // By how much exponentials are relative to more than the maximum, in base 2.
  A headroom = 0;

  explicit ForwardBlocks(const AttentionShape& s)
      : k_row(padded_units<T>(s.head_dim)),
        v_row(padded<A>(s.value_head_dim)),
        sums((s.value_head_dim + kKeys) * kQueries),
        units(units_of<T>(s.head_dim) * kQueries + kKeys * (k_row + v_row + kQueries)) {
    out = sums.data();
    scores = out + s.value_head_dim * kQueries;
    q = units.data();
    k = q + units_of<T>(s.head_dim) * kQueries;
    v = k + kKeys * k_row;
    p = v + kKeys * v_row;
  }
};

// Turns scores into probabilities relative to the new maximum, and the output and its sums with
// them.
template <class T> void online_softmax(ForwardBlocks<T>& b, int64_t keys, int64_t value_head_dim) {
  using A = acc_t<T>;
  for (int64_t q = 0; q < kQueries; q += kLanes<A>) {
    const Vec<A> old_peak = load(b.peak + q);
    Vec<A> peak = old_peak;
    for (int64_t k = 0; k < keys; ++k) peak = max(peak, load(b.scores + k * kQueries + q));
    // A query that has seen no key yet has the maximum -inf; relative to 0 its exponentials are all
    // 0.
    const Vec<A> seen = peak > -A(INFINITY) ? peak : Vec<A>{};
    const Vec<A> base = seen + b.headroom, shrink = exp2_bounded(old_peak - seen);
    Vec<A> sum{};
    for (int64_t k = 0; k < keys; ++k) {
      const Vec<A> p = exp2_bounded(load(b.scores + k * kQueries + q) - base);
      store(b.scores + k * kQueries + q, p);
      sum += p;
    }
    store(b.total + q, load(b.total + q) * shrink + sum);
    store(b.peak + q, peak);
    bool grew = false;
    for (int64_t i = 0; i < kLanes<A>; ++i) grew |= shrink[i] != A(1);
    if (!grew) continue;
    for (int64_t d = 0; d < value_head_dim; ++d)
      store(b.out + d * kQueries + q, load(b.out + d * kQueries + q) * shrink);
  }
}

// The output, not yet divided, of the queries that b.q has.
template <class T>
void attend(const AttentionForward& p, const Sequence& seq, int64_t head, int64_t query,
            int64_t queries, acc_t<T> scale, ForwardBlocks<T>& b) {
  using A = acc_t<T>;
  using U = unit_t<T>;
  const AttentionShape& s = p.shape;
  const int64_t head_dim = s.head_dim, value_head_dim = s.value_head_dim;
  const int64_t kv_head = head / (s.heads / s.kv_heads);
  const DropoutRule dropout(s.seed, s.dropout_p);
  for (int64_t i = 0; i < value_head_dim * kQueries; ++i) b.out[i] = 0;
  for (int64_t i = 0; i < kQueries; ++i) {
    b.peak[i] = -A(INFINITY);
    b.total[i] = 0;
  }
  const int64_t end = seq.highest(s, query + queries - 1) + 1;
  for (int64_t key = seq.lowest(s, query) / kKeys * kKeys; key < end; key += kKeys) {
    const int64_t keys = least(kKeys, end - key);
    load_units(row_of<T>(p.k, seq.batch, seq.first_key + key, kv_head), p.k.row_stride, keys,
               head_dim, b.k, b.k_row);
    load_units_across(row_of<T>(p.v, seq.batch, seq.first_key + key, kv_head), p.v.row_stride, keys,
                      value_head_dim, b.v, b.v_row);
    product<false, T>(keys, kQueries, units_of<T>(head_dim), Operand<U>{b.k, b.k_row, 1}, b.q,
                      kQueries, b.scores, kQueries);
    scale_block<T>(scale, keys, b.scores);
    if (s.softcap > 0) softcap_block<A>(A(s.softcap), keys, b.scores, nullptr);
    if (s.bias.any()) bias_block(s, seq, head, query, key, keys, b.scores);
    mask_block(s, seq, query, key, keys, -A(INFINITY), b.scores);
    online_softmax(b, keys, value_head_dim);
    if (s.dropout_p > 0)
      dropout_block(dropout, uint64_t(seq.lse_index(s, head, query)), key, keys, b.scores);
    product<true, T>(value_head_dim, kQueries, units_of<T>(keys), Operand<U>{b.v, 1, b.v_row},
                     over_keys<T>(b.scores, keys, b.p), kQueries, b.out, kQueries);
  }
}

template <class A> bool all_finite(const A* p, int64_t n) {
  Vec<A> none{};  // 0, or NaN from an infinity or a NaN
  sweep<A>(n, [&](int64_t i, auto span)
                  __attribute__((always_inline)) { none += load(p + i, span) * A(0); });
  return sum<A>(none) == 0;
}

template <class T>
void forward_item(const AttentionForward& p, const Sequence& seq, int64_t head, int64_t query,
                  ForwardBlocks<T>& b) {
  using A = acc_t<T>;
  const AttentionShape& s = p.shape;
  const int64_t queries = least(kQueries, seq.queries - query);
  const A scale = A(s.softcap > 0 ? s.softmax_scale : s.softmax_scale * kLog2e);
  load_transposed(row_of<T>(p.q, seq.batch, seq.first_query + query, head), p.q.row_stride, queries,
                  s.head_dim, scale, b.q);
  attend<T>(p, seq, head, query, queries, scale, b);
  if (!all_finite(b.out, s.value_head_dim * kQueries)) {
    b.headroom = 32;  // a sum over fewer than 2^32 keys is then no larger than its largest value
    attend<T>(p, seq, head, query, queries, scale, b);
  }
  double* lse = p.lse + seq.lse_index(s, head, query);
  for (int64_t i = 0; i < kQueries; ++i) {
    if (i < queries)
      lse[i] = (double(b.peak[i]) + double(b.headroom) + __builtin_log2(double(b.total[i]))) * kLn2;
    b.total[i] = b.total[i] > 0 ? A(1) / b.total[i] : A(0);
  }
  T* out = row_of<T>(p.o, seq.batch, seq.first_query + query, head);
  store_transposed<T>(b.out, b.total, queries, s.value_head_dim, out, p.o.row_stride);
}

template <class T> void forward(const AttentionForward& p, int64_t threads) {
  const AttentionShape& s = p.shape;
  if (is_decode(s)) return decode<T>(p, threads);
  const int64_t blocks =
      ceil_div(s.queries, kQueries);  // of the longest sequence; the others skip what they lack
  const int64_t work = kQueries * s.keys * (s.head_dim + s.value_head_dim);
  parallel_items(s.batch * s.heads * blocks, work, threads, [&](int64_t item) {
    const int64_t query =
        (blocks - 1 - item % blocks) * kQueries;  // the longest first: better balance when causal
    const Sequence seq(s, item / blocks / s.heads);
    if (query >= seq.queries) return;
    ForwardBlocks<T> b(s);
    forward_item<T>(p, seq, item / blocks % s.heads, query, b);
  });
}

}  // namespace

void launch(const AttentionForward& p, int64_t threads) {
  for_dtype(p.shape.dtype, false,
            [&](auto element, auto) { forward<decltype(element)>(p, threads); });
}

}  // namespace fastlm::cpu::FASTLM_ISA
