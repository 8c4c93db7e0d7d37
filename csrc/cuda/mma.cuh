// Products of a warp: 16 rows of A times a tile B, in bfloat16 and float16 on tensor cores
// (mma.m16n8k16), in float32 by fused multiply-adds in the same layout of the result.
//
// A result of 16 x N is Fragment<N>: lane l holds, of each 8 columns n, the elements
//   [n][i]: row l / 4 + 8 * (i / 2), column 8 * n + 2 * (l % 4) + i % 2.
#pragma once

#include "copy.cuh"
#include "vec.cuh"

namespace fastlm::cuda {

template <int kColumns> using Fragment = float[kColumns / 8][4];

// A tile of rows of kDim elements in shared memory, in packs of 16 bytes. Pack k of row r lies at
// place k ^ (r % 8), so that eight rows of one column of packs fall into eight groups of banks.
template <class T, int kDim> struct Tile {
  static constexpr int kPacksPerRow = kDim / kPack<T>;
  T* data;
  __device__ T* pack(int row, int k) const {
    return data + row * kDim + ((k ^ (row % 8)) * kPack<T>);
  }
  __device__ T* element(int row, int column) const {
    return pack(row, column / kPack<T>) + column % kPack<T>;
  }
};

template <bool kTransposed> __device__ void load_matrices(uint32_t (&r)[4], const void* row) {
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

template <class T>
__device__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (sizeof(T) == 2 && !std::is_same_v<T, f16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers as one register of an operand, the first in the low half.
template <class T> __device__ uint32_t pair(float low, float high) {
  const T both[2] = {narrow<T>(low), narrow<T>(high)};
  uint32_t bits;
  memcpy(&bits, both, sizeof bits);
  return bits;
}

// d (16 x kN) += A (16 x kDim) B^T: A is rows first_row to first_row + 15 of a tile, B kN rows.
template <int kN, class T, int kDim>
__device__ void multiply_transposed(Fragment<kN>& d, Tile<T, kDim> a, int first_row,
                                    Tile<T, kDim> b) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 4) {
    for (int k = 0; k < kDim / 4; ++k) {
      float rows[2][4], columns[2][4];
      load(a.pack(first_row + lane / 4, k), 4, true, rows[0]);
      load(a.pack(first_row + lane / 4 + 8, k), 4, true, rows[1]);
#pragma unroll
      for (int n = 0; n < kN / 8; ++n) {
        load(b.pack(n * 8 + lane % 4 * 2, k), 4, true, columns[0]);
        load(b.pack(n * 8 + lane % 4 * 2 + 1, k), 4, true, columns[1]);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) d[n][i] = fmaf(rows[i / 2][j], columns[i % 2][j], d[n][i]);
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      uint32_t rows[4], columns[4];
      load_matrices<false>(rows, a.pack(first_row + lane % 16, k * 2 + lane / 16));
#pragma unroll
      for (int n = 0; n < kN / 8; n += 2) {
        load_matrices<false>(columns,
                             b.pack(n * 8 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
        multiply_add<T>(d[n], rows, columns[0], columns[1]);
        multiply_add<T>(d[n + 1], rows, columns[2], columns[3]);
      }
    }
  }
}

// Eight times kCount columns of the product below, from the `first` eight on, in float32.
template <int kK, int kCount, int kDim>
__device__ void multiply_columns(float (&d)[kCount][4], const Fragment<kK>& a, Tile<float, kDim> b,
                                 int first) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kK / 8; ++n)
#pragma unroll 1  // otherwise all loads are moved to the front, and registers run out
    for (int owner = 0; owner < 4; ++owner) {  // holds two columns of these eight of A
      float rows[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) rows[i] = __shfl_sync(~0u, a[n][i], lane / 4 * 4 + owner);
      const int k = n * 8 + owner * 2;
#pragma unroll
      for (int c = 0; c < kCount; ++c)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float* const two = b.element(k + i, (first + c) * 8 + lane % 4 * 2);
          const float2 columns = *reinterpret_cast<const float2*>(two);
          d[c][0] = fmaf(rows[i], columns.x, d[c][0]);
          d[c][1] = fmaf(rows[i], columns.y, d[c][1]);
          d[c][2] = fmaf(rows[2 + i], columns.x, d[c][2]);
          d[c][3] = fmaf(rows[2 + i], columns.y, d[c][3]);
        }
    }
}

// d (16 x kDim) += A (16 x kK) B: A is a result still in registers, B kK rows of a tile.
template <int kK, class T, int kDim>
__device__ void multiply(Fragment<kDim>& d, const Fragment<kK>& a, Tile<T, kDim> b) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 4) {
    constexpr int kAtOnce = kDim > 64 ? 2 : 4;
#pragma unroll
    for (int first = 0; first < kDim / 8; first += kAtOnce) {
      float sums[kAtOnce][4] = {};  // a sum of short sums rounds less than one long one
      multiply_columns<kK>(sums, a, b, first);
#pragma unroll
      for (int c = 0; c < kAtOnce; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) d[first + c][i] += sums[c][i];
    }
  } else {
#pragma unroll
    for (int k = 0; k < kK / 16; ++k) {
      const uint32_t rows[4] = {
          pair<T>(a[2 * k][0], a[2 * k][1]), pair<T>(a[2 * k][2], a[2 * k][3]),
          pair<T>(a[2 * k + 1][0], a[2 * k + 1][1]), pair<T>(a[2 * k + 1][2], a[2 * k + 1][3])};
#pragma unroll
      for (int n = 0; n < kDim / 8; n += 2) {
        uint32_t columns[4];
        load_matrices<true>(columns, b.pack(k * 16 + lane % 16, n + lane / 16));
        multiply_add<T>(d[n], rows, columns[0], columns[1]);
        multiply_add<T>(d[n + 1], rows, columns[2], columns[3]);
      }
    }
  }
}

}  // namespace fastlm::cuda
