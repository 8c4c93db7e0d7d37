#include "matrix.h"

#include <cstring>

#include "arithmetic.h"
#include "async.h"
#include "counters.h"
#include "memory.h"

namespace emulator {

float element(Format format, uint16_t bits) {
  return format == Format::kHalf ? widen(half{bits}) : widen(bfloat{bits});
}
float element(Format format, uint32_t pair, int which) {
  return element(format, static_cast<uint16_t>(which ? pair >> 16 : pair));
}

// Fragment layouts (PTX ISA, "Matrix Fragments for mma.m16n8k16"): lane = 4 * group + place.
uint32_t a_row(uint32_t lane, int reg) { return lane / 4 + 8 * (reg & 1); }
uint32_t a_column(uint32_t lane, int reg, int which) {
  return 2 * (lane % 4) + which + 8 * (reg >> 1);
}
uint32_t b_row(uint32_t lane, int reg, int which) { return 2 * (lane % 4) + which + 8 * reg; }
uint32_t b_column(uint32_t lane) { return lane / 4; }
uint32_t c_row(uint32_t lane, int i) { return lane / 4 + 8 * (i >> 1); }
uint32_t c_column(uint32_t lane, int i) { return 2 * (lane % 4) + (i & 1); }

namespace {

constexpr int kM = 16, kN = 8, kMaxDepth = 16;

struct MmaOperands {
  uint32_t* d;
  const uint32_t *a, *b, *c;
};

float get_sum(const uint32_t* c, int i, bool half_sums) {
  return half_sums ? element(Format::kHalf, c[i / 2], i & 1) : __builtin_bit_cast(float, c[i]);
}
void put_sum(uint32_t* d, int i, bool half_sums, float value) {
  if (!half_sums)
    d[i] = __builtin_bit_cast(uint32_t, value);
  else if (i & 1)
    d[i / 2] |= uint32_t(narrow_half(value).bits) << 16;
  else
    d[i / 2] = narrow_half(value).bits;
}

// One 16-byte row of a matrix, as its address's lane sees it.
struct MatrixOperands {
  uint16_t row[8];
  uint32_t* registers;
};
uint16_t& matrix_element(void** operands, uint32_t matrix, uint32_t lane, int which,
                         bool transposed) {
  const uint32_t across = 2 * (lane % 4) + which, down = lane / 4;
  const uint32_t row = transposed ? across : down, column = transposed ? down : across;
  return static_cast<MatrixOperands*>(operands[8 * matrix + row])->row[column];
}
char* row_at(Thread& t, uint32_t site, uint64_t address, uint32_t access) {
  char* row = shared_at<16, 0>(t, address, site);
  observe(t, site, kShared, address, 16, access | kMatrix);
  return row;
}

}  // namespace

void mma(Thread& t, uint32_t site, Format format, uint32_t depth, bool half_sums, uint32_t* d,
         const uint32_t* a, const uint32_t* b, const uint32_t* c) {
  MmaOperands mine{d, a, b, c};
  const auto multiply = [&](void** operands, uint32_t) {
    float matrix_a[kM][kMaxDepth], matrix_b[kMaxDepth][kN], sums[kM][kN];
    for (uint32_t lane = 0; lane < 32; ++lane) {
      const auto& in = *static_cast<MmaOperands*>(operands[lane]);
      for (int reg = 0; reg < int(depth) / 4; ++reg)
        for (int which = 0; which < 2; ++which)
          matrix_a[a_row(lane, reg)][a_column(lane, reg, which)] =
              element(format, in.a[reg], which);
      for (int reg = 0; reg < int(depth) / 8; ++reg)
        for (int which = 0; which < 2; ++which)
          matrix_b[b_row(lane, reg, which)][b_column(lane)] = element(format, in.b[reg], which);
      for (int i = 0; i < 4; ++i)
        sums[c_row(lane, i)][c_column(lane, i)] = get_sum(in.c, i, half_sums);
    }
    for (int m = 0; m < kM; ++m)
      for (uint32_t k = 0; k < depth; ++k)
        for (int n = 0; n < kN; ++n) sums[m][n] += matrix_a[m][k] * matrix_b[k][n];
    for (uint32_t lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        put_sum(static_cast<MmaOperands*>(operands[lane])->d, i, half_sums,
                sums[c_row(lane, i)][c_column(lane, i)]);
    if (request_of(t).count) t.counts[kTensorOperations] += 2ull * kM * kN * depth;
  };
  collective(t, "mma.sync", ~0u, &mine, site, true, multiply);
}

void ldmatrix(Thread& t, uint32_t site, uint32_t count, bool transposed, uint64_t row,
              uint32_t* d) {
  MatrixOperands mine{{}, d};
  if (t.lane < 8 * count) std::memcpy(mine.row, row_at(t, site, row, kRead), sizeof mine.row);
  collective(t, "ldmatrix", ~0u, &mine, site, true, [=](void** operands, uint32_t) {
    for (uint32_t i = 0; i < count; ++i)
      for (uint32_t lane = 0; lane < 32; ++lane)
        static_cast<MatrixOperands*>(operands[lane])->registers[i] =
            matrix_element(operands, i, lane, 0, transposed) |
            uint32_t(matrix_element(operands, i, lane, 1, transposed)) << 16;
  });
}

void stmatrix(Thread& t, uint32_t site, uint32_t count, bool transposed, uint64_t row,
              const uint32_t* values) {
  MatrixOperands mine{{}, const_cast<uint32_t*>(values)};  // read only, below
  collective(t, "stmatrix", ~0u, &mine, site, true, [=](void** operands, uint32_t) {
    for (uint32_t i = 0; i < count; ++i)
      for (uint32_t lane = 0; lane < 32; ++lane) {
        const uint32_t pair = static_cast<MatrixOperands*>(operands[lane])->registers[i];
        matrix_element(operands, i, lane, 0, transposed) = static_cast<uint16_t>(pair);
        matrix_element(operands, i, lane, 1, transposed) = static_cast<uint16_t>(pair >> 16);
      }
  });
  if (t.lane >= 8 * count) return;
  std::memcpy(row_at(t, site, row, kWrite), mine.row, sizeof mine.row);
  if (block_of(t).launch->kernel.async_proxy) mark_generic_write(t, static_cast<uint32_t>(row), 16);
}

}  // namespace emulator
