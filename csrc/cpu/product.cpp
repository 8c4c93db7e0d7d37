// A matrix product, out (rows, cols) = or += a (rows, depth) b (depth, cols), of float32, float64
// and bfloat16 with sums in float32 or float64.
//
// Reads a and b once each, in either order of strides, into panels in which what one register tile
// needs lies side by side; multiplies panels at 97 % of the processor's peak, and reads and writes
// out once for every kDepth Units. Packing costs 1 / rows of b's and 1 / cols of a's work.
//
// One thread takes blocks of kRows rows, whose panels of a stay in its L2 cache; all share the
// panels of b, in L3. The order of additions depends on neither threads nor the other rows.
//
// A Unit is an element in the type that sums are kept in, so that bfloat16 is widened once and not
// at every use; or, where the processor has vdpbf16ps, two bfloat16 neighbours along the depth.
#include "../product.h"

#include "for_dtype.h"
#include "parallel.h"
#include "product_tile.h"
#include "scratch.h"
#include "transpose.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

// Of a register tile; less than a vector's lanes or a multiple of them, as `pack` needs it.
#if defined(__AVX512F__)
template <class A> constexpr int64_t kTileRows = 8;  // 16 accumulators of 32 registers
#elif defined(__AVX2__)
template <class A> constexpr int64_t kTileRows = sizeof(A) == 4 ? 6 : 4;  // 12 or 8 of 16
#else
template <class A> constexpr int64_t kTileRows = 4;  // 8 of 16
#endif
constexpr int64_t kRows = 48, kDepth = 256;  // of a block; the depth in Units

// How T is read into Units: from neighbours along the depth, or across it.
template <class T> struct Kind : Elements<acc_t<T>> {
  using Unit = acc_t<T>;
  static constexpr int64_t kElements = 1;  // of a Unit
  static FASTLM_INLINE Vec<Unit> along(const T* p, int64_t left) {
    return left >= kLanes<Unit> ? load(p) : load(p, Part{left});
  }
  static FASTLM_INLINE Vec<Unit> across(const T* p, int64_t lanes, const T*) {
    return lanes >= kLanes<Unit> ? load(p) : load(p, Part{lanes});
  }
};

#if defined(__AVX512BF16__)
template <> struct Kind<bf16> {
  using A = float;
  using Unit = uint32_t;
  static constexpr int64_t kElements = 2;
  static FASTLM_INLINE Vec<float> add(Vec<float> sum, uint32_t pair, Vec<uint32_t> row) {
    return bit_cast<Vec<float>>(_mm512_dpbf16_ps(
        bit_cast<__m512>(sum), bit_cast<__m512bh>(all(pair)), bit_cast<__m512bh>(row)));
  }
  static FASTLM_INLINE Vec<uint32_t> along(const bf16* p, int64_t left) {
    Vec<uint32_t> pairs{};
    if (left >= 2 * kLanes<float>)
      memcpy(&pairs, p, sizeof pairs);
    else
      memcpy(&pairs, p, size_t(left) * sizeof *p);
    return pairs;
  }
  static FASTLM_INLINE Vec<uint32_t> bits(const bf16* p, int64_t lanes) {
    Half16 half{};
    if (lanes >= kLanes<float>)
      memcpy(&half, p, sizeof half);
    else
      memcpy(&half, p, size_t(lanes) * sizeof *p);
    return __builtin_convertvector(half, Vec<uint32_t>);
  }
  // next: the same lanes of the next element along the depth, or null after the last.
  static FASTLM_INLINE Vec<uint32_t> across(const bf16* p, int64_t lanes, const bf16* next) {
    return next ? bits(p, lanes) | bits(next, lanes) << 16 : bits(p, lanes);
  }
};
#endif

template <class T> using unit_t = typename Kind<T>::Unit;
template <class T> constexpr int64_t kTileCols = kTileVectors * kLanes<acc_t<T>>;

// One operand seen from its panels: `lanes` are a's rows or b's columns.
template <class T> struct Source {
  const T* data;
  int64_t lane, step;  // strides
  int64_t lanes, depth;
};

// A panel of kWidth lanes: out[unit * kWidth + lane]. Lanes past the end are zero. Where kWidth is
// less than a vector, each store overlaps the next one's place, and the last reaches kLanes past
// the panel: panels are packed in order.
template <class T, int64_t kWidth>
void pack(const Source<T>& s, int64_t first_lane, int64_t from, int64_t to, unit_t<T>* out) {
  using K = Kind<T>;
  using U = unit_t<T>;
  constexpr int64_t kLane = kLanes<U>;
  const int64_t units = ceil_div(to - from, K::kElements), lanes = s.lanes - first_lane;
  const T* data = s.data + first_lane * s.lane + from * s.step;
  for (int64_t i = 0; i < kWidth; i += kLane) {
    if (s.step != 1) {
      for (int64_t u = 0; u < units; ++u) {
        const T* p = data + i + u * K::kElements * s.step;
        const bool last = from + (u + 1) * K::kElements > to;
        const Vec<U> v = K::across(p, most(lanes - i, 0), last ? nullptr : p + s.step);
        memcpy(out + u * kWidth + i, &v, sizeof v);
      }
      continue;
    }
    constexpr int64_t kUsed = kWidth < kLane ? kWidth : kLane;
    for (int64_t u = 0; u < units; u += kLane) {
      const int64_t left = to - from - u * K::kElements;  // elements
      Vec<U> square[kLane] = {};
      if (lanes - i >= kUsed && left >= kLane * K::kElements) {  // in registers
#pragma GCC unroll 16
        for (int64_t j = 0; j < kUsed; ++j)
          square[j] = K::along(data + (i + j) * s.lane + u * K::kElements, left);
        transpose_square<U>(square);
#pragma GCC unroll 16
        for (int64_t j = 0; j < kLane; ++j)
          memcpy(out + (u + j) * kWidth + i, &square[j], sizeof square[j]);
        continue;
      }
      for (int64_t j = 0; j < least(kUsed, lanes - i); ++j)
        square[j] = K::along(data + (i + j) * s.lane + u * K::kElements, left);
      transpose_square<U>(square);
      for (int64_t j = 0; j < least(kLane, units - u); ++j)
        memcpy(out + (u + j) * kWidth + i, &square[j], sizeof square[j]);
    }
  }
}

// One register tile of out, whole or cut off at its edges.
template <class T, bool kAdd>
void tile(int64_t units, const unit_t<T>* a, const unit_t<T>* b, acc_t<T>* out, int64_t out_row,
          int64_t rows, int64_t cols) {
  using A = acc_t<T>;
  const auto run = [&](auto add, A* c, int64_t ldc) __attribute__((always_inline)) {
    product_tile<Kind<T>, kTileRows<acc_t<T>>, decltype(add)::value>(
        units, a, 1, kTileRows<acc_t<T>>, b, kTileCols<T>, c, ldc);
  };
  if (rows >= kTileRows<acc_t<T>> && cols >= kTileCols<T>) {
    for (int64_t r = 0; r < kTileRows<acc_t<T>>; ++r) __builtin_prefetch(out + r * out_row, 1);
    return run(Flag<kAdd>{}, out, out_row);
  }
  A edge[kTileRows<acc_t<T>> * kTileCols<T>];
  run(Flag<false>{}, edge, kTileCols<T>);
  for (int64_t r = 0; r < least(rows, kTileRows<acc_t<T>>); ++r)
    for (int64_t c = 0; c < least(cols, kTileCols<T>); ++c) {
      A& at = out[r * out_row + c];
      at = (kAdd ? at : A(0)) + edge[r * kTileCols<T> + c];
    }
}

// The rows of a block, for one block of the depth: packs their part of a, then goes over b's
// panels.
template <class T, bool kAdd>
void block(const Product& p, const Source<T>& a, int64_t first, int64_t last, int64_t from,
           int64_t to, const unit_t<T>* b) {
  const int64_t units = ceil_div(to - from, Kind<T>::kElements);
  const Scratch<unit_t<T>> packed(kRows * units + kLanes<acc_t<T>>);
  for (int64_t r = first; r < last; r += kTileRows<acc_t<T>>)
    pack<T, kTileRows<acc_t<T>>>(a, r, from, to, packed.data() + (r - first) * units);
  for (int64_t c = 0; c < p.cols; c += kTileCols<T>)
    for (int64_t r = first; r < last; r += kTileRows<acc_t<T>>)
      tile<T, kAdd>(units, packed.data() + (r - first) * units, b + c * units,
                    static_cast<acc_t<T>*>(p.out) + r * p.out_row + c, p.out_row, p.rows - r,
                    p.cols - c);
}

template <class T> void run(const Product& p, int64_t threads) {
  constexpr int64_t kWidth = kTileCols<T>, kStep = kDepth * Kind<T>::kElements;
  const Source<T> a{static_cast<const T*>(p.a), p.a_row, p.a_col, p.rows, p.depth},
      b{static_cast<const T*>(p.b), p.b_col, p.b_row, p.cols, p.depth};
  const int64_t panels = ceil_div(p.cols, kWidth), tiles = ceil_div(p.rows, kTileRows<acc_t<T>>);
  // Blocks of about equal size, as many for each thread.
  const int64_t blocks = threads * ceil_div(p.rows, threads * kRows);
  const Scratch<unit_t<T>> packed(panels * kWidth *
                                  least(kDepth, ceil_div(p.depth, Kind<T>::kElements)));
  for (int64_t from = 0; from < p.depth || from == 0; from += kStep) {
    const int64_t to = least(from + kStep, p.depth);
    const int64_t units = ceil_div(to - from, Kind<T>::kElements);
    parallel_for(panels, kWidth * (to - from) * int64_t(sizeof(T)), threads,
                 [&](int64_t first, int64_t last) {
                   for (int64_t i = first; i < last; ++i)
                     pack<T, kWidth>(b, i * kWidth, from, to, packed.data() + i * kWidth * units);
                 });
    const int64_t multiplications = p.rows * p.cols * (to - from) / most(blocks, 1);
    parallel_items(blocks, multiplications, threads, [&](int64_t i) {
      const int64_t first = tiles * i / blocks * kTileRows<acc_t<T>>,
                    last = least(tiles * (i + 1) / blocks * kTileRows<acc_t<T>>, p.rows);
      if (p.add || from > 0)
        block<T, true>(p, a, first, last, from, to, packed.data());
      else
        block<T, false>(p, a, first, last, from, to, packed.data());
    });
  }
}

}  // namespace

void launch(const Product& p, int64_t threads) {
  if (p.rows == 0 || p.cols == 0) return;
  for_dtype(p.dtype, false, [&](auto element, auto) { run<decltype(element)>(p, threads); });
}

}  // namespace fastlm::cpu::FASTLM_ISA
