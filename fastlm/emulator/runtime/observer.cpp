#include "observer.h"

#include <algorithm>

#include "async.h"
#include "counters.h"

namespace emulator {
namespace {

enum ByteState : uint8_t { kOutside, kUnwritten, kWritten, kCopying };

// A copy that is still to fill these bytes, named by where it was started.
[[noreturn]] void fail_in_flight(ThreadState& t, uint32_t site, uint64_t offset, uint32_t bytes) {
  const BlockState& block = *t.home;
  const auto covers = [&](uint64_t begin, uint64_t size) {
    return begin < offset + bytes && offset < begin + size;
  };
  uint32_t copy = 0;
  for (uint32_t i = 0; i < block.thread_count; ++i)
    for (const AsyncCopy& c : block.threads[i].copies)
      if (covers(c.destination, c.bytes)) copy = c.site;
  bool is_bulk = false;
  for (const BulkCopy& c : block.engine->loads)
    if (covers(c.shared, c.bytes)) copy = c.site, is_bulk = true;
  record_failure(t, site, copy,
                 "read of shared memory that an asynchronous copy is still to fill: offset " +
                     std::to_string(offset) + ", " + std::to_string(bytes) + " bytes" +
                     (is_bulk ? ", of a bulk copy" : ""));
  leave(t);
}

[[noreturn]] void fail_unwritten(ThreadState& t, uint32_t site, uint64_t address, uint32_t bytes) {
  if (!request_of(t).ranges)
    fail(t, site, "read of global memory that nobody has written: %u bytes at address 0x%llx",
         bytes, static_cast<unsigned long long>(address));
  uint8_t buffer = 0;
  search_ranges(t, site, address, bytes, kRead, buffer);
  fail(t, site,
       "read of global memory that nobody has written: %u bytes at byte %llu of buffer #%u", bytes,
       static_cast<unsigned long long>(address - t.ranges[buffer].begin), buffer);
}

// What a fence makes of a volatile write: see ThreadState::flags.
uint32_t flag_of(ThreadState& t, uint32_t site, Space space) {
  if (space == kGlobal || (t.flags & kBlockScope)) {
    if (t.flag_site && t.flag_site != site) t.flags = 0;
    t.flag_site = site;
  }
  return t.flags;
}

}  // namespace

void observe(Thread& thread, uint32_t site, Space space, uint64_t address, uint32_t bytes,
             uint32_t access) {
  ThreadState& t = state(thread);
  if (Observer* observer = t.home->launch->observer.get())
    observer->access(t, site, space, address, bytes, access);
}

void observe_landing(Thread& t, uint32_t offset, uint32_t bytes) {
  BlockState& block = block_of(t);
  if (Observer* observer = block.launch->observer.get()) observer->land(block, offset, bytes);
}

void Observer::land(BlockState& block, uint32_t offset, uint32_t bytes) {
  std::fill_n(blocks_[block.number].byte_states.begin() + offset, bytes, kWritten);
}

void Observer::start_block(BlockState& block) {
  BlockTrace& trace = blocks_[block.number];
  const uint32_t bytes = block.shared_bytes;
  trace.byte_states.assign(bytes, kOutside);
  const KernelInfo& kernel = block.launch->kernel;
  const auto declare = [&](uint32_t offset, uint32_t size) {
    std::fill_n(trace.byte_states.begin() + offset, size, kUnwritten);
  };
  for (uint32_t i = 0; i < kernel.variable_count; ++i)
    declare(kernel.variables[i].offset, kernel.variables[i].bytes);
  declare(bytes - block.dynamic_bytes, block.dynamic_bytes);
  if (request_.detect_races) trace.cells.assign(bytes / kGranuleBytes + 1, Cell{});
  for (uint32_t i = 0; i < block.thread_count; ++i) {
    ThreadState& t = block.threads[i];
    t.clock = Clock{};
    t.flags = t.flag_site = 0, t.stored = 0, t.suspected = false;
    t.clock.threads.assign(block.thread_count + kWarpgroups, 0);
    t.clock.threads[i] = 1;
  }
}

void Observer::access(ThreadState& t, uint32_t site, Space space, uint64_t address, uint32_t bytes,
                      uint32_t access) {
  settle(t);
  BlockTrace& trace = blocks_[t.home->number];
  if (request_.count && !(access & kTensorCopy))
    count(t, trace, site, space, address, bytes, access);
  if (space == kLocal) return;
  if (space == kShared) check_initialized(t, trace, site, address, bytes, access);
  if (space == kGlobal) check_shadows(t, site, address, bytes, access);
  if (!request_.detect_races) return;
  const bool may_be_flag = (access & kVolatile) && (access & kWrite);
  const uint32_t flag = may_be_flag ? flag_of(t, site, space) : 0;
  const Record now{static_cast<uint32_t>(t.home->number),
                   t.clock.threads[t.index],
                   site,
                   static_cast<uint16_t>(t.index),
                   0,
                   static_cast<uint8_t>(access | flag)};
  check_races(t, trace, now, space, address, bytes);
  if ((access & kWrite) && site < request_.lines) {
    t.stored |= request_.store_bits[site];
    if (t.suspected) check_suspects(t, trace, request_.store_bits[site]);
  }
  if (access & kStrong)
    synchronize(t, trace, space, address, access);
  else if ((access & kWrite) && (space == kGlobal || (t.flags & kBlockScope)))
    t.flags = 0;
}

void Observer::begin_products(BlockState& block, uint32_t warpgroup) {
  ++blocks_[block.number].products[warpgroup];
}

void Observer::product_read(ThreadState& t, uint32_t site, uint64_t offset, uint32_t bytes) {
  settle(t);
  BlockTrace& trace = blocks_[t.home->number];
  check_initialized(t, trace, site, offset, bytes, kRead);
  if (!request_.detect_races) return;
  const uint32_t warpgroup = t.index / kWarpgroupThreads;
  const uint32_t place = t.home->thread_count + warpgroup;
  const Record now{static_cast<uint32_t>(t.home->number),
                   trace.products[warpgroup],
                   site,
                   static_cast<uint16_t>(place),
                   0,
                   kRead};
  check_races(t, trace, now, kShared, offset, bytes);
}

void Observer::end_products(BlockState& block, uint32_t warpgroup) {
  const uint32_t epoch = blocks_[block.number].products[warpgroup];
  for (uint32_t i = 0; i < kWarpgroupThreads; ++i)
    block.threads[warpgroup * kWarpgroupThreads + i].clock.threads[block.thread_count + warpgroup] =
        epoch;
}

void Observer::check_initialized(ThreadState& t, BlockTrace& trace, uint32_t site, uint64_t offset,
                                 uint32_t bytes, uint32_t access) {
  for (uint64_t at = offset; at < offset + bytes; ++at) {
    uint8_t& byte = trace.byte_states[at];
    if (byte == kOutside) fail_bounds(t, site, kShared, offset, bytes, access);
    if ((access & kRead) && byte == kUnwritten && request_.detect_uninitialized)
      fail(t, site, "read of shared memory that nobody has written: offset %llu, %u bytes",
           static_cast<unsigned long long>(offset), bytes);
    if ((access & kRead) && byte == kCopying) fail_in_flight(t, site, offset, bytes);
    if (access & kWrite) byte = access & kInFlight ? kCopying : kWritten;
  }
}

void Observer::check_shadows(ThreadState& t, uint32_t site, uint64_t address, uint32_t bytes,
                             uint32_t access) {
  for (uint32_t i = 0; i < request_.shadow_count; ++i) {
    const Shadow& shadow = request_.shadows[i];
    const uint64_t begin = std::max(address, shadow.begin);
    const uint64_t end = std::min(address + bytes, shadow.begin + shadow.bytes);
    for (uint64_t at = begin; at < end; ++at) {
      uint8_t& written = shadow.written[at - shadow.begin];
      if ((access & kRead) && !written) fail_unwritten(t, site, address, bytes);
      if (access & kWrite) written = 1;
    }
  }
}

void Observer::release(ThreadState& t, Clock& into) {
  into.join(t.clock);
  ++t.clock.threads[t.index];
}

void Observer::fence(ThreadState& t, bool block_scope) {
  t.clock.fence(t.home->number, block_scope);
  if (!block_scope)
    t.flags = kRelease;
  else if (!t.flags)
    t.flags = kRelease | kBlockScope;
  t.flag_site = 0;
  ++t.clock.threads[t.index];
}

// Strong accesses carry what fences, releases and acquires around them say. What a thread read by a
// relaxed access becomes known to it at its next fence.
void Observer::synchronize(ThreadState& t, BlockTrace& trace, Space space, uint64_t address,
                           uint32_t access) {
  const bool releases = access & kRelease;
  const bool brings = (access & kWrite) && (releases || !t.clock.fenced_in_block.empty());
  if (!brings && !trace.published.count(address) && !published_.count(address)) return;
  const uint64_t own = t.home->number;
  const bool block_scope = (access & kBlockScope) || space == kShared;
  Published of_shared;  // shared memory publishes nothing for the GPU
  Published& wide = space == kGlobal ? published_[address] : of_shared;
  Published& narrow = trace.published[address];
  if (space == kGlobal && narrow.stores != wide.stores) narrow = Published{{}, wide.stores};
  if ((access & kRead) && (access & kAcquire)) {
    t.clock.join(narrow.known, own);
    if (!block_scope) t.clock.join(wide.known, own);
  } else if ((access & kRead) && !(access & kNoResult)) {
    t.clock.found_in_block.join(narrow.known);
    if (!block_scope) t.clock.found.join(wide.known);
  }
  if (!(access & kWrite)) return;
  // An atomic continues what it found, a store replaces it.
  if (!(access & kRead)) {
    wide = Published{{}, wide.stores + 1};
    narrow = Published{{}, wide.stores};
  }
  const Snapshot all = releases ? t.clock.snapshot(own) : Snapshot{};
  narrow.known.join(releases ? all : t.clock.fenced_in_block);
  if (!block_scope) wide.known.join(releases ? all : t.clock.fenced);
  if (releases) ++t.clock.threads[t.index];
}

}  // namespace emulator
