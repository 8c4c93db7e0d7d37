// What attention's forward and backward share on the CPU: blocks, the block product, masks and
// dropout.
//
// Scores are held transposed, as (keys, queries) blocks with the queries along the vector lanes.
// Then the maximum and the sum of a softmax are plain vector operations, masks are comparisons of
// lanes, and every product of the algorithm has the form
//   C (M x N) += A (M x K) B (K x N),  A read one element at a time in any layout, B and C in rows
//   of whole vectors,
// so that one register-tiled product serves them all and neither K nor V is ever transposed. What
// it multiplies is what sums are kept in; or pairs of bfloat16 neighbours along K where the
// processor multiplies these, so that operands are also packed across their rows, and probabilities
// rounded.
#pragma once

#include "../attention.h"
#include "elementary.h"
#include "philox.h"
#include "product_tile.h"
#include "transpose.h"

namespace fastlm::cpu::FASTLM_ISA {

constexpr int64_t kQueries = 64,
                  kKeys = 64;  // of a block; 64 x 64 wastes 6 % of a causal triangle at 1024
#if defined(__AVX512F__)
constexpr int64_t kTileRows = 8;  // 16 accumulators of the 32 registers
#else
constexpr int64_t kTileRows = 4;  // 8 of 16
#endif

// head_dim as rows of the second operand need it, and as rows of the first, in Units.
template <class A> FASTLM_INLINE constexpr int64_t padded(int64_t columns) {
  return ceil_div(columns, kTileVectors * kLanes<A>) * kTileVectors * kLanes<A>;
}
template <class T> FASTLM_INLINE constexpr int64_t padded_units(int64_t columns) {
  return ceil_div(units_of<T>(columns), kLanes<unit_t<T>>) * kLanes<unit_t<T>>;
}

// Second operands are Units too here: where those are not pairs, blocks are in what sums are kept
// in.
template <class T> constexpr bool kPairs = Kind<T>::kElements == 2;
template <class T> struct Multiplied : Elements<acc_t<T>> {};
#if defined(__AVX512BF16__)
template <> struct Multiplied<bf16> : Kind<bf16> {};
#endif

template <class U> struct Operand {  // Unit (i, j) is data[i * row + j * col]
  const U* data;
  int64_t row, col;
};

// C = A B, or C += A B. cols is a multiple of kTileVectors vectors; depth is in Units.
template <bool kAdd, class T>
void product(int64_t rows, int64_t cols, int64_t depth, Operand<unit_t<T>> a, const unit_t<T>* b,
             int64_t ldb, acc_t<T>* c, int64_t ldc) {
  for (int64_t n = 0; n < cols; n += kTileVectors * kLanes<acc_t<T>>) {
    int64_t m = 0;
    for (; m + kTileRows <= rows; m += kTileRows)
      product_tile<Multiplied<T>, kTileRows, kAdd>(depth, a.data + m * a.row, a.row, a.col, b + n,
                                                   ldb, c + m * ldc + n, ldc);
    for (; m < rows; ++m)
      product_tile<Multiplied<T>, 1, kAdd>(depth, a.data + m * a.row, a.row, a.col, b + n, ldb,
                                           c + m * ldc + n, ldc);
  }
}

// ---- blocks in and out ----

template <class T>
FASTLM_INLINE T* row_of(const Bshd& t, int64_t batch, int64_t row, int64_t head) {
  return static_cast<T*>(t.data) + batch * t.batch_stride + row * t.row_stride +
         head * t.head_stride;
}

// out (rows, ld) = source rows, in Units of neighbours along head_dim; zero past them. ld is a
// multiple of a vector's lanes.
template <class T>
void load_units(const T* source, int64_t stride, int64_t rows, int64_t head_dim, unit_t<T>* out,
                int64_t ld) {
  using U = unit_t<T>;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t u = 0; u < ld; u += kLanes<U>) {
      const int64_t d = u * Kind<T>::kElements;
      const Vec<U> units =
          d < head_dim ? Kind<T>::along(source + r * stride + d, head_dim - d) : Vec<U>{};
      memcpy(out + r * ld + u, &units, sizeof units);
    }
}

// out (Units of rows, ld) = source rows, in Units of neighbours across them; zero past head_dim. ld
// is padded.
template <class T>
void load_units_across(const T* source, int64_t stride, int64_t rows, int64_t head_dim,
                       unit_t<T>* out, int64_t ld) {
  if constexpr (kPairs<T>) {
    constexpr int64_t kLane = kLanes<unit_t<T>>;
    for (int64_t r = 0; r < rows; r += 2, out += ld)
      for (int64_t d = 0; d < ld; d += 2 * kLane) {
        const T* row = source + r * stride + d;
        Vec<unit_t<T>> units[2];
        Kind<T>::across(units, row, head_dim - d, r + 1 < rows ? row + stride : nullptr);
        memcpy(out + d, units, sizeof units);
      }
  } else {
    load_units<T>(source, stride, rows, head_dim, out, ld);
  }
}

// out (Units of head_dim, kQueries) = transpose of `rows` source rows, times scale unless Units are
// pairs; queries past them are zero.
template <class T>
void load_transposed(const T* source, int64_t stride, int64_t rows, int64_t head_dim,
                     acc_t<T> scale, unit_t<T>* out) {
  using U = unit_t<T>;
  constexpr int64_t kLane = kLanes<U>, kElements = Kind<T>::kElements;
  for (int64_t q = 0; q < kQueries; q += kLane)
    for (int64_t d = 0; d < head_dim; d += kLane * kElements) {
      Vec<U> square[kLane] = {};
      for (int64_t i = 0; i < least(kLane, rows - q); ++i) {
        square[i] = Kind<T>::along(source + (q + i) * stride + d, head_dim - d);
        if constexpr (!kPairs<T>) square[i] *= scale;
      }
      transpose_square<U>(square);
      for (int64_t i = 0; i < least(kLane, units_of<T>(head_dim - d)); ++i)
        memcpy(out + (d / kElements + i) * kQueries + q, &square[i], sizeof square[i]);
    }
}

// Scores of pairs, which are of queries that are not scaled.
template <class T> void scale_block(acc_t<T> scale, int64_t keys, acc_t<T>* scores) {
  using A = acc_t<T>;
  if constexpr (kPairs<T>)
    for (int64_t i = 0; i < keys * kQueries; i += kLanes<A>)
      store(scores + i, load(scores + i) * scale);
}

// A block (keys, kQueries) as the second operand of a product over keys, (Units of keys, kQueries):
// in `out`, or where it is.
template <class T> const unit_t<T>* over_keys(const acc_t<T>* block, int64_t keys, unit_t<T>* out) {
  if constexpr (kPairs<T>) {
    for (int64_t k = 0; k < keys; k += 2)
      for (int64_t q = 0; q < kQueries; q += kLanes<float>) {
        const float* at = block + k * kQueries + q;
        const Half16 first = narrow(load(at));
        const Half16 second = k + 1 < keys ? narrow(load(at + kQueries)) : Half16{};
        const Vec<uint32_t> pairs = to_32_bits(first) | to_32_bits(second) << 16;
        memcpy(out + k / 2 * kQueries + q, &pairs, sizeof pairs);
      }
    return out;
  } else {
    return block;
  }
}

// The same as the first operand of a product over queries, (keys, Units of kQueries).
template <class T>
const unit_t<T>* over_queries(const acc_t<T>* block, int64_t keys, unit_t<T>* out) {
  if constexpr (kPairs<T>) {
    for (int64_t i = 0; i < keys * kQueries; i += kLanes<float>)
      store(reinterpret_cast<T*>(out) + i, load(block + i));
    return out;
  } else {
    return block;
  }
}

// The inverse: destination row i = block (head_dim, kQueries) column i * factor[i].
template <class T>
void store_transposed(const acc_t<T>* block, const acc_t<T>* factor, int64_t rows, int64_t head_dim,
                      T* out, int64_t stride) {
  using A = acc_t<T>;
  for (int64_t q = 0; q < rows; q += kLanes<A>) {
    const Vec<A> scale = load(factor + q);
    sweep<A>(head_dim, [&](int64_t d, auto span) __attribute__((always_inline)) {
      Vec<A> square[kLanes<A>] = {};
      for (int64_t i = 0; i < least(kLanes<A>, head_dim - d); ++i)
        square[i] = load(block + (d + i) * kQueries + q) * scale;
      transpose_square<A>(square);
      for (int64_t i = 0; i < least(kLanes<A>, rows - q); ++i)
        store(out + (q + i) * stride + d, square[i], span);
    });
  }
}

// ---- which keys a query sees ----

// One sequence of the batch: where it starts in q and k, and how long it is.
struct Sequence {
  int64_t index, batch, first_query, first_key, queries, keys;

  Sequence(const AttentionShape& s, int64_t b)
      : index(b), batch(b), first_query(0), first_key(0), queries(s.queries), keys(s.keys) {
    if (s.cu_seqlens_q) {
      batch = 0;  // packed: one row of tokens
      first_query = s.cu_seqlens_q[b];
      first_key = s.cu_seqlens_k[b];
      queries = s.cu_seqlens_q[b + 1] - first_query;
      keys = s.cu_seqlens_k[b + 1] - first_key;
    } else if (s.seqlens_k) {
      keys = s.seqlens_k[b];
    }
  }
  int64_t lse_index(const AttentionShape& s, int64_t head, int64_t query) const {
    return batch * s.lse_batch_stride + head * s.lse_head_stride + first_query + query;
  }
  // The keys that a query sees: from lowest to highest, none where lowest > highest.
  int64_t highest(const AttentionShape& s, int64_t query) const {
    return s.window_right < 0 ? keys - 1 : least(keys - 1, query + keys - queries + s.window_right);
  }
  int64_t lowest(const AttentionShape& s, int64_t query) const {
    return s.window_left < 0 ? 0 : most(0, query + keys - queries - s.window_left);
  }
};

// scores (keys, kQueries) = `masked` where the query does not see the key.
template <class A>
void mask_block(const AttentionShape& s, const Sequence& seq, int64_t query, int64_t key,
                int64_t keys, A masked, A* scores) {
  const int64_t last_query = least(query + kQueries, seq.queries) - 1;
  const bool all_seen = key + keys - 1 <= seq.highest(s, query) && key >= seq.lowest(s, last_query);
  if (all_seen) return;
  for (int64_t q = 0; q < kQueries; q += kLanes<A>) {
    Vec<bits_t<A>> low{}, high{};
    for (int64_t i = 0; i < kLanes<A>; ++i) {
      const int64_t at =
          least(query + q + i, last_query);  // queries past the end see what the last one sees
      low[i] = bits_t<A>(seq.lowest(s, at) - key);
      high[i] = bits_t<A>(seq.highest(s, at) - key);
    }
    for (int64_t k = 0; k < keys; ++k) {
      A* row = scores + k * kQueries + q;
      const Vec<bits_t<A>> at = Vec<bits_t<A>>{} + bits_t<A>(k);
      store(row, (at >= low) & (at <= high) ? load(row) : all(masked));
    }
  }
}

// ---- what is added to scores ----

// -inf where a byte of the mask hides a key, else 0.
template <class A> FASTLM_INLINE A bias_of(uint8_t shown) { return shown ? A(0) : -A(INFINITY); }
template <class A, class M> FASTLM_INLINE A bias_of(M added) {
  // Finite in base 2 too: where every key is hidden by a huge number, torch's softmax is uniform.
  constexpr A kLowest = sizeof(A) == 4 ? A(-2e38) : A(-1e308);
  const A bias = A(scalar(added));
  return bias < kLowest && bias > -A(INFINITY) ? kLowest : bias;
}

// f(pointer to elements) by the mask's dtype.
template <class A, class F> FASTLM_INLINE void for_mask(const ScoreBias& bias, const F& f) {
  switch (bias.mask_dtype) {
    case DType::u8: return f(static_cast<const uint8_t*>(bias.mask));
    case DType::bf16: return f(static_cast<const bf16*>(bias.mask));
    case DType::f32: return f(static_cast<const float*>(bias.mask));
    default: return f(static_cast<const double*>(bias.mask));
  }
}

// scores (keys, kQueries), in base 2, += the mask of queries from `query` and keys from `key` on.
template <class A, class M>
void add_mask(const AttentionShape& s, const Sequence& seq, const M* mask, int64_t query,
              int64_t key, int64_t keys, A* scores) {
  const int64_t step = s.bias.mask_key_stride, queries = least(kQueries, seq.queries - query);
  for (int64_t q = 0; q < queries; q += kLanes<A>)
    for (int64_t k = 0; k < keys; k += kLanes<A>) {
      Vec<A> square[kLanes<A>] = {};
      const int64_t count = least(kLanes<A>, keys - k);
      for (int64_t i = 0; i < least(kLanes<A>, queries - q); ++i) {
        const M* row = mask + (query + q + i) * s.bias.mask_query_stride + (key + k) * step;
        A lanes[kLanes<A>] = {};
        for (int64_t j = 0; j < count; ++j) lanes[j] = bias_of<A>(row[j * step]);
        square[i] = load(lanes) * A(kLog2e);
      }
      transpose_square<A>(square);
      for (int64_t j = 0; j < count; ++j) {
        A* at = scores + (k + j) * kQueries + q;
        store(at, load(at) + square[j]);
      }
    }
}

// The same of ALiBi.
template <class A>
void add_alibi(const Sequence& seq, A slope, int64_t query, int64_t key, int64_t keys, A* scores) {
  const A first = A(query + seq.keys - seq.queries - key);
  for (int64_t q = 0; q < kQueries; q += kLanes<A>) {
    Vec<A> ahead{};  // of the block's first key
    for (int64_t i = 0; i < kLanes<A>; ++i) ahead[i] = first + A(q + i);
    for (int64_t k = 0; k < keys; ++k, ahead -= A(1)) {
      A* at = scores + k * kQueries + q;
      store(at, load(at) - max(ahead, -ahead) * (slope * A(kLog2e)));
    }
  }
}

template <class A>
void bias_block(const AttentionShape& s, const Sequence& seq, int64_t head, int64_t query,
                int64_t key, int64_t keys, A* scores) {
  const ScoreBias& bias = s.bias;
  if (bias.mask)
    for_mask<A>(bias, [&](const auto* mask) {
      const int64_t at = seq.batch * bias.mask_batch_stride + head * bias.mask_head_stride;
      add_mask(s, seq, mask + at, query, key, keys, scores);
    });
  if (bias.alibi_slopes) {
    const A slope = A(bias.alibi_slopes[seq.index * bias.alibi_batch_stride + head]);
    add_alibi(seq, slope, query, key, keys, scores);
  }
}

// probabilities (keys, kQueries) *= keep / (1 - p); key is a multiple of 4.
template <class A>
void dropout_block(const DropoutRule& rule, uint64_t first_row, int64_t key, int64_t keys,
                   A* probabilities) {
  for (int64_t q = 0; q < kQueries; q += kWords) {
    const uint64_t row = first_row + uint64_t(q);
    const Words low = count_up(uint32_t(row));
    const Words carried = low < uint32_t(row) ? Words{} + 1u : Words{};
    const Words high = carried + uint32_t(row >> 32);
    for (int64_t k = 0; k < keys; k += 4) {
      const Random4 random = philox(rule.seed, Words{} + uint32_t((key + k) / 4), low, high);
      for (int64_t w = 0; w < least(4, keys - k); ++w) {
        const Vec<float> factor = rule.factor(random.word[w]);
        A* out = probabilities + (k + w) * kQueries + q;
        for (int64_t i = 0; i < kWords; ++i) out[i] *= rule.widened(factor[i], A{});
      }
    }
  }
}

// scores = softcap * tanh(scores / softcap) * log2(e), in place; derivative, where given, gets 1 -
// tanh^2.
template <class A> void softcap_block(A softcap, int64_t keys, A* scores, A* derivative) {
  sweep<A>(keys * kQueries, [&](int64_t i, auto span) __attribute__((always_inline)) {
    const Vec<A> t = tanh(load(scores + i, span) / softcap);
    store(scores + i, t * (softcap * A(kLog2e)), span);
    if (derivative) store(derivative + i, A(1) - t * t, span);
  });
}

}  // namespace fastlm::cpu::FASTLM_ISA
