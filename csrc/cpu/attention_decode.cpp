// attention for a few queries against many keys, as in decoding, and the append to its cache.
//
// One or a few queries cannot fill the lanes of the block kernel, and the work is to read K and V
// once: a work item is some heads of a sequence, and each query takes dot products along head_dim.
// No lse is lost and no dropout applies.
#include "attention_decode.h"

#include "for_dtype.h"
#include "parallel.h"
#include "scratch.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

template <class T> acc_t<T> dot(const acc_t<T>* a, const T* b, int64_t n) {
  using A = acc_t<T>;
  Vec<A> total{};
  sweep<A>(n, [&](int64_t d, auto span) __attribute__((always_inline)) {
    total += load(a + d, span) * load(b + d, span);
  });
  return sum<A>(total);
}

// Some of the heads of one query, key by key: the heads of a key lie side by side, so that what is
// read of K and V is read in long pieces.
template <class T> struct DecodeQuery {
  using A = acc_t<T>;
  const AttentionForward& p;
  const Sequence& seq;
  int64_t query, first, last;  // heads of q
  A *q, *out, *scores;         // (heads, head_dim), (heads, value_head_dim), (heads, keys)

  const AttentionShape& s = p.shape;
  int64_t low = seq.lowest(s, query), count = seq.highest(s, query) - low + 1;

  template <class F> FASTLM_INLINE void each_head(const F& f) const {
    for (int64_t head = first; head < last; ++head) f(head, head - first);
  }
  int64_t kv_head(int64_t head) const { return head / (s.heads / s.kv_heads); }

  void score_keys() const {
    each_head([&](int64_t head, int64_t i) __attribute__((always_inline)) {
      const T* row = row_of<T>(p.q, seq.batch, query, head);
      sweep<A>(s.head_dim, [&](int64_t d, auto span) __attribute__((always_inline)) {
        store(q + i * s.head_dim + d, load(row + d, span), span);
      });
    });
    for (int64_t key = 0; key < count; ++key)
      each_head([&](int64_t head, int64_t i) __attribute__((always_inline)) {
        const T* k = row_of<T>(p.k, seq.batch, low + key, kv_head(head));
        A score = dot<T>(q + i * s.head_dim, k, s.head_dim) * A(s.softmax_scale);
        if (s.softcap > 0) score = A(s.softcap) * tanh(all(score / A(s.softcap)))[0];
        if (s.bias.any()) score += bias_at(head, low + key);
        scores[i * s.keys + key] = score * A(kLog2e);
      });
  }

  A bias_at(int64_t head, int64_t key) const {
    const ScoreBias& bias = s.bias;
    A sum = 0;
    if (bias.mask)
      for_mask<A>(bias, [&](const auto* mask) {
        sum = bias_of<A>(mask[seq.batch * bias.mask_batch_stride + head * bias.mask_head_stride +
                              query * bias.mask_query_stride + key * bias.mask_key_stride]);
      });
    if (bias.alibi_slopes) {
      const A distance = A(query + seq.keys - seq.queries - key);
      const A slope = A(bias.alibi_slopes[seq.index * bias.alibi_batch_stride + head]);
      sum -= slope * (distance < 0 ? -distance : distance);
    }
    return sum;
  }

  // Scores become probabilities, not yet divided by their sum, whose inverse is returned.
  A exponentials(int64_t head, A* row) const {
    A peak = -A(INFINITY);
    for (int64_t key = 0; key < count; ++key) peak = row[key] > peak ? row[key] : peak;
    const A base = peak > -A(INFINITY) ? peak : A(0);
    Vec<A> sums{};
    sweep<A>(count, [&](int64_t key, auto span) __attribute__((always_inline)) {
      const Vec<A> e = live<A>(exp2_bounded(load(row + key, span) - base), span);
      store(row + key, e, span);
      sums += e;
    });
    const A total = sum<A>(sums);
    p.lse[seq.lse_index(s, head, query)] = (double(peak) + __builtin_log2(double(total))) * kLn2;
    return total > 0 ? A(1) / total : A(0);
  }

  // With probabilities divided by their sum before, as the sum of large values could overflow.
  void sum_values(const A* inverse) const {
    memset(out, 0, size_t((last - first) * s.value_head_dim) * sizeof(A));
    for (int64_t key = 0; key < count; ++key)
      each_head([&](int64_t head, int64_t i) __attribute__((always_inline)) {
        const T* v = row_of<T>(p.v, seq.batch, low + key, kv_head(head));
        const A weight = scores[i * s.keys + key] * inverse[i];
        A* sums = out + i * s.value_head_dim;
        sweep<A>(s.value_head_dim, [&](int64_t d, auto span) __attribute__((always_inline)) {
          store(sums + d, load(sums + d, span) + load(v + d, span) * weight, span);
        });
      });
  }

  void run(A* inverse) const {
    score_keys();
    each_head(
        [&](int64_t head, int64_t i) { inverse[i] = exponentials(head, scores + i * s.keys); });
    sum_values(inverse);
    each_head([&](int64_t head, int64_t i) {
      T* o = row_of<T>(p.o, seq.batch, query, head);
      for (int64_t d = 0; d < s.value_head_dim; ++d) put(o + d, out[i * s.value_head_dim + d]);
    });
  }
};

template <class T> void append(const CacheAppend& p, int64_t threads) {
  const size_t k_bytes = size_t(p.head_dim) * sizeof(T);
  const size_t v_bytes = size_t(p.value_head_dim) * sizeof(T);
  parallel_for(p.batch * p.length, 2 * p.kv_heads * int64_t(k_bytes + v_bytes), threads,
               [&](int64_t first, int64_t last) {
                 for (int64_t i = first; i < last; ++i) {
                   const int64_t batch = i / p.length, from = i % p.length,
                                 to = p.seqlens[batch] + from;
                   for (int64_t head = 0; head < p.kv_heads; ++head) {
                     // What has no bytes may have no address.
                     if (k_bytes > 0)
                       memcpy(row_of<T>(p.k_cache, batch, to, head),
                              row_of<T>(p.k, batch, from, head), k_bytes);
                     if (v_bytes > 0)
                       memcpy(row_of<T>(p.v_cache, batch, to, head),
                              row_of<T>(p.v, batch, from, head), v_bytes);
                   }
                 }
               });
}

}  // namespace

template <class T> void decode(const AttentionForward& p, int64_t threads) {
  using A = acc_t<T>;
  const AttentionShape& s = p.shape;
  // As few pieces as keep the threads busy: the more heads in one, the longer what it reads.
  const int64_t pieces = least(s.kv_heads, ceil_div(threads, most(1, s.batch)));
  const int64_t group = s.heads / s.kv_heads;
  // A dot product of one key costs about as much as eight of the block kernel's.
  const int64_t work =
      8 * (s.heads / pieces) * s.queries * s.keys * (s.head_dim + s.value_head_dim);
  parallel_items(s.batch * pieces, work, threads, [&](int64_t item) {
    const Sequence seq(s, item / pieces);
    const int64_t piece = item % pieces, first = s.kv_heads * piece / pieces * group,
                  last = s.kv_heads * (piece + 1) / pieces * group, heads = last - first;
    Scratch<A> memory(heads * (s.head_dim + s.value_head_dim + s.keys + 1));
    A *q = memory.data(), *out = q + heads * s.head_dim, *scores = out + heads * s.value_head_dim;
    for (int64_t query = 0; query < s.queries; ++query)
      DecodeQuery<T>{p, seq, query, first, last, q, out, scores}.run(scores + heads * s.keys);
  });
}

template void decode<float>(const AttentionForward&, int64_t);
template void decode<bf16>(const AttentionForward&, int64_t);
template void decode<double>(const AttentionForward&, int64_t);

void launch(const CacheAppend& p, int64_t threads) {
  for_dtype(p.dtype, false, [&](auto element, auto) { append<decltype(element)>(p, threads); });
}

}  // namespace fastlm::cpu::FASTLM_ISA
