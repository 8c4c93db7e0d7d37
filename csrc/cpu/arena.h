// Arrays cut out of one piece of memory, whose size is counted by cutting them out of none.
#pragma once

#include "simd.h"

namespace fastlm::cpu::FASTLM_ISA {

// Takes from `spare` what it has room for, the rest from `memory`.
struct Arena {
  char *memory = nullptr, *spare = nullptr;
  int64_t spare_bytes = 0, spare_used = 0, used = 0;

  template <class X> X* take(int64_t count) {
    const int64_t bytes = ceil_div(count * int64_t(sizeof(X)), 64) * 64;
    const bool fits = spare_used + bytes <= spare_bytes;
    int64_t& at = fits ? spare_used : used;
    at += bytes;
    return reinterpret_cast<X*>(uintptr_t(fits ? spare : memory) + uintptr_t(at - bytes));
  }
};

// How much Arrays(owner, arena) takes.
template <class Arrays, class Owner> int64_t bytes_of(const Owner& owner) {
  Arena counted;
  const Arrays arrays(owner, counted);
  return counted.used;
}

}  // namespace fastlm::cpu::FASTLM_ISA
