// The softmax of linear_cross_entropy, over tiles of classes.
//
// A tile was just written by a matrix product and is read by the next, so it is in the caches, and
// a row of it in L1: forward goes over it twice, for the largest logit and for the exponentials and
// what is kept; backward once. Each thread takes some of the rows.
#include "../cross_entropy_tile.h"

#include "for_dtype.h"
#include "kept_logits.h"
#include "logits_row.h"
#include "parallel.h"
#include "scratch.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

template <class T, class A> FASTLM_INLINE Vec<A> rounded_to(Vec<A> v) {
  if constexpr (__is_same(T, bf16))
    return widen(narrow(v));
  else
    return v;
}

template <class T> struct Tile {
  using A = acc_t<T>;
  const A* weight;  // or null
  A softcap;        // 0: none

  explicit Tile(const CrossEntropyTile& p)
      : weight(static_cast<const A*>(p.weight)), softcap(A(p.softcap)) {}
  FASTLM_INLINE Vec<A> capped(Vec<A> raw) const {
    return softcap > 0 ? softcap * tanh<A>(raw / softcap) : raw;
  }
  template <class Span> FASTLM_INLINE Vec<A> weight_at(int64_t c, Span span) const {
    return weight ? load(weight + c, span) : live<A>(all(A(1)), span);
  }
};

// The target's column in the tile, or -1.
inline int64_t target_column(const CrossEntropyTile& p, int64_t r) {
  const int64_t column = p.target[r] - p.first_class;
  return column >= 0 && column < p.classes ? column : -1;
}

// 0 for -inf.
template <class A> FASTLM_INLINE Vec<A> finite_size(Vec<A> z) {
  return z == -A(INFINITY) ? Vec<A>{} : max(z, -z);
}

// `codes` is KeptRow's.
template <class T> void forward_row(const CrossEntropyTileForward& p, int64_t r, uint16_t* codes) {
  using A = acc_t<T>;
  const int64_t classes = p.tile.classes;
  const bool kept = r < p.tile.kept_rows;
  const Tile<T> tile(p.tile);
  const A* logits = static_cast<const A*>(p.tile.logits) + r * classes;
  const auto raw = [&](int64_t c, auto span) __attribute__((always_inline)) {
    return rounded_to<T, A>(load(logits + c, span));
  };
  const auto at = [&](int64_t c, auto span)
                      __attribute__((always_inline)) { return tile.capped(raw(c, span)); };
  A &base = static_cast<A*>(p.base)[r], &total = static_cast<A*>(p.total)[r];
  Vec<A> highest = all(base), furthest = {};
  sweep<A>(classes, [&](int64_t c, auto span) __attribute__((always_inline)) {
    const Vec<A> z = at(c, span);
    highest = max(highest, tail_is<A>(z, span, -A(INFINITY)));
    furthest = max(furthest, finite_size<A>(KeptRow<T>::kCapped ? z : raw(c, span)));
  });
  const A peak = largest<A>(highest);
  const A relative_to = peak == -A(INFINITY) ? A(0) : peak;  // only -inf so far: exponentials are 0
  KeptRow<T> row(p.tile, r, codes);
  if (kept) row.begin(largest<A>(furthest));
  Vec<A> sums = {}, weighted = {};
  sweep<A>(classes, [&](int64_t c, auto span) __attribute__((always_inline)) {
    const Vec<A> z = at(c, span), distance = live<A>(z - relative_to, span);
    sums += live<A>(exp2_bounded(distance * A(kLog2e)), span);
    if (p.weighted) weighted += distance * tile.weight_at(c, span);
    if (kept) row.store(c, KeptRow<T>::kCapped ? z : raw(c, span), span);
  });
  if (kept) row.end();
  total = total * A(::exp(double(base - relative_to))) + sum<A>(sums);
  base = peak;
  const int64_t target = target_column(p.tile, r);
  if (target >= 0) static_cast<A*>(p.target_logit)[r] = at(target, Part{1})[0];
  if (!p.weighted) return;
  Vec<A> weights = {};
  sweep<A>(classes, [&](int64_t c, auto span)
                        __attribute__((always_inline)) { weights += tile.weight_at(c, span); });
  p.weighted[r] += double(sum<A>(weighted)) + double(sum<A>(weights)) * double(relative_to);
}

// z_at(c, Span) gives the logits after the softcap.
template <class T, class Logits>
FASTLM_INLINE void backward_row(const CrossEntropyTileBackward& p, int64_t r, const Logits& z_at) {
  using A = acc_t<T>;
  const Tile<T> tile(p.tile);
  T* out = static_cast<T*>(p.dlogits) + r * p.tile.classes;
  const A softmax = static_cast<const A*>(p.softmax)[r],
          smooth = static_cast<const A*>(p.smooth)[r], hard = static_cast<const A*>(p.hard)[r];
  if (softmax == 0 && smooth == 0 && hard == 0) {
    memset(out, 0, size_t(p.tile.classes) * sizeof(T));
    return;
  }
  // In two parts, as differences with large logits need it.
  const A lse = A(p.lse[r]), rest = A(p.lse[r] - double(lse));
  const auto gradient = [&](int64_t c, auto span, A at_target) __attribute__((always_inline)) {
    const Vec<A> z = z_at(c, span);
    Vec<A> g = exp2_bounded(((z - lse) - rest) * A(kLog2e)) * softmax -
               tile.weight_at(c, span) * smooth - at_target;
    if (tile.softcap > 0) g *= A(1) - (z / tile.softcap) * (z / tile.softcap);
    return g;
  };
  const int64_t target = target_column(p.tile, r);
  // Before its logit is overwritten.
  const A target_gradient = target < 0 ? A(0) : gradient(target, Part{1}, hard)[0];
  sweep<A>(p.tile.classes, [&](int64_t c, auto span) __attribute__((always_inline)) {
    store(out + c, gradient(c, span, A(0)), span);
  });
  if (target >= 0) put(out + target, target_gradient);
}

template <class T>
void backward_kept_row(const CrossEntropyTileBackward& p, int64_t r, uint16_t* codes) {
  const Tile<T> tile(p.tile);
  KeptRow<T> row(p.tile, r, codes);
  row.open();
  backward_row<T>(p, r, [&](int64_t c, auto span) __attribute__((always_inline)) {
    const auto z = row.load(c, span);
    return KeptRow<T>::kCapped ? z : tile.capped(z);
  });
}

template <class T> void backward_other_row(const CrossEntropyTileBackward& p, int64_t r) {
  using A = acc_t<T>;
  const Tile<T> tile(p.tile);
  const A* logits = static_cast<const A*>(p.tile.logits) + (r - p.tile.kept_rows) * p.tile.classes;
  backward_row<T>(p, r, [&](int64_t c, auto span) __attribute__((always_inline)) {
    return tile.capped(rounded_to<T, A>(load(logits + c, span)));
  });
}

}  // namespace

void launch(const CrossEntropyTileForward& p, int64_t threads) {
  for_dtype(p.tile.dtype, false, [&](auto element, auto) {
    using T = decltype(element);
    parallel_for(p.tile.rows, p.tile.classes * int64_t(sizeof(T)), threads,
                 [&](int64_t first, int64_t last) {
                   const Scratch<uint16_t> codes(p.tile.classes);
                   for (int64_t r = first; r < last; ++r) forward_row<T>(p, r, codes.data());
                 });
  });
}

void launch(const CrossEntropyTileBackward& p, int64_t threads) {
  for_dtype(p.tile.dtype, false, [&](auto element, auto) {
    using T = decltype(element);
    parallel_for(p.tile.rows, p.tile.classes * int64_t(sizeof(T)), threads,
                 [&](int64_t first, int64_t last) {
                   const Scratch<uint16_t> codes(p.tile.classes);
                   for (int64_t r = first; r < last; ++r)
                     if (r < p.tile.kept_rows)
                       backward_kept_row<T>(p, r, codes.data());
                     else
                       backward_other_row<T>(p, r);
                 });
  });
}

}  // namespace fastlm::cpu::FASTLM_ISA
