// A team of threads: OpenMP's. ThreadSanitizer does not see how libgomp's threads wait for one
// another, and would report all that they share; a build for it has threads of its own.
#pragma once

#include <cstdint>

#if defined(__SANITIZE_THREAD__)
#include <pthread.h>

#include <thread>
#include <vector>
#else
#include <omp.h>
#endif

namespace fastlm::cpu::FASTLM_ISA {

#if defined(__SANITIZE_THREAD__)

inline thread_local pthread_barrier_t* barrier_of_team = nullptr;

template <class Body> void run_team(int64_t threads, const Body& body) {
  pthread_barrier_t barrier;
  pthread_barrier_init(&barrier, nullptr, unsigned(threads));
  std::vector<std::thread> others;
  const auto member = [&](int64_t me) {
    barrier_of_team = &barrier;
    body(me, threads);
  };
  for (int64_t me = 1; me < threads; ++me) others.emplace_back(member, me);
  member(0);
  for (std::thread& other : others) other.join();
  pthread_barrier_destroy(&barrier);
}
inline void wait_for_team() { pthread_barrier_wait(barrier_of_team); }

#else

// body(me, team) on each thread of a team, of as many as asked for or fewer.
template <class Body> void run_team(int64_t threads, const Body& body) {
#pragma omp parallel num_threads(int(threads))
  body(int64_t(omp_get_thread_num()), int64_t(omp_get_num_threads()));
}
inline void wait_for_team() {
#pragma omp barrier
}

#endif

}  // namespace fastlm::cpu::FASTLM_ISA
