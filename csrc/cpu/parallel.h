// Work on as many threads as the caller asked for (torch.get_num_threads(), passed in from Python).
#pragma once

#include <cstdint>

#include "scratch.h"
#include "team.h"

namespace fastlm::cpu::FASTLM_ISA {

// body(first, last) over [0, n) in as many pieces as threads. Small work stays on the calling
// thread: waking a team costs some 5 us, which is what a core needs for about 64 KiB of traffic.
template <class Body>
void parallel_for(int64_t n, int64_t bytes_each, int64_t threads, const Body& body) {
  constexpr int64_t kWorthATeamBytes = 1 << 17;
  if (threads > n) threads = n;
  if (threads <= 1 || n * bytes_each < kWorthATeamBytes) return body(int64_t(0), n);
  run_team(threads, [&](int64_t me, int64_t team) { body(n * me / team, n * (me + 1) / team); });
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
  int64_t next = 0;
  run_team(threads, [&](int64_t, int64_t) {
    for (;;) {
      const int64_t i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (i >= n) return;
      body(i);
    }
  });
}

// body(me, team) on each thread of a team, of as many as asked for or fewer.
template <class Body> void parallel_team(int64_t threads, const Body& body) {
  if (threads <= 1) return body(int64_t(0), int64_t(1));
  run_team(threads, body);
}

// Until all of the team are here.
inline void wait_for(int64_t team) {
  if (team > 1) wait_for_team();
}

// Items [0, n) in as many shares as a team has threads. A thread takes those of its own, whose data
// its core has, then what others have not begun, but their last: fetching its data takes as long.
class Shares {
 public:
  explicit Shares(int64_t threads) : queues_(threads) {}
  // By each thread before it waits for the team; nobody may be taking.
  void begin(int64_t n, int64_t me, int64_t team) {
    queues_.data()[me] = {n * me / team, n * (me + 1) / team};
  }
  template <class Body> void take(int64_t me, int64_t team, const Body& body) {
    for (int64_t k = 0; k < team; ++k) {
      Queue& queue = queues_.data()[(me + k) % team];
      while (queue.last - __atomic_load_n(&queue.next, __ATOMIC_RELAXED) > int(k > 0)) {
        const int64_t i = __atomic_fetch_add(&queue.next, 1, __ATOMIC_RELAXED);
        if (i < queue.last) body(i);
      }
    }
  }

 private:
  struct alignas(64) Queue {  // a cache line of its own
    int64_t next, last;
  };
  Scratch<Queue> queues_;
};

}  // namespace fastlm::cpu::FASTLM_ISA
