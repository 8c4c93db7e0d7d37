// Matrix instructions of one warp: mma.sync, ldmatrix, stmatrix.
#pragma once
#include "thread.h"

namespace emulator {

enum class Format : uint32_t { kHalf, kBfloat };

// d = a * b + c for m16n8k<depth>, depth 8 or 16; a (depth / 4 registers), b (depth / 8).
// c and d are four floats, or two registers of half pairs when `half_sums`.
void mma(Thread&, uint32_t site, Format, uint32_t depth, bool half_sums, uint32_t* d,
         const uint32_t* a, const uint32_t* b, const uint32_t* c);
// `count` 8x8 matrices of 16-bit elements; lane 8i + r gives the shared address of row r of matrix
// i.
void ldmatrix(Thread&, uint32_t site, uint32_t count, bool transposed, uint64_t row, uint32_t* d);
void stmatrix(Thread&, uint32_t site, uint32_t count, bool transposed, uint64_t row,
              const uint32_t* values);

struct WgmmaOperands {
  uint32_t* const* d;  // N / 2 accumulator registers of one thread
  const uint32_t* a;   // four registers, or null when a is in shared memory
  uint64_t a_descriptor, b_descriptor;
  bool accumulate;
};
struct Wgmma {  // the immediate operands, the same for all threads
  Format format;
  uint32_t n;
  bool negate_a, negate_b, transpose_a, transpose_b;
};

// wgmma.mma_async m64nNk16 of 128 threads. The late form keeps the pointers until wait_wgmma.
void wgmma(Thread&, uint32_t site, const Wgmma&, const WgmmaOperands&);
void commit_wgmma(Thread&);
void wait_wgmma(Thread&, uint32_t site, uint32_t groups_left);

}  // namespace emulator
