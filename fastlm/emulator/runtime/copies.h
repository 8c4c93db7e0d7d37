// Asynchronous copies as kernels call them: cp.async, mbarrier, TMA.
#pragma once
#include "thread.h"

namespace emulator {

// The proxies: an ordinary store is invisible to TMA and wgmma before a fence.proxy.async.
void proxy_fence(Thread&);

// cp.async: bytes 4, 8 or 16; the part beyond source_bytes is filled with zeros.
void copy_async(Thread&, uint32_t site, uint64_t destination, uint64_t source, uint32_t bytes,
                uint32_t source_bytes);
void commit_copies(Thread&);
void wait_copies(Thread&, uint32_t groups_left);

// mbarrier. An arrival returns the phase it counts for.
void mbarrier_init(Thread&, uint32_t site, uint64_t address, uint32_t count);
void mbarrier_invalidate(Thread&, uint32_t site, uint64_t address);
uint64_t mbarrier_arrive(Thread&, uint32_t site, uint64_t address, uint32_t count, uint32_t bytes,
                         bool drop);
void mbarrier_expect(Thread&, uint32_t site, uint64_t address, uint32_t bytes);
void mbarrier_complete(Thread&, uint32_t site, uint64_t address, uint32_t bytes);
// True when the phase of that parity has completed; false gives the other threads a turn first.
bool mbarrier_test(Thread&, uint32_t site, uint64_t address, uint32_t parity);
// cp.async.mbarrier.arrive: an arrival once this thread's copies so far have landed.
void mbarrier_arrive_after_copies(Thread&, uint32_t site, uint64_t address, bool counted);

// TMA and bulk copies.
void tensor_load(Thread&, uint32_t site, uint64_t shared, uint64_t map, uint32_t rank,
                 const int32_t* coordinates, uint64_t mbarrier);
void tensor_store(Thread&, uint32_t site, uint64_t map, uint32_t rank, const int32_t* coordinates,
                  uint64_t shared);
void bulk_load(Thread&, uint32_t site, uint64_t shared, uint64_t global, uint32_t bytes,
               uint64_t mbarrier);
// `adds`: floats are added to those that are there (cp.reduce.async.bulk.add.f32).
void bulk_store(Thread&, uint32_t site, uint64_t global, uint64_t shared, uint32_t bytes,
                bool adds);
void commit_bulk(Thread&);
void wait_bulk(Thread&, uint32_t groups_left);
// tensormap.replace: `field` as in the ISA; the map may be in shared or in global memory.
void tensor_map_replace(Thread&, uint32_t site, char* map, const char* field, uint32_t ordinal,
                        uint64_t value);
void tensor_map_copy(Thread&, uint32_t site, char* to, const char* from);
}  // namespace emulator
