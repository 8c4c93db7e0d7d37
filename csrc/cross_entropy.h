// cross_entropy: the seam where CPU, CUDA and binding meet.
#pragma once

#include "dtype.h"

namespace fastlm {

struct CrossEntropyOptions {
  int64_t ignore_index;
  double label_smoothing, lse_square_scale;
  double softcap;  // 0: none
};

// With z = softcap * tanh(logits / softcap) (or logits), lse = log sum exp z, t = target, e =
// label_smoothing, w = weight or 1:
//   loss = (1 - e) w_t (lse - z_t) + e / classes * sum_c w_c (lse - z_c) + lse_square_scale * lse^2
// and 0 in rows whose target is ignore_index. Where dlogits is given, the gradient is written in
// the same sweep, so that the logits are read from memory once.
struct CrossEntropyForward {
  const void* logits;     // (rows, classes), contiguous
  const int64_t* target;  // (rows)
  const void* weight;     // (classes) in the accumulation type, or null
  void *loss, *lse;  // (rows): loss float32, or float64 when logits are; lse float64, because the
                     // gradient takes differences of it and logits that may be large
  void* dlogits;     // like logits, or null; may be logits
  double dloss;      // what every row's loss is multiplied by, where dlogits is given
  int64_t rows, classes;
  CrossEntropyOptions options;
  DType dtype;
};

// dlogits = dloss * d loss / d logits; dlogits may be logits.
struct CrossEntropyBackward {
  const void *dloss, *logits;  // dloss (rows), like loss
  const int64_t* target;
  const void *weight, *lse;
  void* dlogits;
  int64_t rows, classes;
  CrossEntropyOptions options;
  DType dtype;
};

namespace cpu {
void launch(const CrossEntropyForward& p,
            int64_t threads);  // std::out_of_range on a target outside [0, classes)
void launch(const CrossEntropyBackward& p, int64_t threads);
}  // namespace cpu
namespace cuda {
void launch(const CrossEntropyForward& p, int64_t stream);
void launch(const CrossEntropyBackward& p, int64_t stream);
}  // namespace cuda

}  // namespace fastlm
