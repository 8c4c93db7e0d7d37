// Atomic updates. Blocks may run in several OS threads, so these are atomic on the host too.
#pragma once
#include "arithmetic.h"
#include "memory.h"

namespace emulator {

// Replaces *p by update(*p) and returns what was there.
template <class T, class Update> inline T atomic_update(char* p, Update update) {
  T* at = reinterpret_cast<T*>(p);
  T before, after;
  __atomic_load(at, &before, __ATOMIC_RELAXED);
  do {
    after = update(before);
  } while (
      !__atomic_compare_exchange(at, &before, &after, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
  return before;
}

}  // namespace emulator
