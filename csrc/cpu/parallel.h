// Threads: OpenMP with the count that the caller asked for (torch.get_num_threads(), passed in from
// Python).
#pragma once

#include <omp.h>

#include <cstdint>

#include "scratch.h"

namespace fastlm::cpu::FASTLM_ISA {

// body(first, last) over [0, n) in as many pieces as threads. Small work stays on the calling
// thread: waking a team costs some 5 us, which is what a core needs for about 64 KiB of traffic.
template <class Body>
void parallel_for(int64_t n, int64_t bytes_each, int64_t threads, const Body& body) {
  constexpr int64_t kWorthATeamBytes = 1 << 17;
  if (threads > n) threads = n;
  if (threads <= 1 || n * bytes_each < kWorthATeamBytes) return body(int64_t(0), n);
#pragma omp parallel num_threads(int(threads))
  {
    const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    body(n * me / team, n * (me + 1) / team);
  }
}

constexpr int64_t kWorthATeam = 1 << 18;  // in multiplications

// body(i) for i in [0, n), handed out one by one: for items of unequal cost.
template <class Body>
void parallel_items(int64_t n, int64_t multiplications_each, int64_t threads, const Body& body) {
  if (threads > n) threads = n;
  if (threads <= 1 || n * multiplications_each < kWorthATeam) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
#pragma omp parallel for schedule(dynamic) num_threads(int(threads))
  for (int64_t i = 0; i < n; ++i) body(i);
}

// body(owner, i) for i in [0, each) of every owner, of whom there are as many as threads: a thread
// takes those of its own number, whose data its core has, then what others have not begun, but the
// last: fetching its data takes as long.
template <class Body> void parallel_shares(int64_t each, int64_t threads, const Body& body) {
  if (threads <= 1) {
    for (int64_t i = 0; i < each; ++i) body(int64_t(0), i);
    return;
  }
  struct alignas(64) Queue {  // a cache line of its own
    int64_t next;
  };
  const Scratch<Queue> queues(threads);
  for (int64_t owner = 0; owner < threads; ++owner) queues.data()[owner].next = 0;
#pragma omp parallel num_threads(int(threads))
  for (int64_t k = 0; k < threads; ++k) {
    const int64_t owner = (omp_get_thread_num() + k) % threads;
    const bool leaves_one = k > 0 && owner < omp_get_num_threads();  // a team may be smaller
    int64_t* next = &queues.data()[owner].next;
    while (each - __atomic_load_n(next, __ATOMIC_RELAXED) > int(leaves_one)) {
      const int64_t i = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
      if (i < each) body(owner, i);
    }
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA
