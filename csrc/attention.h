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

// What forward and backward share. Query i of a sequence of queries and keys of lengths Sq, Sk
// stands at position i + Sk - Sq (causal is aligned at the bottom right) and sees key j where
//   j <= position + window_right  and  j >= position - window_left  (either bound absent when
//   negative).
// causal is window_right = 0.
struct AttentionShape {
  int64_t batch, queries, keys, heads, kv_heads, head_dim;
  const int32_t *cu_seqlens_q,
      *cu_seqlens_k;         // (batch + 1), or null; then queries and keys are the longest
  const int32_t* seqlens_k;  // (batch) keys in use, or null for all
  int64_t lse_batch_stride,
      lse_head_stride;            // lse of query i: [b * batch_stride + h * head_stride + i]
  double softmax_scale, softcap;  // softcap 0: none
  int64_t window_left, window_right;
  double dropout_p;     // of the probabilities; key is the column and the query's
  const int64_t* seed;  // index in lse the row of the Philox mask (philox.h)
  DType dtype;
};

// o = softmax(softmax_scale * q k^T) v by online softmax; a query that sees no key gives 0 and lse
// = -inf. lse (batch, heads, queries), or (heads, tokens) with cu_seqlens; natural log; float32, or
// float64 when q is.
struct AttentionForward {
  AttentionShape shape;
  Bshd q, k, v, o;
  void* lse;
};

struct AttentionBackward {
  AttentionShape shape;
  Bshd dout, q, k, v, o, dq, dk, dv;
  const void* lse;
};

// k_cache[b, seqlens[b] + i] = k[b, i] and likewise v: the append of attention_with_kvcache.
struct CacheAppend {
  Bshd k, v, k_cache, v_cache;
  const int32_t* seqlens;  // (batch) keys already in the cache
  int64_t batch, length, capacity, kv_heads, head_dim;
  DType dtype;
};

namespace cpu {
void launch(const AttentionForward& p, int64_t threads);
void launch(const AttentionBackward& p, int64_t threads);
void launch(const CacheAppend& p, int64_t threads);  // std::out_of_range where a cache is full
}  // namespace cpu
namespace cuda {
void launch(const AttentionForward& p, int64_t stream);
void launch(const AttentionBackward& p, int64_t stream);
void launch(const CacheAppend& p, int64_t stream);
}  // namespace cuda

}  // namespace fastlm
