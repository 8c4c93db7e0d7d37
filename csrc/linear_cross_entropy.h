// linear_cross_entropy: the seam where the CPU's kernel and its binding meet.
#pragma once

#include "cross_entropy.h"

namespace fastlm {

// The loss that cross_entropy.h defines, of logits = x linear_weight' + linear_bias, rounded to
// dtype, which are never all held; and the gradients of sum(dloss * loss).
struct LinearCrossEntropy {
  const void *x, *linear_weight, *linear_bias;  // (rows, features), (classes, features), (classes)
                                                // or null
  const int64_t* target;                        // (rows)
  const void* weight;                           // (classes) in the accumulation type, or null
  void* loss;                                   // (rows) in the accumulation type
  double* lse;                                  // (rows), read where there is no forward
  const void* dloss;                            // (rows), like loss
  void *dx, *dlinear_weight, *dlinear_bias;     // null where not wanted
  int64_t rows, features, classes;
  CrossEntropyOptions options;
  DType dtype;
  bool forward, backward;  // which of the two are asked for
};

namespace cpu {
// std::out_of_range on a target outside [0, classes).
void launch(const LinearCrossEntropy& p, int64_t threads);
}  // namespace cpu

}  // namespace fastlm
