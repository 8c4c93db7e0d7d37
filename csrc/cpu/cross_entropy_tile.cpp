// The softmax of linear_cross_entropy, over tiles of classes.
//
// A tile was just written by a matrix product and is read by the next, so it is in the caches, and
// a row of it in L1: forward goes over it twice, for the largest logit and for the exponentials;
// backward once, in place. Each thread takes some of the rows.
#include "../cross_entropy_tile.h"

#include "for_dtype.h"
#include "logits_row.h"
#include "parallel.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

template <class T> Row<T> row_of(const CrossEntropyTile& p, int64_t r) {
  return {static_cast<const T*>(p.logits) + r * p.classes, static_cast<const acc_t<T>*>(p.weight),
          acc_t<T>(p.softcap)};
}

// The target's column in the tile, or -1.
inline int64_t target_column(const CrossEntropyTile& p, int64_t r) {
  const int64_t column = p.target[r] - p.first_class;
  return column >= 0 && column < p.classes ? column : -1;
}

template <class T> void forward_row(const CrossEntropyTileForward& p, int64_t r) {
  using A = acc_t<T>;
  const int64_t classes = p.tile.classes;
  const Row<T> row = row_of<T>(p.tile, r);
  A &base = static_cast<A*>(p.base)[r], &total = static_cast<A*>(p.total)[r];
  Vec<A> highest = all(base);
  sweep<A>(classes, [&](int64_t c, auto span) __attribute__((always_inline)) {
    highest = max(highest, tail_is<A>(row.at(c, span), span, -A(INFINITY)));
  });
  const A peak = largest<A>(highest);
  const A relative_to = peak == -A(INFINITY) ? A(0) : peak;  // only -inf so far: exponentials are 0
  Vec<A> sums = {}, weighted = {};
  sweep<A>(classes, [&](int64_t c, auto span) __attribute__((always_inline)) {
    const Vec<A> distance = live<A>(row.at(c, span) - relative_to, span);
    sums += live<A>(exp2_bounded(distance * A(kLog2e)), span);
    if (p.weighted) weighted += distance * row.weight_at(c, span);
  });
  total = total * A(::exp(double(base - relative_to))) + sum<A>(sums);
  base = peak;
  const int64_t target = target_column(p.tile, r);
  if (target >= 0) static_cast<A*>(p.target_logit)[r] = row.one(target);
  if (!p.weighted) return;
  Vec<A> weights = {};
  sweep<A>(classes, [&](int64_t c, auto span)
                        __attribute__((always_inline)) { weights += row.weight_at(c, span); });
  p.weighted[r] += double(sum<A>(weighted)) + double(sum<A>(weights)) * double(relative_to);
}

template <class T> void backward_row(const CrossEntropyTileBackward& p, int64_t r) {
  using A = acc_t<T>;
  const Row<T> row = row_of<T>(p.tile, r);
  T* out = static_cast<T*>(p.tile.logits) + r * p.tile.classes;
  const A softmax = static_cast<const A*>(p.softmax)[r],
          smooth = static_cast<const A*>(p.smooth)[r], hard = static_cast<const A*>(p.hard)[r];
  if (softmax == 0 && smooth == 0 && hard == 0) {
    memset(out, 0, size_t(p.tile.classes) * sizeof(T));
    return;
  }
  // In two parts, as differences with large logits need it.
  const A lse = A(p.lse[r]), rest = A(p.lse[r] - double(lse));
  const auto gradient = [&](int64_t c, auto span, A at_target) __attribute__((always_inline)) {
    const Vec<A> z = row.at(c, span);
    Vec<A> g = exp2_bounded(((z - lse) - rest) * A(kLog2e)) * softmax -
               row.weight_at(c, span) * smooth - at_target;
    if (row.softcap > 0) g *= A(1) - (z / row.softcap) * (z / row.softcap);
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

}  // namespace

void launch(const CrossEntropyTileForward& p, int64_t threads) {
  for_dtype(p.tile.dtype, false, [&](auto element, auto) {
    using T = decltype(element);
    parallel_for(p.tile.rows, p.tile.classes * int64_t(sizeof(T)), threads,
                 [&](int64_t first, int64_t last) {
                   for (int64_t r = first; r < last; ++r) forward_row<T>(p, r);
                 });
  });
}

void launch(const CrossEntropyTileBackward& p, int64_t threads) {
  for_dtype(p.tile.dtype, false, [&](auto element, auto) {
    using T = decltype(element);
    parallel_for(p.tile.rows, p.tile.classes * int64_t(sizeof(T)), threads,
                 [&](int64_t first, int64_t last) {
                   for (int64_t r = first; r < last; ++r) backward_row<T>(p, r);
                 });
  });
}

}  // namespace fastlm::cpu::FASTLM_ISA
