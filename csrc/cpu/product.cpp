// A matrix product, out (rows, cols) = or += a (rows, depth) b (depth, cols), of float32, float64
// and bfloat16 with sums in float32 or float64.
//
// Reads a and b in either order of strides. b is packed, a slab of the depth at a time, into panels
// in which what a register tile needs lies side by side; so is a, unless its rows are that already.
// out is written once and, for every further slab, read and written again.
//
// All threads share the packed b, in L3; one takes blocks of kRows rows, whose part of a stays in
// its L2 cache. The order of additions depends neither on the threads nor on the other rows.
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
constexpr int64_t kRows = 48;  // of a block
// Each step of `pack_across` reads another page, where the processor does not look for itself: some
// of b's panels are packed together, and later steps asked for.
constexpr int64_t kPanelsTogether = 4, kStepsAhead = 8;

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
    return to_32_bits(half);
  }
  // next: the same lanes of the next element along the depth, or null after the last.
  static FASTLM_INLINE Vec<uint32_t> across(const bf16* p, int64_t lanes, const bf16* next) {
    return next ? bits(p, lanes) | bits(next, lanes) << 16 : bits(p, lanes);
  }
};
#endif

template <class T> using unit_t = typename Kind<T>::Unit;
template <class T> constexpr int64_t kTileCols = kTileVectors * kLanes<acc_t<T>>;
// Units of b that are packed at a time: for float32 320 deep at 768 columns. In proportion to the
// size of an element, as what is held beside a result is measured by the result.
template <class T> constexpr int64_t kPanelUnits = 61440 * int64_t(sizeof(T));
constexpr int64_t kMostUnits = 1024;  // of the depth that are packed at a time

// One operand seen from its panels: `lanes` are a's rows or b's columns.
template <class T> struct Source {
  const T* data;
  int64_t lane, step;  // strides
  int64_t lanes;
};

// Panels of kWidth lanes, from first_lane up to `last`: out[unit * kWidth + lane], `stride` from
// panel to panel. Lanes past the end are zero. Where kWidth is less than a vector, each store
// overlaps the next one's place, and the last reaches kLanes past the panel.
template <class T, int64_t kWidth>
void pack_across(const Source<T>& s, int64_t first_lane, int64_t last, int64_t from, int64_t to,
                 unit_t<T>* out, int64_t stride) {
  using K = Kind<T>;
  using U = unit_t<T>;
  for (int64_t at = from; at < to; at += K::kElements, out += kWidth) {
    // All panels of a step at once: they share its lines and its page.
    U* panel = out;
    for (int64_t first = first_lane; first < last; first += kWidth, panel += stride)
      for (int64_t i = 0; i < kWidth; i += kLanes<U>) {
        const T* data = s.data + first + i + at * s.step;
        prefetch(data + kStepsAhead * s.step, 0);
        const Vec<U> v =
            K::across(data, most(s.lanes - first - i, 0), at + 1 < to ? data + s.step : nullptr);
        memcpy(panel + i, &v, sizeof v);
      }
  }
}

// The same where neighbours lie along the depth: squares are transposed in registers.
template <class T, int64_t kWidth>
void pack_along(const Source<T>& s, int64_t first_lane, int64_t from, int64_t to, unit_t<T>* out) {
  using K = Kind<T>;
  using U = unit_t<T>;
  constexpr int64_t kLane = kLanes<U>, kStep = kLane * K::kElements;
  for (int64_t at = from; at < to; at += kStep, out += kLane * kWidth)
    for (int64_t i = 0; i < kWidth; i += kLane) {
      const T* data = s.data + (first_lane + i) * s.lane + at;
      const int64_t lanes = s.lanes - first_lane - i;
      Vec<U> square[kLane] = {};
      if (lanes >= kLane && to - at >= kStep) {  // without a branch: the square is in registers
#pragma GCC unroll 16
        for (int64_t j = 0; j < kLane; ++j) {
          square[j] = K::along(data + j * s.lane, kStep);
          prefetch(data + j * s.lane, 512);  // many short rows, which the processor does not see
        }
        transpose_square<U>(square);
#pragma GCC unroll 16
        for (int64_t j = 0; j < kLane; ++j)
          memcpy(out + j * kWidth + i, &square[j], sizeof square[j]);
        continue;
      }
      for (int64_t j = 0; j < least(kLane, lanes); ++j)
        square[j] = K::along(data + j * s.lane, to - at);
      transpose_square<U>(square);
      for (int64_t j = 0; j < least(kLane, ceil_div(to - at, K::kElements)); ++j)
        memcpy(out + j * kWidth + i, &square[j], sizeof square[j]);
    }
}

// kTileRows rows of a, each converted to Units side by side; zero past the last row.
template <class T>
void pack_rows(const Source<T>& s, int64_t first_row, int64_t from, int64_t to, unit_t<T>* out,
               int64_t out_row) {
  using U = unit_t<T>;
  constexpr int64_t kStep = kLanes<U> * Kind<T>::kElements;
  for (int64_t r = 0; r < kTileRows<acc_t<T>>; ++r, out += out_row) {
    const bool live = first_row + r < s.lanes;
    const T* data = s.data + (live ? first_row + r : 0) * s.lane;
    for (int64_t at = from, u = 0; at < to; at += kStep, u += kLanes<U>) {
      const Vec<U> v = live ? Kind<T>::along(data + at, to - at) : Vec<U>{};
      memcpy(out + u, &v, sizeof v);
    }
  }
}

// One register tile of out, whole or cut off at its edges. a's panel holds its rows side by side,
// or, kRowMajor, each with its Units side by side.
template <class T, bool kRowMajor, bool kAdd>
void tile(int64_t units, const unit_t<T>* a, int64_t a_row, const unit_t<T>* b, acc_t<T>* out,
          int64_t out_row, int64_t rows, int64_t cols) {
  using A = acc_t<T>;
  constexpr int64_t kHeight = kTileRows<A>, kWidth = kTileCols<T>;
  const auto run = [&](auto add, A* c, int64_t ldc) __attribute__((always_inline)) {
    product_tile<Kind<T>, kHeight, decltype(add)::value>(
        units, a, kRowMajor ? a_row : 1, kRowMajor ? 1 : kHeight, b, kWidth, c, ldc);
  };
  if (rows >= kHeight && cols >= kWidth) {
    for (int64_t r = 0; r < kHeight; ++r) __builtin_prefetch(out + r * out_row, 1);
    return run(Flag<kAdd>{}, out, out_row);
  }
  A edge[kHeight * kWidth];
  run(Flag<false>{}, edge, kWidth);
  for (int64_t r = 0; r < least(rows, kHeight); ++r)
    for (int64_t c = 0; c < least(cols, kWidth); ++c) {
      A& at = out[r * out_row + c];
      at = (kAdd ? at : A(0)) + edge[r * kWidth + c];
    }
}

// Rows [first, last) for depths [from, to): packs their part of a, then goes over b's panels.
template <class T, bool kRowMajor, bool kAdd>
void block(const Product& p, const Source<T>& a, int64_t first, int64_t last, int64_t from,
           int64_t to, const unit_t<T>* b) {
  using A = acc_t<T>;
  using U = unit_t<T>;
  constexpr int64_t kHeight = kTileRows<A>;
  const int64_t units = ceil_div(to - from, Kind<T>::kElements);
  const int64_t a_row = ceil_div(units, kLanes<U>) * kLanes<U>;
  const int64_t stride = kHeight * a_row + kLanes<U>;  // from panel to panel
  const Scratch<U> packed(kRows / kHeight * (kHeight * kMostUnits + kLanes<U>));
  struct {
    const U* data;
    int64_t row;
  } panels[kRows / kHeight];
  if constexpr (!kRowMajor)
    pack_across<T, kHeight>(a, first, last, from, to, packed.data(), stride);
  for (int64_t r = first; r < last; r += kHeight) {
    auto& panel = panels[(r - first) / kHeight];
    U* out = packed.data() + (r - first) / kHeight * stride;
    const bool there = __is_same(T, U) && r + kHeight <= p.rows;  // whole rows of Units
    panel = {out, a_row};
    if (kRowMajor && there)
      panel = {reinterpret_cast<const U*>(a.data + r * a.lane + from), a.lane};
    else if (kRowMajor)
      pack_rows<T>(a, r, from, to, out, a_row);
  }
  for (int64_t c = 0; c < p.cols; c += kTileCols<T>)
    for (int64_t r = first; r < last; r += kHeight)
      tile<T, kRowMajor, kAdd>(units, panels[(r - first) / kHeight].data,
                               panels[(r - first) / kHeight].row, b + c * units,
                               static_cast<A*>(p.out) + r * p.out_row + c, p.out_row, p.rows - r,
                               p.cols - c);
}

// Depths [from, to) of the product.
template <class T, bool kRowMajor, bool kAdd>
void slab(const Product& p, int64_t from, int64_t to, unit_t<T>* packed, int64_t threads) {
  using U = unit_t<T>;
  constexpr int64_t kHeight = kTileRows<acc_t<T>>, kWidth = kTileCols<T>;
  const Source<T> a{static_cast<const T*>(p.a), p.a_row, p.a_col, p.rows},
      b{static_cast<const T*>(p.b), p.b_col, p.b_row, p.cols};
  const int64_t units = ceil_div(to - from, Kind<T>::kElements);
  parallel_for(ceil_div(p.cols, kWidth), kWidth * (to - from) * int64_t(sizeof(T)), threads,
               [&](int64_t first, int64_t last) {
                 const int64_t together = b.step == 1 ? 1 : kPanelsTogether;
                 for (int64_t i = first; i < last; i += together) {
                   U* out = packed + i * kWidth * units;
                   const int64_t lane = i * kWidth, end = least(i + together, last) * kWidth;
                   if (b.step == 1)
                     pack_along<T, kWidth>(b, lane, from, to, out);
                   else
                     pack_across<T, kWidth>(b, lane, end, from, to, out, kWidth * units);
                 }
               });
  // Blocks of about equal size, as many for each thread.
  const int64_t tiles = ceil_div(p.rows, kHeight);
  const int64_t blocks = threads * ceil_div(p.rows, threads * kRows);
  parallel_items(blocks, p.rows * p.cols * (to - from) / blocks, threads, [&](int64_t i) {
    const int64_t first = tiles * i / blocks * kHeight, last = tiles * (i + 1) / blocks * kHeight;
    block<T, kRowMajor, kAdd>(p, a, first, least(last, p.rows), from, to, packed);
  });
}

template <class T> void run(const Product& p, int64_t threads) {
  constexpr int64_t kElements = Kind<T>::kElements, kLeastUnits = 64;
  const int64_t cols = ceil_div(p.cols, kTileCols<T>) * kTileCols<T>;
  const int64_t depth = ceil_div(p.depth, kElements);
  const int64_t allowed = most(kLeastUnits, least(kPanelUnits<T> / cols, kMostUnits));
  const int64_t units = ceil_div(depth, most(1, ceil_div(depth, allowed)));  // of equal slabs
  // As much for every product, here and in block(): the pool keeps a block of each size.
  const Scratch<unit_t<T>> packed(most(cols * units, kPanelUnits<T>));
  for (int64_t from = 0; from < p.depth || from == 0; from += units * kElements) {
    const int64_t to = least(from + units * kElements, p.depth);
    const bool row_major = p.a_col == 1, add = p.add || from > 0;
    (row_major ? add ? slab<T, true, true> : slab<T, true, false>
     : add ? slab<T, false, true>
               : slab<T, false, false>)(p, from, to, packed.data(), threads);
    if (units == 0) return;
  }
}

}  // namespace

void launch(const Product& p, int64_t threads) {
  if (p.rows == 0 || p.cols == 0) return;
  for_dtype(p.dtype, false, [&](auto element, auto) { run<decltype(element)>(p, threads); });
}

}  // namespace fastlm::cpu::FASTLM_ISA
