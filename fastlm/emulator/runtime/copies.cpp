// cp.async, and the proxies that TMA and wgmma see memory through.
#include <algorithm>
#include <cstring>

#include "async.h"
#include "memory.h"

namespace emulator {
namespace {

void land(Thread& t, const AsyncCopy& copy) {
  char* destination = t.block->shared + copy.destination;
  std::memcpy(destination, reinterpret_cast<const char*>(copy.source), copy.source_bytes);
  std::memset(destination + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
}

}  // namespace

void copy_async(Thread& t, uint32_t site, uint64_t destination, uint64_t source, uint32_t bytes,
                uint32_t source_bytes) {
  if (source_bytes > bytes)
    fail(t, site, "cp.async: %u source bytes for a copy of %u", source_bytes, bytes);
  if (destination % bytes || source % bytes)
    fail(t, site, "cp.async: both addresses must be multiples of %u", bytes);
  if (destination + bytes > t.block->shared_bytes)
    fail_bounds(t, site, kShared, destination, bytes, kWrite);
  if (source_bytes) {
    uint8_t hint = 0;
    search_ranges(t, site, source, source_bytes, kRead, hint);
    observe(t, site, kGlobal, source, source_bytes, kRead);
  }
  // A reader of the old data races with this write as soon as it is issued.
  observe(t, site, kShared, destination, bytes, kWrite | kInFlight);
  const AsyncCopy copy{uint32_t(destination), bytes, source_bytes, site, source};
  if (request_of(t).late_copies)
    std::memset(t.block->shared + destination, 0xff, bytes);
  else
    land(t, copy);
  if (block_of(t).launch->kernel.async_proxy) mark_generic_write(t, copy.destination, bytes);
  state(t).copies.push_back(copy);
}

void commit_copies(Thread& t) {
  state(t).copy_groups.push_back(static_cast<uint32_t>(state(t).copies.size()));
}

void wait_copies(Thread& t, uint32_t groups_left) {
  auto& copies = state(t).copies;
  auto& groups = state(t).copy_groups;
  if (groups.size() <= groups_left) return;
  const size_t finished = groups.size() - groups_left;
  const uint32_t end = groups[finished - 1];
  for (uint32_t i = 0; i < end; ++i) {
    // A reader that did not wait for this thread's wait_group races with this write.
    observe(t, copies[i].site, kShared, copies[i].destination, copies[i].bytes, kWrite);
    observe_landing(t, copies[i].destination, copies[i].bytes);
    if (request_of(t).late_copies) land(t, copies[i]);
  }
  copies.erase(copies.begin(), copies.begin() + end);
  groups.erase(groups.begin(), groups.begin() + static_cast<ptrdiff_t>(finished));
  for (uint32_t& group : groups) group -= end;
}

void finish_copies(ThreadState& t) {
  if (!t.copies.empty())
    fail(t, t.copies.front().site, "thread exits with %zu cp.async not waited for",
         t.copies.size());
  const AsyncEngine& engine = *t.home->engine;
  for (const BulkCopy& store : engine.stores)
    if (store.issuer == t.index)
      fail(t, store.site,
           "thread exits before its bulk store has read shared memory: "
           "cp.async.bulk.wait_group is missing");
  if (t.home->alive == 1 && !engine.loads.empty())
    fail(t, engine.loads.front().site,
         "block exits while a bulk load is in flight: nobody waits "
         "on its mbarrier");
  if (!engine.warpgroups[t.index / 128].pending.empty())
    fail(t, engine.warpgroups[t.index / 128].pending.front().site,
         "thread exits with wgmma not waited for: wgmma.wait_group is missing");
}

void mark_generic_write(Thread& t, uint32_t offset, uint32_t bytes) {
  BlockState& block = block_of(t);
  if (block.generic_writer.empty()) block.generic_writer.resize(block.shared_bytes);
  for (uint32_t i = 0; i < bytes; ++i)
    block.generic_writer[offset + i] = static_cast<uint16_t>(t.index + 1);
  state(t).unfenced.push_back({offset, bytes});
}

void clear_generic_writes(BlockState& block, uint32_t offset, uint32_t bytes) {
  if (block.generic_writer.empty()) return;
  std::fill_n(block.generic_writer.begin() + offset, bytes, uint16_t(0));
}

// After a barrier any thread's fence covers these writes; before it, only the writer's own does.
void publish_writes(ThreadState& t) {
  auto& published = t.home->published;
  published.insert(published.end(), t.unfenced.begin(), t.unfenced.end());
  t.unfenced.clear();
}

void proxy_fence(Thread& t) {
  publish_writes(state(t));
  BlockState& block = block_of(t);
  for (const auto& [offset, bytes] : block.published) clear_generic_writes(block, offset, bytes);
  block.published.clear();
}

void check_proxy(Thread& t, uint32_t site, uint32_t offset, uint32_t bytes, const char* reader) {
  const auto& writer = block_of(t).generic_writer;
  if (writer.empty() || !request_of(t).check_proxies) return;
  for (uint32_t i = offset; i < offset + bytes; ++i)
    if (writer[i])
      fail(t, site,
           "%s reads shared memory (offset %u) that thread %u of the block wrote with an "
           "ordinary store and no fence.proxy.async",
           reader, i, writer[i] - 1u);
}

}  // namespace emulator
