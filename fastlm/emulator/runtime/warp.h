// Barriers and the collectives of a warp, as kernels call them.
#pragma once
#include "thread.h"

namespace emulator {

// bar.sync id {, count}: count 0 means the whole block. Returns how many threads came with
// `predicate` set, for barrier.red. All lanes of a warp must come from one place if `aligned`.
uint32_t barrier_sync(Thread&, uint32_t site, bool aligned, uint32_t id, uint32_t count,
                      bool predicate = false);
void barrier_arrive(Thread&, uint32_t site, uint32_t id, uint32_t count);
void warp_sync(Thread&, uint32_t site, uint32_t mask);
void spin(Thread&, uint32_t site);
// membar and fence: orders this thread's accesses for threads of the GPU, or of the block only.
void fence(Thread&, bool block_scope);

// mode: 'u'p, 'd'own, 'b'utterfly, 'i'ndex. `valid` is the predicate result.
uint32_t shuffle(Thread&, uint32_t site, char mode, uint32_t value, uint32_t lane, uint32_t clamp,
                 uint32_t mask, bool& valid);
uint32_t ballot(Thread&, uint32_t site, bool predicate, uint32_t mask);
uint32_t match_any(Thread&, uint32_t site, uint64_t value, uint32_t mask);
uint32_t match_all(Thread&, uint32_t site, uint64_t value, uint32_t mask, bool& all);
// operation: '+', '<' (min), '>' (max), '&', '|', '^'
uint32_t reduce(Thread&, uint32_t site, char operation, uint32_t value, uint32_t mask);
int32_t reduce(Thread&, uint32_t site, char operation, int32_t value, uint32_t mask);
bool elect(Thread&, uint32_t site, uint32_t mask, uint32_t& leader);
uint32_t active_mask(Thread&);

}  // namespace emulator
