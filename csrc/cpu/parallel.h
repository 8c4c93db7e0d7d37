// Threads: OpenMP with the count that the caller asked for (torch.get_num_threads(), passed in from
// Python).
#pragma once

#include <omp.h>

#include <cstdint>

namespace fastlm::cpu::FASTLM_ISA {

// body(first, last) over [0, n) in as many pieces as threads. Small work stays on the calling
// thread: waking a team costs some 5 us, which is what a core needs for about 64 KiB of traffic.
template <class Body>
void parallel_for(int64_t n, int64_t bytes_each, int64_t threads, const Body& body) {
  constexpr int64_t kWorthATeam = 1 << 17;
  if (threads > n) threads = n;
  if (threads <= 1 || n * bytes_each < kWorthATeam) return body(int64_t(0), n);
#pragma omp parallel num_threads(int(threads))
  {
    const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    body(n * me / team, n * (me + 1) / team);
  }
}

// body(i) for i in [0, n), handed out one by one: for items of unequal cost.
template <class Body>
void parallel_items(int64_t n, int64_t multiplications_each, int64_t threads, const Body& body) {
  constexpr int64_t kWorthATeam = 1 << 18;
  if (threads > n) threads = n;
  if (threads <= 1 || n * multiplications_each < kWorthATeam) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
#pragma omp parallel for schedule(dynamic) num_threads(int(threads))
  for (int64_t i = 0; i < n; ++i) body(i);
}

}  // namespace fastlm::cpu::FASTLM_ISA
