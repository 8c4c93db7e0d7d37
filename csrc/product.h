// product: the seam where the CPU's matrix product and its binding meet.
#pragma once

#include "dtype.h"

namespace fastlm {

// out = a b, or out += a b. Strides are in elements; one of a's and one of b's is 1.
struct Product {
  const void *a, *b;  // (rows, depth) and (depth, cols)
  void* out;          // (rows, cols) in the accumulation type, its columns side by side
  void* rounded;      // the same in dtype, or null
  int64_t rows, cols, depth;
  int64_t a_row, a_col, b_row, b_col, out_row, rounded_row;
  bool add;
  DType dtype;        // of a and b
  const void* ahead;  // what the next product packs, asked for meanwhile; or null
  int64_t ahead_bytes;
};

namespace cpu {
void launch(const Product& p, int64_t threads);
}

}  // namespace fastlm
