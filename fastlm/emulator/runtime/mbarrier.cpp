// mbarrier objects, in the emulator's own layout of their eight bytes.
#include <cstring>

#include "async.h"
#include "memory.h"
#include "observer.h"
#include "warp.h"

namespace emulator {
namespace {

struct Mbarrier {
  uint64_t phase : 1, pending : 20, count : 20;
  int64_t bytes : 23;  // tx-count: expected and not yet arrived
};
static_assert(sizeof(Mbarrier) == 8);

Mbarrier load(Thread& t, uint32_t site, uint64_t address) {
  // Checked against the mbarrier.init, which other threads must see before they use the object.
  const char* at = shared_at<8, 0>(t, address, site);
  observe(t, site, kShared, address, 8, kRead | kStrong | kBlockScope | kUnrecorded);
  return peek<Mbarrier>(at);
}
void store(Thread& t, uint64_t address, const Mbarrier& barrier) {
  std::memcpy(t.block->shared + address, &barrier, sizeof barrier);
}

void release(Thread& t, uint64_t address) {
  BlockState& block = block_of(t);
  if (Observer* observer = block.launch->observer.get())
    observer->release(state(t), block.engine->clocks[uint32_t(address)].arriving);
}

void complete_phase(Thread& t, uint64_t address, Mbarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.count;
  progress(t);
  MbarrierClocks& clocks = block_of(t).engine->clocks[uint32_t(address)];
  clocks.completed = std::move(clocks.arriving);
  clocks.arriving = Clock{};
}

}  // namespace

void mbarrier_init(Thread& t, uint32_t site, uint64_t address, uint32_t count) {
  if (count == 0) fail(t, site, "mbarrier.init: the count must be at least 1");
  shared_at<8, 0>(t, address, site);
  observe(t, site, kShared, address, 8, kWrite);
  Mbarrier barrier{};
  barrier.pending = barrier.count = count;
  store(t, address, barrier);
  block_of(t).engine->clocks[uint32_t(address)] = MbarrierClocks{};
}

void mbarrier_invalidate(Thread& t, uint32_t site, uint64_t address) {
  shared_at<8, 0>(t, address, site);
  std::memset(t.block->shared + address, 0xff, 8);
}

uint64_t mbarrier_arrive(Thread& t, uint32_t site, uint64_t address, uint32_t count, uint32_t bytes,
                         bool drop) {
  Mbarrier barrier = load(t, site, address);
  if (barrier.pending < count)
    fail(t, site, "mbarrier: more arrivals than the %u it was initialised for, or not initialised",
         unsigned(barrier.count));
  release(t, address);
  const uint64_t token = barrier.phase;
  barrier.bytes += bytes;
  barrier.pending -= count;
  if (drop) barrier.count -= count;
  complete_phase(t, address, barrier);
  store(t, address, barrier);
  return token;
}

void mbarrier_expect(Thread& t, uint32_t site, uint64_t address, uint32_t bytes) {
  Mbarrier barrier = load(t, site, address);
  barrier.bytes += bytes;
  store(t, address, barrier);
}

void mbarrier_complete(Thread& t, uint32_t site, uint64_t address, uint32_t bytes) {
  release(t, address);
  mbarrier_landed(t, site, address, bytes);
}

void mbarrier_issued(Thread& t, uint64_t address) { release(t, address); }

void mbarrier_landed(Thread& t, uint32_t site, uint64_t address, uint32_t bytes) {
  Mbarrier barrier = load(t, site, address);
  barrier.bytes -= bytes;
  complete_phase(t, address, barrier);
  store(t, address, barrier);
}

bool mbarrier_test(Thread& t, uint32_t site, uint64_t address, uint32_t parity) {
  const auto passed = [&] { return load(t, site, address).phase != (parity & 1); };
  if (!passed()) {
    land_loads(t, uint32_t(address));
    if (!passed()) spin(t, site);
    if (!passed()) return false;
  }
  BlockState& block = block_of(t);
  if (block.launch->observer)
    state(t).clock.join(block.engine->clocks[uint32_t(address)].completed);
  return true;
}

void mbarrier_arrive_after_copies(Thread& t, uint32_t site, uint64_t address, bool counted) {
  commit_copies(t);
  wait_copies(t, 0);
  if (counted) mbarrier_arrive(t, site, address, 1, 0, false);
}

}  // namespace emulator
