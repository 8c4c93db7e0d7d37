// linear_cross_entropy: what happens to a tile of logits between the matrix products that make and
// use it. A tile is all rows and the classes from first_class on.
#pragma once

#include "dtype.h"

namespace fastlm {

struct CrossEntropyTile {
  // Logits in the accumulation type, contiguous, of all rows in forward; in backward of those from
  // kept_rows on. What is computed of them is computed of their values rounded to dtype.
  void* logits;
  // What forward leaves to backward of the first kept_rows rows. float64: the logits. float32:
  // codes of three bytes, kept_rows * classes of two, then as many of one. bfloat16: codes of
  // twelve bits, kept_rows * classes bytes, then a byte for each two. Codes have one scale a row.
  void* kept;
  void* scale;            // (kept_rows): float's factor as float, bfloat16's exponent as uint8_t
  const int64_t* target;  // (rows), counted from the first class of all
  const void* weight;     // (classes) in the accumulation type, or null
  int64_t rows, kept_rows, classes, first_class;
  double softcap;  // 0: none; z below is the logits after it
  DType dtype;     // of the operands of the product
};

// Adds a tile to each row's log-sum-exp = base + log(total), which starts with base = -inf and
// total = 0; picks target_logit = z[target] where the tile holds it; adds sum_c w_c z_c to
// weighted.
struct CrossEntropyTileForward {
  CrossEntropyTile tile;
  void *base, *total, *target_logit;  // (rows), in the accumulation type
  double* weighted;                   // (rows), or null
};

// dlogits = (exp(z - lse) * softmax - w * smooth - [c = target] * hard) * dz / dlogits
struct CrossEntropyTileBackward {
  CrossEntropyTile tile;
  void* dlogits;                        // (rows, classes) in dtype; may be where logits are
  const double* lse;                    // (rows), over all classes
  const void *softmax, *smooth, *hard;  // (rows), in the accumulation type; all 0 where ignored
};

namespace cpu {
void launch(const CrossEntropyTileForward& p, int64_t threads);
void launch(const CrossEntropyTileBackward& p, int64_t threads);
}  // namespace cpu

}  // namespace fastlm
