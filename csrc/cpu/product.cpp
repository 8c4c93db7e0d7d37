// A matrix product, out (rows, cols) = or += a (rows, depth) b (depth, cols), of float32, float64
// and bfloat16 with sums in float32 or float64.
//
// Reads a and b in either order of strides. b is packed, a slab of the depth at a time, into panels
// in which what a register tile needs lies side by side; so is a, unless its rows are that already.
// out is written once and, for every further slab, read and written again.
//
// Each thread has a share of out, some rows of some columns, and packs its own b: to read what
// another core has just written takes as long as to pack it. It takes blocks of kRows rows, whose
// part of a stays in its L2 cache; done with its own, those that other threads have not begun. The
// order of additions depends neither on the threads nor on the other rows.
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

// How T is read into Units: from neighbours along the depth, or across it.
template <class T> struct Kind : Elements<acc_t<T>> {
  using Unit = acc_t<T>;
  static constexpr int64_t kElements = 1;  // of a Unit
  static FASTLM_INLINE Vec<Unit> along(const T* p, int64_t left) {
    return left >= kLanes<Unit> ? load(p) : load(p, Part{left});
  }
  template <int kVectors>
  static FASTLM_INLINE void across(Vec<Unit> (&out)[kVectors], const T* p, int64_t lanes,
                                   const T*) {
#pragma GCC unroll 2
    for (int64_t v = 0; v < kVectors; ++v, p += kLanes<Unit>, lanes -= kLanes<Unit>)
      out[v] = lanes >= kLanes<Unit> ? load(p) : lanes > 0 ? load(p, Part{lanes}) : Vec<Unit>{};
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
  // next: the same lanes of the next element along the depth, or null after the last.
  static FASTLM_INLINE void across(Vec<uint32_t> (&out)[2], const bf16* p, int64_t lanes,
                                   const bf16* next) {
    const Halves a = halves(p, lanes), b = next ? halves(next, lanes) : Halves{};
    const Halves low = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    out[0] = bit_cast<Vec<uint32_t>>(__builtin_shuffle(a, b, low));
    out[1] = bit_cast<Vec<uint32_t>>(__builtin_shuffle(a, b, low + 16));
  }

 private:
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes)));
  static FASTLM_INLINE Halves halves(const bf16* p, int64_t lanes) {
    Halves v{};
    if (lanes >= 2 * kLanes<float>)
      memcpy(&v, p, sizeof v);
    else
      memcpy(&v, p, size_t(most(lanes, 0)) * sizeof *p);
    return v;
  }
};
#endif

template <class T> using unit_t = typename Kind<T>::Unit;
template <class T> constexpr int64_t kTileCols = kTileVectors * kLanes<acc_t<T>>;
// Units of b that are packed at a time: for float32 512 deep at 768 columns. In proportion to the
// size of an element, as what is held beside a result is measured by the result.
template <class T> constexpr int64_t kPanelUnits = 98304 * int64_t(sizeof(T));
constexpr int64_t kMostUnits = 512;  // of the depth that are packed at a time

// One operand seen from its panels: `lanes` are a's rows or b's columns.
template <class T> struct Source {
  const T* data;
  int64_t lane, step;  // strides
  int64_t lanes;
};

// Panels of kWidth lanes, from first_lane up to `last`: out[unit * kWidth + lane], `stride` from
// panel to panel. Lanes past the end are zero. Where kWidth divides no vectors, each store overlaps
// the next one's place, and the last reaches kLanes past the panel.
template <class T, int64_t kWidth>
void pack_across(const Source<T>& s, int64_t first_lane, int64_t last, int64_t from, int64_t to,
                 unit_t<T>* out, int64_t stride) {
  using K = Kind<T>;
  using U = unit_t<T>;
  constexpr int64_t kLane = kLanes<U>, kVectors = 2 * kLane % kWidth == 0 ? 2 : 1;
  constexpr int64_t kPanels = most(1, kVectors * kLane / kWidth);  // that are read together
  constexpr size_t kBytes = size_t(kPanels == 1 ? kVectors * kLane : kWidth) * sizeof(U);
  for (int64_t at = from; at < to; at += K::kElements, out += kWidth) {
    // All panels of a step at once: they share its lines and its page.
    U* panel = out;
    for (int64_t lane = first_lane; lane < last; lane += kPanels * kWidth) {
      const T* data = s.data + lane + at * s.step;
      for (int64_t v = 0; v < kVectors; ++v)  // a line of one row each, or of two rows
        prefetch(data + kStepsAhead * s.step + v * (K::kElements == 1 ? kLane : s.step), 0);
      Vec<U> units[kVectors];
      K::across(units, data, s.lanes - lane, at + 1 < to ? data + s.step : nullptr);
#pragma GCC unroll 4
      for (int64_t i = 0; i < kPanels; ++i, panel += stride)
        if (lane + i * kWidth < last)
          memcpy(panel, reinterpret_cast<const U*>(units) + i * kWidth, kBytes);
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
          prefetch(data + (kWidth + j) * s.lane, 0);  // of the next panel: rows are short
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

// Rows and columns of out.
struct Share {
  int64_t first_row, last_row, first_col, last_col;
};

// The shares, one a thread: `across` side by side, `down` one below the other.
struct Grid {
  int64_t across, down;
};

template <class T> Share share_of(const Product& p, const Grid& grid, int64_t i) {
  constexpr int64_t kHeight = kTileRows<acc_t<T>>, kWidth = kTileCols<T>;
  const int64_t tiles = ceil_div(p.rows, kHeight), panels = ceil_div(p.cols, kWidth);
  const int64_t row = i / grid.across, col = i % grid.across;
  return {tiles * row / grid.down * kHeight, least(p.rows, tiles * (row + 1) / grid.down * kHeight),
          panels * col / grid.across * kWidth,
          least(p.cols, panels * (col + 1) / grid.across * kWidth)};
}

// The cheapest, in multiplications: those of the largest share, and 16 for each element of its rows
// of a and columns of b, which it packs or reads first.
template <class T> Grid grid_of(const Product& p, int64_t threads) {
  Grid best{1, threads};
  int64_t least_cost = INT64_MAX;
  for (int64_t across = 1; across <= threads; ++across) {
    if (threads % across) continue;
    const Grid grid{across, threads / across};
    const Share last = share_of<T>(p, grid, threads - 1);  // the largest
    const int64_t rows = last.last_row - last.first_row, cols = last.last_col - last.first_col;
    const int64_t cost = rows * cols + 16 * (rows + cols);
    if (cost < least_cost) least_cost = cost, best = grid;
  }
  return best;
}

// Memory that is asked for, part by part, while a product computes.
struct Ahead {
  const char* data;
  int64_t bytes;

  Ahead part(int64_t i, int64_t of) const {
    return {data + bytes * i / of, bytes * (i + 1) / of - bytes * i / of};
  }
  void ask() const {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(data + i, 0, 2);
  }
};

// Depths [from, to) of a share's columns of b.
template <class T>
void pack(const Product& p, const Share& share, int64_t from, int64_t to, unit_t<T>* out) {
  constexpr int64_t kWidth = kTileCols<T>;
  const Source<T> b{static_cast<const T*>(p.b), p.b_col, p.b_row, p.cols};
  const int64_t units = ceil_div(to - from, Kind<T>::kElements);
  const int64_t together = (b.step == 1 ? 1 : kPanelsTogether) * kWidth;
  for (int64_t c = share.first_col; c < share.last_col; c += together, out += together * units) {
    if (b.step == 1)
      pack_along<T, kWidth>(b, c, from, to, out);
    else
      pack_across<T, kWidth>(b, c, least(c + together, share.last_col), from, to, out,
                             kWidth * units);
  }
}

// Some rows of a share for depths [from, to): packs their part of a, then goes over b's panels.
template <class T, bool kRowMajor, bool kAdd>
void block(const Product& p, const Share& share, int64_t from, int64_t to, const unit_t<T>* b,
           const Ahead& ahead) {
  using A = acc_t<T>;
  using U = unit_t<T>;
  using K = Kind<T>;
  constexpr int64_t kHeight = kTileRows<A>;
  const Source<T> a{static_cast<const T*>(p.a), p.a_row, p.a_col, p.rows};
  const int64_t units = ceil_div(to - from, K::kElements);
  const int64_t a_row = ceil_div(units, kLanes<U>) * kLanes<U>;
  const int64_t stride = kHeight * a_row + kLanes<U>;  // from panel to panel
  // Whether rows are Units as they lie, but for the last.
  const bool there = kRowMajor && sizeof(U) == K::kElements * sizeof(T) &&
                     (a.lane % K::kElements | (to - from) % K::kElements) == 0;
  const Scratch<U> packed((there ? 1 : kRows<A> / kHeight) * stride);
  struct {
    const U* data;
    int64_t row;
  } panels[kRows<A> / kHeight];
  if constexpr (!kRowMajor)
    pack_across<T, kHeight>(a, share.first_row, share.last_row, from, to, packed.data(), stride);
  for (int64_t r = share.first_row; r < share.last_row; r += kHeight) {
    auto& panel = panels[(r - share.first_row) / kHeight];
    U* out = packed.data() + (there ? 0 : (r - share.first_row) / kHeight * stride);
    panel = {out, a_row};
    if (there && r + kHeight <= p.rows)
      panel = {reinterpret_cast<const U*>(a.data + r * a.lane + from), a.lane / K::kElements};
    else if (kRowMajor)
      pack_rows<T>(a, r, from, to, out, a_row);
  }
  const int64_t tiles = ceil_div(share.last_col - share.first_col, kTileCols<T>) *
                        ceil_div(share.last_row - share.first_row, kHeight);
  int64_t done = 0;
  for (int64_t c = share.first_col; c < share.last_col; c += kTileCols<T>)
    for (int64_t r = share.first_row; r < share.last_row; r += kHeight) {
      const auto& panel = panels[(r - share.first_row) / kHeight];
      ahead.part(done++, tiles).ask();
      tile<T, kRowMajor, kAdd>(units, panel.data, panel.row, b + (c - share.first_col) * units,
                               static_cast<A*>(p.out) + r * p.out_row + c, p.out_row, p.rows - r,
                               p.cols - c);
    }
}

template <class T> void round(const Product& p, const Share& share) {
  using A = acc_t<T>;
  for (int64_t r = share.first_row; r < share.last_row; ++r) {
    const A* sums = static_cast<const A*>(p.out) + r * p.out_row + share.first_col;
    T* out = static_cast<T*>(p.rounded) + r * p.rounded_row + share.first_col;
    sweep<A>(share.last_col - share.first_col,
             [&](int64_t c, auto span)
                 __attribute__((always_inline)) { store(out + c, load(sums + c, span), span); });
  }
}

template <class T> void run(const Product& p, int64_t threads) {
  using U = unit_t<T>;
  constexpr int64_t kElements = Kind<T>::kElements, kLeastUnits = 64;
  constexpr int64_t kHeight = kTileRows<acc_t<T>>, kWidth = kTileCols<T>;
  if (p.rows * p.cols * p.depth < kWorthATeam) threads = 1;
  const Grid grid = grid_of<T>(p, threads);
  const int64_t panels = ceil_div(p.cols, kWidth), depth = ceil_div(p.depth, kElements);
  // By the columns of all: the threads do not change the order of additions.
  const int64_t allowed = most(kLeastUnits, least(kPanelUnits<T> / (panels * kWidth), kMostUnits));
  const int64_t units = ceil_div(depth, most(1, ceil_div(depth, allowed)));  // of equal slabs
  const int64_t slabs = units ? ceil_div(depth, units) : 1;
  // As much for every product: the pool keeps a block of each size.
  const int64_t each = most(ceil_div(panels, grid.across) * kWidth * units, kPanelUnits<T> / 2);
  const Scratch<U> packed(threads * each);
  const int64_t tiles = ceil_div(ceil_div(p.rows, kHeight), grid.down);
  const int64_t blocks = ceil_div(tiles * kHeight, kRows<acc_t<T>>);  // of a share, about equal
  const Ahead ahead{static_cast<const char*>(p.ahead), p.ahead_bytes};
  for (int64_t slab = 0; slab < slabs; ++slab) {
    const int64_t from = slab * units * kElements, to = least(from + units * kElements, p.depth);
    const bool row_major = p.a_col == 1, add = p.add || slab > 0;
    const auto multiply = row_major ? add ? block<T, true, true> : block<T, true, false>
                          : add ? block<T, false, true>
                                    : block<T, false, false>;
    parallel_for(threads, each * int64_t(sizeof(U)), threads, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        pack<T>(p, share_of<T>(p, grid, i), from, to, packed.data() + i * each);
    });
    parallel_shares(blocks, threads, [&](int64_t owner, int64_t i) {
      Share share = share_of<T>(p, grid, owner);
      const int64_t first = share.first_row, tiles = ceil_div(share.last_row - first, kHeight);
      share.first_row = first + tiles * i / blocks * kHeight;
      share.last_row = least(share.last_row, first + tiles * (i + 1) / blocks * kHeight);
      multiply(p, share, from, to, packed.data() + owner * each,
               ahead.part(slab * blocks + i, slabs * blocks));
      if (p.rounded && to == p.depth) round<T>(p, share);
    });
  }
}

}  // namespace

void launch(const Product& p, int64_t threads) {
  if (p.rows == 0 || p.cols == 0) return;
  for_dtype(p.dtype, false, [&](auto element, auto) { run<decltype(element)>(p, threads); });
}

}  // namespace fastlm::cpu::FASTLM_ISA
