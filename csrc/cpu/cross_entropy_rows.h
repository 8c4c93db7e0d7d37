// The softmax of linear_cross_entropy: one row of a tile of logits, which a matrix product has just
// made. Forward goes over it twice, for the largest logit and for the exponentials and what is
// kept; backward once.
#pragma once

#include "kept_logits.h"
#include "logits_row.h"

namespace fastlm::cpu::FASTLM_ISA {

template <class T, class A> FASTLM_INLINE Vec<A> rounded_to(Vec<A> v) {
  if constexpr (__is_same(T, bf16))
    return widen(narrow(v));
  else
    return v;
}

// Some classes of all rows.
template <class T> struct ClassTile {
  using A = acc_t<T>;
  int64_t first, classes;
  const T *linear_weight, *linear_bias;  // of the first class on; or null
  const A* weight;                       // or null
  A softcap;                             // 0: none
  KeptLogits kept;                       // of the first rows

  template <bool kPlain = false> FASTLM_INLINE Vec<A> capped(Vec<A> raw) const {
    return !kPlain && softcap > 0 ? softcap * tanh<A>(raw / softcap) : raw;
  }
  template <class Span> FASTLM_INLINE Vec<A> weight_at(int64_t c, Span span) const {
    return weight ? load(weight + c, span) : live<A>(all(A(1)), span);
  }
  // The target's, or -1.
  int64_t column_of(int64_t target) const {
    return target >= first && target < first + classes ? target - first : -1;
  }
};

// 0 for -inf.
template <class A> FASTLM_INLINE Vec<A> finite_size(Vec<A> z) {
  return z == -A(INFINITY) ? Vec<A>{} : max(z, -z);
}

// lse = base + log(total), over the classes that were added so far.
template <class A> struct RunningSums {
  A base, total;
  double weighted;  // sum_c w_c z_c, where it is wanted
};

// Adds the tile to a row's sums, picks the target's logit where the tile has it, and keeps the
// logits of a row that has room. They are in the accumulation type; computed is with their values
// rounded to T. `codes` is KeptRow's. kPlain: without softcap and `weighted`.
template <class T, bool kPlain>
void forward_row(const ClassTile<T>& tile, int64_t r, const acc_t<T>* logits, int64_t target,
                 bool weighted, RunningSums<acc_t<T>>& sums, acc_t<T>& target_logit,
                 uint16_t* codes) {
  using A = acc_t<T>;
  using Kept = KeptRow<T>;
  const int64_t classes = tile.classes;
  const bool kept = r < tile.kept.rows;
  const auto raw = [&](int64_t c, auto span) __attribute__((always_inline)) {
    return rounded_to<T, A>(load(logits + c, span));
  };
  const auto at = [&](int64_t c, auto span) __attribute__((always_inline)) {
    return tile.template capped<kPlain>(raw(c, span));
  };
  // Rounding keeps the order, so the ends may be looked for before it.
  Vec<A> highest = all(-A(INFINITY)), lowest = all(A(INFINITY));
  sweep<A>(classes, [&](int64_t c, auto span) __attribute__((always_inline)) {
    const Vec<A> z = kPlain ? load(logits + c, span) : at(c, span);
    highest = max(highest, tail_is<A>(z, span, -A(INFINITY)));
    lowest = -max(-lowest, tail_is<A>(-z, span, -A(INFINITY)));
  });
  const A top = rounded_to<T, A>(all(largest<A>(highest)))[0];
  const A bottom = rounded_to<T, A>(all(-largest<A>(-lowest)))[0];
  A reach = top > -bottom ? top : -bottom;
  const bool infinite = !kPlain || bottom == -A(INFINITY);
  if (kept && infinite) {
    Vec<A> furthest = {};
    sweep<A>(classes, [&](int64_t c, auto span) __attribute__((always_inline)) {
      furthest = max(furthest, finite_size<A>(Kept::kCapped ? at(c, span) : raw(c, span)));
    });
    reach = largest<A>(furthest);
  }
  const A peak = top > sums.base ? top : sums.base;
  const A relative_to = peak == -A(INFINITY) ? A(0) : peak;  // only -inf so far: exponentials are 0
  Kept row(tile.kept, r, codes);
  if (kept) row.begin(reach, infinite);
  Vec<A> exponentials = {}, distances = {};
  sweep<A>(classes, [&](int64_t c, auto span) __attribute__((always_inline)) {
    const Vec<A> z = at(c, span), distance = live<A>(z - relative_to, span);
    exponentials += live<A>(exp2_bounded(distance * A(kLog2e)), span);
    if (!kPlain && weighted) distances += distance * tile.weight_at(c, span);
    if (kept) row.store(c, Kept::kCapped ? z : raw(c, span), span);
  });
  if (kept) row.end();
  if (sums.base != relative_to) sums.total *= A(::exp(double(sums.base - relative_to)));
  sums.total += sum<A>(exponentials);
  sums.base = peak;
  const int64_t column = tile.column_of(target);
  if (column >= 0) target_logit = at(column, Part{1})[0];
  if (kPlain || !weighted) return;
  Vec<A> weights = {};
  sweep<A>(classes, [&](int64_t c, auto span)
                        __attribute__((always_inline)) { weights += tile.weight_at(c, span); });
  sums.weighted += double(sum<A>(distances)) + double(sum<A>(weights)) * double(relative_to);
}

// What a row's softmax, its smoothing and its target are multiplied by; all 0 where it is ignored.
template <class A> struct RowScales {
  A softmax, smooth, hard;
};

// out (classes) = (exp(z - lse) * softmax - w * smooth - [c = target] * hard) * dz / dlogits, where
// z_at(c, Span) gives the logits after the softcap. kPlain: softcap and smooth are 0.
template <class T, bool kPlain, class Logits>
FASTLM_INLINE void backward_row(const ClassTile<T>& tile, int64_t target, double lse64,
                                const RowScales<acc_t<T>>& scales, T* out, const Logits& z_at) {
  using A = acc_t<T>;
  // In two parts, as differences with large logits need it.
  const A lse = A(lse64), rest = A((lse64 - double(lse)) * kLog2e);
  const auto gradient = [&](int64_t c, auto span, A at_target) __attribute__((always_inline)) {
    const Vec<A> z = z_at(c, span);
    Vec<A> g = exp2_bounded((z - lse) * A(kLog2e) - rest) * scales.softmax - at_target;
    if (!kPlain) g -= tile.weight_at(c, span) * scales.smooth;
    if (!kPlain && tile.softcap > 0) g *= A(1) - (z / tile.softcap) * (z / tile.softcap);
    return g;
  };
  sweep<A>(tile.classes, [&](int64_t c, auto span) __attribute__((always_inline)) {
    store(out + c, gradient(c, span, A(0)), span);
  });
  const int64_t column = tile.column_of(target);
  if (column >= 0) put(out + column, A(gradient(column, Part{1}, scales.hard)[0]));
}

// Of a kept row, or with its `logits` in the accumulation type. `codes` is KeptRow's.
template <class T, bool kPlain>
void backward_row(const ClassTile<T>& tile, int64_t r, const acc_t<T>* logits, int64_t target,
                  double lse, const RowScales<acc_t<T>>& scales, T* out, uint16_t* codes) {
  using A = acc_t<T>;
  using Kept = KeptRow<T>;
  if (scales.softmax == 0 && scales.smooth == 0 && scales.hard == 0) {
    memset(out, 0, size_t(tile.classes) * sizeof(T));
  } else if (r < tile.kept.rows) {
    Kept row(tile.kept, r, codes);
    row.open();
    backward_row<T, kPlain>(tile, target, lse, scales, out,
                            [&](int64_t c, auto span) __attribute__((always_inline)) {
                              const auto z = row.load(c, span);
                              return Kept::kCapped ? z : tile.template capped<kPlain>(z);
                            });
  } else {
    backward_row<T, kPlain>(
        tile, target, lse, scales, out, [&](int64_t c, auto span) __attribute__((always_inline)) {
          return tile.template capped<kPlain>(rounded_to<T, A>(load(logits + c, span)));
        });
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA
