// The pieces of a matrix product, out (rows, cols) = or += a (rows, depth) b (depth, cols), of
// float32, float64 and bfloat16 with sums in float32 or float64.
//
// a and b are read in either order of strides. b is packed, a slab of the depth at a time, into
// panels in which what a register tile needs lies side by side (pack_panels); multiply() takes
// kRows rows of a, or fewer, packs them too, unless they are that already, and goes over the
// panels. The order of additions does not depend on the other rows.
//
// Panels of b take no more memory than b: where Units are not pairs they hold bfloat16, which is
// widened as it is read.
#pragma once

#include "product_tile.h"
#include "transpose.h"

namespace fastlm::cpu::FASTLM_ISA {

// Of a register tile, as `pack_across` needs it: less than a vector's lanes or a multiple of them;
// where Units are pairs, a divisor of two vectors'.
#if defined(__AVX512F__)
template <class A> constexpr int64_t kTileRows = 8;  // 16 accumulators of 32 registers
#elif defined(__AVX2__)
template <class A> constexpr int64_t kTileRows = sizeof(A) == 4 ? 6 : 4;  // 12 or 8 of 16
#else
template <class A> constexpr int64_t kTileRows = 4;  // 8 of 16
#endif
template <class A> constexpr int64_t kRows = 8 * kTileRows<A>;  // of a block
// Each step of `pack_across` reads another page, where the processor does not look for itself: some
// of b's panels are packed together, and later steps asked for.
constexpr int64_t kPanelsTogether = 4, kStepsAhead = 8;

template <class T> using stored_t = typename Kind<T>::Stored;  // what panels of b hold
template <class T> constexpr int64_t kTileCols = kTileVectors * kLanes<acc_t<T>>;
constexpr int64_t kSlabUnits = 512;  // of the depth that are packed at a time, at most

// One operand seen from its panels: `lanes` are a's rows or b's columns.
template <class T> struct Source {
  const T* data;
  int64_t lane, step;  // strides
  int64_t lanes;
};

template <class U> FASTLM_INLINE void store_units(U* out, Vec<U> units) {
  memcpy(out, &units, sizeof units);
}
FASTLM_INLINE void store_units(bf16* out, Vec<float> units) { store(out, units); }

// Panels of kWidth lanes, from first_lane up to `last`: out[unit * kWidth + lane], `stride` from
// panel to panel. Lanes past the end are zero. Where kWidth divides no vectors, each store overlaps
// the next one's place, and the last reaches kLanes past the panel.
template <class T, int64_t kWidth, class S>
void pack_across(const Source<T>& s, int64_t first_lane, int64_t last, int64_t from, int64_t to,
                 S* out, int64_t stride) {
  using K = Kind<T>;
  using U = unit_t<T>;
  constexpr int64_t kLane = kLanes<U>, kVectors = 2 * kLane % kWidth == 0 ? 2 : 1;
  constexpr int64_t kPanels = most(1, kVectors * kLane / kWidth);  // that are read together
  constexpr size_t kBytes = size_t(kPanels == 1 ? kVectors * kLane : kWidth) * sizeof(U);
  for (int64_t at = from; at < to; at += K::kElements, out += kWidth) {
    // All panels of a step at once: they share its lines and its page.
    S* panel = out;
    for (int64_t lane = first_lane; lane < last; lane += kPanels * kWidth) {
      const T* data = s.data + lane + at * s.step;
      for (int64_t v = 0; v < kVectors; ++v)  // a line of one row each, or of two rows
        prefetch(data + kStepsAhead * s.step + v * (K::kElements == 1 ? kLane : s.step), 0);
      Vec<U> units[kVectors];
      K::across(units, data, s.lanes - lane, at + 1 < to ? data + s.step : nullptr);
      if constexpr (kVectors * kLane == kWidth) {
#pragma GCC unroll 2
        for (int64_t v = 0; v < kVectors; ++v) store_units(panel + v * kLane, units[v]);
        panel += stride;
        continue;
      }
#pragma GCC unroll 4
      for (int64_t i = 0; i < kPanels; ++i, panel += stride)
        if (lane + i * kWidth < last)
          memcpy(panel, reinterpret_cast<const U*>(units) + i * kWidth, kBytes);
    }
  }
}

// The same where neighbours lie along the depth: squares are transposed in registers.
template <class T, int64_t kWidth, class S>
void pack_along(const Source<T>& s, int64_t first_lane, int64_t from, int64_t to, S* out) {
  using K = Kind<T>;
  using U = unit_t<T>;
  constexpr int64_t kLane = kLanes<U>, kStep = kLane * K::kElements;
  for (int64_t at = from; at < to; at += kStep, out += kLane * kWidth)
    for (int64_t i = 0; i < kWidth; i += kLane) {
      const T* data = s.data + (first_lane + i) * s.lane + at;
      const int64_t lanes = s.lanes - first_lane - i;
      Vec<U> square[kLane];
      if (lanes >= kLane && to - at >= kStep) {  // without a branch: the square is in registers
#pragma GCC unroll 16
        for (int64_t j = 0; j < kLane; ++j) {
          square[j] = K::along(data + j * s.lane, kStep);
          prefetch(data + (kWidth + j) * s.lane, 0);  // of the next panel: rows are short
        }
        transpose_square<U>(square);
#pragma GCC unroll 16
        for (int64_t j = 0; j < kLane; ++j) store_units(out + j * kWidth + i, square[j]);
        continue;
      }
      for (int64_t j = 0; j < kLane; ++j)
        square[j] = j < lanes ? K::along(data + j * s.lane, to - at) : Vec<U>{};
      transpose_square<U>(square);
      for (int64_t j = 0; j < least(kLane, ceil_div(to - at, K::kElements)); ++j)
        store_units(out + j * kWidth + i, square[j]);
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
template <class T, bool kRowMajor, bool kAdd, class Out>
void tile(int64_t units, const unit_t<T>* a, int64_t a_row, const stored_t<T>* b, Out* out,
          int64_t out_row, int64_t rows, int64_t cols) {
  using A = acc_t<T>;
  constexpr int64_t kHeight = kTileRows<A>, kWidth = kTileCols<T>;
  const auto run = [&](auto add, auto* c, int64_t ldc) __attribute__((always_inline)) {
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
      Out* at = out + r * out_row + c;
      put(at, (kAdd ? scalar(*at) : A(0)) + edge[r * kWidth + c]);
    }
}

// Memory that is asked for, part by part, while a product computes.
struct Ahead {
  const void* data;
  int64_t bytes;

  Ahead part(int64_t i, int64_t of) const {
    return {static_cast<const char*>(data) + bytes * i / of, bytes * (i + 1) / of - bytes * i / of};
  }
  void ask() const {
    for (int64_t i = 0; i < bytes; i += 64)
      __builtin_prefetch(static_cast<const char*>(data) + i, 0, 2);
  }
};

// Columns [first, last) of b at depths [from, to), first a multiple of kTileCols.
template <class T>
void pack_panels(const Source<T>& b, int64_t first, int64_t last, int64_t from, int64_t to,
                 stored_t<T>* out) {
  constexpr int64_t kWidth = kTileCols<T>;
  const int64_t units = units_of<T>(to - from);
  const int64_t together = (b.step == 1 ? 1 : kPanelsTogether) * kWidth;
  for (int64_t c = first; c < last; c += together, out += together * units) {
    if (b.step == 1)
      pack_along<T, kWidth>(b, c, from, to, out);
    else
      pack_across<T, kWidth>(b, c, least(c + together, last), from, to, out, kWidth * units);
  }
}

// Whether `multiply` reads rows of a, which lie `lane` apart, as they lie, but for the last few.
template <class T> constexpr bool rows_are_units(int64_t lane, int64_t depth) {
  constexpr int64_t kElements = Kind<T>::kElements;
  return sizeof(unit_t<T>) == kElements * sizeof(T) && lane % kElements == 0 &&
         depth % kElements == 0;
}

// From one panel of a to the next, in Units.
template <class T> constexpr int64_t panel_stride(int64_t units) {
  constexpr int64_t kLane = kLanes<unit_t<T>>;
  return kTileRows<acc_t<T>> * ceil_div(units, kLane) * kLane + kLane;
}

// The Units that `multiply` packs, at most.
template <class T> constexpr int64_t packed_units(int64_t units, bool as_they_lie) {
  return panel_stride<T>(units) * (as_they_lie ? 1 : kRows<acc_t<T>> / kTileRows<acc_t<T>>);
}

// out (rows, cols) = or += rows of a at depths [from, to) times the panels b; rows <= kRows. out is
// in the accumulation type or in T.
template <class T, bool kRowMajor, bool kAdd, class Out>
void multiply(const Source<T>& a, int64_t rows, int64_t from, int64_t to, const stored_t<T>* b,
              int64_t cols, Out* out, int64_t out_row, unit_t<T>* packed, const Ahead& ahead) {
  using A = acc_t<T>;
  using U = unit_t<T>;
  using K = Kind<T>;
  constexpr int64_t kHeight = kTileRows<A>;
  const int64_t units = units_of<T>(to - from), stride = panel_stride<T>(units);
  const int64_t a_row = ceil_div(units, kLanes<U>) * kLanes<U>;
  const bool there = kRowMajor && rows_are_units<T>(a.lane, to - from);
  struct {
    const U* data;
    int64_t row;
  } panels[kRows<A> / kHeight];
  if constexpr (!kRowMajor) pack_across<T, kHeight>(a, 0, rows, from, to, packed, stride);
  for (int64_t r = 0; r < rows; r += kHeight) {
    auto& panel = panels[r / kHeight];
    if (there && r + kHeight <= rows) {
      panel = {reinterpret_cast<const U*>(a.data + r * a.lane + from), a.lane / K::kElements};
      continue;
    }
    U* mine = packed + (there ? 0 : r / kHeight * stride);
    panel = {mine, a_row};
    if constexpr (kRowMajor) pack_rows<T>(a, r, from, to, mine, a_row);
  }
  const int64_t tiles = ceil_div(cols, kTileCols<T>) * ceil_div(rows, kHeight);
  int64_t done = 0;
  for (int64_t c = 0; c < cols; c += kTileCols<T>)
    for (int64_t r = 0; r < rows; r += kHeight) {
      const auto& panel = panels[r / kHeight];
      ahead.part(done++, tiles).ask();
      tile<T, kRowMajor, kAdd>(units, panel.data, panel.row, b + c * units, out + r * out_row + c,
                               out_row, rows - r, cols - c);
    }
}

// The depth in about equal slabs.
struct Slabs {
  int64_t count, depth;

  template <class T> static Slabs of(int64_t depth) {
    const int64_t units = units_of<T>(depth), count = most(1, ceil_div(units, kSlabUnits));
    return {count, ceil_div(units, count) * Kind<T>::kElements};
  }
  // body(slab, from, to); once where there is no depth, as a product is zero then.
  template <class Body> void each(int64_t total, const Body& body) const {
    for (int64_t slab = 0; slab < count; ++slab)
      body(slab, least(total, slab * depth), least(total, (slab + 1) * depth));
  }
};

}  // namespace fastlm::cpu::FASTLM_ISA
