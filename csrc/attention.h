// attention: the seam where CPU, CUDA and binding meet.
#pragma once

#include "dtype.h"

namespace fastlm {

// A (batch, sequence, heads, head_dim) tensor, or (tokens, heads, head_dim) with batch_stride 0;
// strides in elements, head_dim contiguous.
struct Bshd {
  void* data;
  int64_t batch_stride, row_stride, head_stride;
};

// What is added to the scores, after the softcap.
struct ScoreBias {
  // (batch, heads, queries, keys) with any strides, in elements; or null. Of DType::u8: 0 hides a
  // key, anything else shows it. Of float32 or of q's dtype: added.
  const void* mask;
  DType mask_dtype;
  int64_t mask_batch_stride, mask_head_stride, mask_query_stride, mask_key_stride;
  // (batch, heads) float32, or null. -slope * |position of the query - key| is added (ALiBi, Press
  // et al. 2022).
  const float* alibi_slopes;
  int64_t alibi_batch_stride;

  constexpr bool any() const { return mask || alibi_slopes; }
};

// What forward and backward share. Query i of a sequence of queries and keys of lengths Sq, Sk
// stands at position i + Sk - Sq (causal is aligned at the bottom right) and sees key j where
//   j <= position + window_right  and  j >= position - window_left  (either bound absent when
//   negative)  and where the mask does not hide it.
// causal is window_right = 0.
struct AttentionShape {
  // head_dim is that of q and k, value_head_dim that of v and o. Of packed sequences queries and
  // keys are the longest.
  int64_t batch, queries, keys, heads, kv_heads, head_dim, value_head_dim;
  // (batch + 1) offsets of packed sequences, or null.
  const int32_t *cu_seqlens_q, *cu_seqlens_k;
  // (batch) keys in use, or null for all.
  const int32_t* seqlens_k;
  // lse of query i: [b * lse_batch_stride + h * lse_head_stride + i].
  int64_t lse_batch_stride, lse_head_stride;
  // softcap 0: none.
  double softmax_scale, softcap;
  int64_t window_left, window_right;
  ScoreBias bias;
  // Dropout of the probabilities: the key is the column and the query's index in lse the row of the
  // Philox mask (philox.h).
  double dropout_p;
  const int64_t* seed;
  DType dtype;
};

// o = softmax(softmax_scale * q k^T + bias) v by online softmax; a query that sees no key gives 0
// and lse = -inf. lse (batch, heads, queries), or (heads, tokens) with cu_seqlens; natural log;
// float64, because backward takes differences of it and of scores that may be large.
struct AttentionForward {
  AttentionShape shape;
  Bshd q, k, v, o;
  double* lse;
};

// dq, dk and dv of sum(dout * o) + sum(dlse * lse).
struct AttentionBackward {
  AttentionShape shape;
  Bshd dout, q, k, v, o, dq, dk, dv;
  const double *lse, *dlse;  // dlse like lse, or null
};

// k_cache[b, seqlens[b] + i] = k[b, i] and likewise v: the append of attention_with_kvcache.
struct CacheAppend {
  Bshd k, v, k_cache, v_cache;
  // (batch) keys already in the cache.
  const int32_t* seqlens;
  int64_t batch, length, capacity, kv_heads, head_dim, value_head_dim;
  DType dtype;
};

namespace cpu {
void launch(const AttentionForward& p, int64_t threads);
void launch(const AttentionBackward& p, int64_t threads);
// std::out_of_range where a cache is full.
void launch(const CacheAppend& p, int64_t threads);
}  // namespace cpu
namespace cuda {
void launch(const AttentionForward& p, int64_t stream);
void launch(const AttentionBackward& p, int64_t stream);
void launch(const CacheAppend& p, int64_t stream);
}  // namespace cuda

}  // namespace fastlm
