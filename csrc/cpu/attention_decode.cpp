// attention for a few queries against many keys, as in decoding, and the append to its cache.
//
// One or a few queries cannot fill the lanes of the block kernel, and the work is to read K and V
// once: a work item is one head of them, and each of its queries takes dot products along head_dim.
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

template <class T>
void decode_query(const AttentionForward& p, const Sequence& seq, int64_t head, int64_t query,
                  acc_t<T>* q, acc_t<T>* scores, acc_t<T>* out) {
  using A = acc_t<T>;
  const AttentionShape& s = p.shape;
  const int64_t kv_head = head / (s.heads / s.kv_heads), head_dim = s.head_dim;
  const int64_t low = seq.lowest(s, query), high = seq.highest(s, query);
  load_rows(row_of<T>(p.q, seq.batch, query, head), 0, 1, head_dim, q, head_dim);
  A peak = -A(INFINITY), total = 0;
  for (int64_t key = low; key <= high; ++key) {
    A score = dot<T>(q, row_of<T>(p.k, seq.batch, key, kv_head), head_dim) * A(s.softmax_scale);
    if (s.softcap > 0) score = A(s.softcap) * tanh<A>(all(score / A(s.softcap)))[0];
    scores[key - low] = score * A(kLog2e);
    peak = scores[key - low] > peak ? scores[key - low] : peak;
  }
  const A base = peak > -A(INFINITY) ? peak : A(0);
  Vec<A> sums{};
  sweep<A>(high - low + 1, [&](int64_t i, auto span) __attribute__((always_inline)) {
    const Vec<A> e = live<A>(exp2_bounded(load(scores + i, span) - base), span);
    store(scores + i, e, span);
    sums += e;
  });
  total = sum<A>(sums);
  for (int64_t d = 0; d < head_dim; ++d) out[d] = 0;
  for (int64_t key = low; key <= high; ++key) {
    const T* v = row_of<T>(p.v, seq.batch, key, kv_head);
    const A weight = scores[key - low];
    sweep<A>(head_dim, [&](int64_t d, auto span) __attribute__((always_inline)) {
      store(out + d, load(out + d, span) + load(v + d, span) * weight, span);
    });
  }
  static_cast<A*>(p.lse)[seq.lse_index(s, head, query)] =
      (peak + A(__builtin_log2(double(total)))) * A(kLn2);
  const A inverse = total > 0 ? A(1) / total : A(0);
  T* o = row_of<T>(p.o, seq.batch, query, head);
  for (int64_t d = 0; d < head_dim; ++d) put(o + d, out[d] * inverse);
}

template <class T> void append(const CacheAppend& p, int64_t threads) {
  const size_t bytes = size_t(p.head_dim) * sizeof(T);
  parallel_for(
      p.batch * p.length, 4 * p.kv_heads * int64_t(bytes), threads,
      [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          const int64_t batch = i / p.length, from = i % p.length, to = p.seqlens[batch] + from;
          for (int64_t head = 0; head < p.kv_heads; ++head) {
            memcpy(row_of<T>(p.k_cache, batch, to, head), row_of<T>(p.k, batch, from, head), bytes);
            memcpy(row_of<T>(p.v_cache, batch, to, head), row_of<T>(p.v, batch, from, head), bytes);
          }
        }
      });
}

}  // namespace

template <class T> void decode(const AttentionForward& p, int64_t threads) {
  const AttentionShape& s = p.shape;
  const int64_t group = s.heads / s.kv_heads;
  // A dot product of one key costs about as much as eight of the block kernel's.
  const int64_t work = 8 * 2 * group * s.queries * s.keys * s.head_dim;
  parallel_items(s.batch * s.kv_heads, work, threads, [&](int64_t item) {
    const Sequence seq(s, item / s.kv_heads);
    Scratch<acc_t<T>> memory(2 * s.head_dim + s.keys);
    acc_t<T>*q = memory.data(), *out = q + s.head_dim, *scores = out + s.head_dim;
    for (int64_t i = 0; i < group * s.queries; ++i)
      decode_query<T>(p, seq, item % s.kv_heads * group + i % group, i / group, q, scores, out);
  });
}

template void decode<float>(const AttentionForward&, int64_t);
template void decode<bf16>(const AttentionForward&, int64_t);
template void decode<double>(const AttentionForward&, int64_t);

void launch(const CacheAppend& p, int64_t threads) {
  for_dtype(p.dtype, false, [&](auto element, auto) { append<decltype(element)>(p, threads); });
}

}  // namespace fastlm::cpu::FASTLM_ISA
