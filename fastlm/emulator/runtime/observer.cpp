#include "observer.h"

#include <algorithm>
#include <cstdio>

#include "counters.h"

namespace emulator {
namespace {

enum ByteState : uint8_t { kOutside, kUnwritten, kWritten, kCopying };
constexpr uint64_t kPageBytes = 4096, kGranuleBytes = 2;

// Whether the two are made for use by threads that are not ordered. `volatile` orders nothing: a
// volatile write races with a volatile access unless a fence before it makes it a flag.
bool may_meet(const Record& a, const Record& b) {
  const uint32_t both = a.access & b.access, any = a.access | b.access;
  if (!(both & kStrong) || (a.block != b.block && (any & kBlockScope))) return false;
  const auto is_flag = [](const Record& r) {
    return !(r.access & kWrite) || (r.access & kRelease);
  };
  return !(both & kVolatile) || (is_flag(a) && is_flag(b));
}

std::string describe(const Record& record, uint32_t own_block, const BlockState& block) {
  const uint32_t* n = block.ntid;
  char text[128];
  const char* what =
      record.access & kWrite ? (record.access & kRead ? "atomic update" : "write") : "read";
  const uint32_t threads = n[0] * n[1] * n[2];
  if (record.thread >= threads)
    std::snprintf(text, sizeof text, "read by wgmma of threads %u and up",
                  (record.thread - threads) * kWarpgroupThreads);
  else
    std::snprintf(text, sizeof text, "%s by thread (%u, %u, %u)", what, record.thread % n[0],
                  record.thread / n[0] % n[1], record.thread / (n[0] * n[1]));
  std::string result = text;
  if (record.block != own_block) result += " of block number " + std::to_string(record.block);
  return result;
}

uint16_t value_at(const ThreadState& t, Space space, uint64_t address) {
  uint16_t value;
  const char* at = space == kShared ? t.block->shared + address : reinterpret_cast<char*>(address);
  __builtin_memcpy(&value, at, sizeof value);
  return value;
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
    t.flags = 0;
    t.clock.threads.assign(block.thread_count + kWarpgroups, 0);
    t.clock.threads[i] = 1;
  }
}

void Observer::access(ThreadState& t, uint32_t site, Space space, uint64_t address, uint32_t bytes,
                      uint32_t access) {
  settle(t);
  BlockTrace& trace = blocks_[t.home->number];
  if (request_.count) count(t, trace, site, space, address, bytes, access);
  if (space == kLocal) return;
  if (space == kShared) check_initialized(t, trace, site, address, bytes, access);
  if (!request_.detect_races) return;
  const Record now{static_cast<uint32_t>(t.home->number),
                   t.clock.threads[t.index],
                   site,
                   static_cast<uint16_t>(t.index),
                   0,
                   static_cast<uint8_t>(access | (access & kVolatile ? t.flags : 0))};
  check_races(t, trace, now, space, address, bytes);
  if (access & kStrong)
    synchronize(t, trace, space, address, access);
  else if (access & kWrite)
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
    if ((access & kRead) && byte == kCopying)
      fail(t, site,
           "read of shared memory that an asynchronous copy is still to fill: offset %llu, "
           "%u bytes",
           static_cast<unsigned long long>(offset), bytes);
    if (access & kWrite) byte = access & kInFlight ? kCopying : kWritten;
  }
}

Cell& Observer::cell_at(BlockTrace& trace, Space space, uint64_t granule) {
  if (space == kShared) return trace.cells[granule];
  Page& page = pages_[granule * kGranuleBytes / kPageBytes];
  if (page.empty()) page.resize(kPageBytes / kGranuleBytes);
  return page[granule % (kPageBytes / kGranuleBytes)];
}

void Observer::check_races(ThreadState& t, BlockTrace& trace, Record now, Space space,
                           uint64_t address, uint32_t bytes) {
  for (uint64_t g = address / kGranuleBytes; g * kGranuleBytes < address + bytes; ++g) {
    const bool low = g * kGranuleBytes >= address, high = g * kGranuleBytes + 1 < address + bytes;
    now.bytes = static_cast<uint8_t>(low | high << 1);
    check_cell(t, cell_at(trace, space, g), now, g * kGranuleBytes, space);
  }
}

void Observer::check_cell(ThreadState& t, Cell& cell, const Record& now, uint64_t address,
                          Space space) {
  const auto ordered = [&](const Record& before) {
    return before.epoch == 0 || t.clock.knows(before.block, before.thread, before.epoch, now.block);
  };
  const auto check = [&](const Record& before) {
    if (!(before.bytes & now.bytes) || may_meet(before, now) || ordered(before)) return;
    const bool stores =
        (before.access & now.access & kWrite) && !((before.access | now.access) & kRead);
    if (!stores || before.site != now.site) report_race(t, before, now, address, space);
    repeated_.push_back({before, now, address, space, value_at(t, space, address)});
  };
  check(cell.write);
  if (now.access & kWrite) {
    check(cell.reader), check(cell.neighbour), check(cell.stranger);
    if (!(now.access & kUnrecorded)) cell.write = now;
    return;
  }
  if (now.access & kUnrecorded) return;
  if (!ordered(cell.reader)) {
    const bool same_warp =
        cell.reader.block == now.block && cell.reader.thread / 32 == now.thread / 32;
    (same_warp ? cell.neighbour : cell.stranger) = cell.reader;
  }
  cell.reader = now;
}

void Observer::settle(ThreadState& t) {
  for (const Repeated& store : repeated_)
    if (value_at(t, store.space, store.address) != store.value) {
      const Repeated first = store;
      repeated_.clear();
      report_race(t, first.before, first.now, first.address, first.space);
    }
  repeated_.clear();
}

void Observer::report_race(ThreadState& t, const Record& before, const Record& now,
                           uint64_t address, Space space) {
  std::string text = "data race on " + std::string(space == kShared ? "shared" : "global") +
                     " memory: " + describe(now, now.block, *t.home) + " and an earlier " +
                     describe(before, now.block, *t.home) + ", with nothing that orders them";
  if (space == kShared) text += " (shared offset " + std::to_string(address) + ")";
  record_failure(t, now.site, before.site, text);
  leave(t);
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
