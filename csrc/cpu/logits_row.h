// A row of logits as the losses read it.
#pragma once

#include "elementary.h"

namespace fastlm::cpu::FASTLM_ISA {

// Softcap and weights are each an option of the whole call.
template <class T> struct Row {
  using A = acc_t<T>;
  const T* logits;
  const A* weight;  // or null
  A softcap;        // 0: none

  template <class Span> FASTLM_INLINE Vec<A> at(int64_t c, Span span) const {
    const Vec<A> raw = load(logits + c, span);
    return softcap > 0 ? softcap * tanh(raw / softcap) : raw;
  }
  template <class Span> FASTLM_INLINE Vec<A> weight_at(int64_t c, Span span) const {
    return weight ? load(weight + c, span) : live<A>(all(A(1)), span);
  }
  A one(int64_t c) const { return softcap > 0 ? at(c, Part{1})[0] : A(scalar(logits[c])); }
};

template <class A, class Span> FASTLM_INLINE Vec<A> tail_is(Vec<A> v, Span span, A dead) {
  if constexpr (__is_same(Span, Part))
    return live<A>(v, span, dead);
  else
    return v;
}

}  // namespace fastlm::cpu::FASTLM_ISA
