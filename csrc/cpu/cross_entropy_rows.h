// The softmax of linear_cross_entropy: one row of a tile of logits, which a matrix product has just
// made. Forward goes over it twice, for the largest logit and for the exponentials; backward goes
// once over the logits, or over the exponentials that forward kept.
#pragma once

#include "kept_exponentials.h"
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
  KeptExponentials kept;                 // of the first rows

  template <bool kPlain = false> FASTLM_INLINE Vec<A> capped(Vec<A> raw) const {
    return !kPlain && softcap > 0 ? softcap * tanh(raw / softcap) : raw;
  }
  // d capped / d raw, given the capped logit.
  template <bool kPlain = false> FASTLM_INLINE Vec<A> slope(Vec<A> z) const {
    return !kPlain && softcap > 0 ? A(1) - (z / softcap) * (z / softcap) : all(A(1));
  }
  template <class Span> FASTLM_INLINE Vec<A> weight_at(int64_t c, Span span) const {
    return weight ? load(weight + c, span) : live<A>(all(A(1)), span);
  }
  // The target's, or -1.
  int64_t column_of(int64_t target) const {
    return target >= first && target < first + classes ? target - first : -1;
  }
};

// lse = base + log(total), over the classes that were added so far.
template <class A> struct RunningSums {
  A base, total;
  double weighted;  // sum_c w_c z_c, where it is wanted
};

// Adds the tile to a row's sums, picks the target's logit where the tile has it, and keeps the
// exponentials of a row that has room, times the softcap's derivative: backward needs no more. The
// logits are in the accumulation type; computed is with their values rounded to T. `codes` is
// KeptRow's. kPlain: without softcap and `weighted`.
template <class T, bool kPlain>
void forward_row(const ClassTile<T>& tile, int64_t r, const acc_t<T>* logits, int64_t target,
                 bool weighted, RunningSums<acc_t<T>>& sums, acc_t<T>& target_logit,
                 uint16_t* codes) {
  using A = acc_t<T>;
  const int64_t classes = tile.classes;
  const bool kept = r < tile.kept.rows;
  const auto at = [&](int64_t c, auto span) __attribute__((always_inline)) {
    return tile.template capped<kPlain>(rounded_to<T, A>(load(logits + c, span)));
  };
  Vec<A> highest = all(-A(INFINITY));
  sweep<A>(classes, [&](int64_t c, auto span) __attribute__((always_inline)) {
    // Rounding keeps the order, so the largest may be looked for before it.
    const Vec<A> z = kPlain ? load(logits + c, span) : at(c, span);
    highest = max(highest, tail_is<A>(z, span, -A(INFINITY)));
  });
  const A top = rounded_to<T, A>(all(largest<A>(highest)))[0];
  const A peak = top > sums.base ? top : sums.base;
  const A relative_to = peak == -A(INFINITY) ? A(0) : peak;  // only -inf so far: exponentials are 0
  KeptRow<T> row(tile.kept, r, codes);
  // What is kept is relative to the whole number above.
  const A shrink = A(::exp(double(relative_to) - ::ceil(double(relative_to))));
  Vec<A> exponentials = {}, distances = {};
  sweep<A>(classes, [&](int64_t c, auto span) __attribute__((always_inline)) {
    const Vec<A> z = at(c, span), distance = live<A>(z - relative_to, span);
    const Vec<A> e = live<A>(exp2_bounded(distance * A(kLog2e)), span);
    exponentials += e;
    if (!kPlain && weighted) distances += distance * tile.weight_at(c, span);
    if (kept) row.store(c, e * shrink * tile.template slope<kPlain>(z), span);
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

// exp(z - lse), with lse in two parts, as differences with large logits need it.
template <class A> struct Probability {
  A lse, rest;
  explicit Probability(double lse64)
      : lse(A(lse64)), rest(A((lse64 - double(A(lse64))) * kLog2e)) {}
  FASTLM_INLINE Vec<A> of(Vec<A> z) const { return exp2_bounded((z - lse) * A(kLog2e) - rest); }
};

// out (classes) = (exp(z - lse) * softmax - w * smooth - [c = target] * hard) * dz / dlogits, of a
// kept row, or with its `logits` in the accumulation type. `codes` is KeptRow's. kPlain: softcap
// and smooth are 0.
template <class T, bool kPlain>
void backward_row(const ClassTile<T>& tile, int64_t r, const acc_t<T>* logits, int64_t target,
                  acc_t<T> target_logit, double lse, const RowScales<acc_t<T>>& scales, T* out,
                  uint16_t* codes) {
  using A = acc_t<T>;
  if (scales.softmax == 0 && scales.smooth == 0 && scales.hard == 0) {
    memset(out, 0, size_t(tile.classes) * sizeof(T));
    return;
  }
  const Probability<A> probability(lse);
  const auto gradient = [&](Vec<A> z, Vec<A> weight, A hard) __attribute__((always_inline)) {
    Vec<A> g = probability.of(z) * scales.softmax - hard;
    if (!kPlain) g -= weight * scales.smooth;
    return g * tile.template slope<kPlain>(z);
  };
  const auto at = [&](int64_t c, auto span) __attribute__((always_inline)) {
    return tile.template capped<kPlain>(rounded_to<T, A>(load(logits + c, span)));
  };
  const bool kept = r < tile.kept.rows;
  if (kept) {
    KeptRow<T> row(tile.kept, r, codes);
    row.open();
    const A base = A(base_of(tile.kept.shifts[r], lse));
    const A softmax = probability.of(all(base))[0] * scales.softmax;
    sweep<A>(tile.classes, [&](int64_t c, auto span) __attribute__((always_inline)) {
      Vec<A> g = row.load(c, span) * softmax;
      // Without the softcap's derivative: with both nothing is kept.
      if (!kPlain && scales.smooth != 0) g -= tile.weight_at(c, span) * scales.smooth;
      store(out + c, g, span);
    });
  } else {
    sweep<A>(tile.classes, [&](int64_t c, auto span) __attribute__((always_inline)) {
      store(out + c, gradient(at(c, span), kPlain ? Vec<A>{} : tile.weight_at(c, span), A(0)),
            span);
    });
  }
  const int64_t column = tile.column_of(target);
  if (column < 0) return;
  const Vec<A> z = kept ? all(target_logit) : at(column, Part{1});
  const Vec<A> weight = kPlain ? Vec<A>{} : tile.weight_at(column, Part{1});
  put(out + column, A(gradient(z, weight, scales.hard)[0]));
}

}  // namespace fastlm::cpu::FASTLM_ISA
