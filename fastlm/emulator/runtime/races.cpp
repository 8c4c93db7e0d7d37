// Data races: each access against the ones that its bytes remember.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "observer.h"

namespace emulator {
namespace {

constexpr uint64_t kPageBytes = 4096;

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

std::string text_of(const Record& before, const Record& now, uint64_t address, Space space,
                    const BlockState& block) {
  std::string text = "data race on " + std::string(space == kShared ? "shared" : "global") +
                     " memory: " + describe(now, now.block, block) + " and an earlier " +
                     describe(before, now.block, block) + ", with nothing that orders them";
  if (space == kShared) text += " (shared offset " + std::to_string(address) + ")";
  return text;
}

uint16_t value_at(const ThreadState& t, Space space, uint64_t address) {
  uint16_t value;
  const char* at = space == kShared ? t.block->shared + address : reinterpret_cast<char*>(address);
  __builtin_memcpy(&value, at, sizeof value);
  return value;
}

// The thread of an access of t's block; t, where a warpgroup's product made it.
ThreadState& thread_of(ThreadState& t, const Record& record) {
  return record.thread < t.home->thread_count ? t.home->threads[record.thread] : t;
}

}  // namespace

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
    check_cell(t, trace, cell_at(trace, space, g), now, g * kGranuleBytes, space);
  }
}

void Observer::check_cell(ThreadState& t, BlockTrace& trace, Cell& cell, const Record& now,
                          uint64_t address, Space space) {
  const auto ordered = [&](const Record& before) {
    return before.epoch == 0 || t.clock.knows(before.block, before.thread, before.epoch, now.block);
  };
  const auto check = [&](const Record& before) {
    if (!(before.bytes & now.bytes) || may_meet(before, now) || ordered(before)) return;
    const bool stores =
        (before.access & now.access & kWrite) && !((before.access | now.access) & kRead);
    const Found race{before, now, address, space};
    if (stores && before.site == now.site)
      repeated_.push_back({race, value_at(t, space, address)});
    else
      report(t, trace, race);
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
  if (repeated_.empty()) return;
  std::vector<Repeated> stores;
  stores.swap(repeated_);
  for (const Repeated& store : stores)
    if (value_at(t, store.race.space, store.race.address) != store.value)
      report(t, blocks_[t.home->number], store.race);
    else
      note(t, store.race, Quiet::kSameValue);
}

bool Observer::is_suppressed(uint32_t site) const {
  return site < request_.lines && request_.suppressed[site];
}

void Observer::report(ThreadState& t, BlockTrace& trace, const Found& race) {
  if (is_suppressed(race.before.site) || is_suppressed(race.now.site))
    note(t, race, Quiet::kSuppressed);
  else if (!suspect(*t.home, trace, race))
    raise(t, race);
}

void Observer::raise(ThreadState& t, const Found& race) {
  if (request_.all_races) return note(t, race, Quiet::kLoud);
  record_failure(thread_of(t, race.now), race.now.site, race.before.site,
                 text_of(race.before, race.now, race.address, race.space, *t.home));
  leave(t);
}

void Observer::note(ThreadState& t, const Found& race, Quiet quiet) {
  const auto [first, last] = std::minmax(race.before.site, race.now.site);
  Race& known = races_[{first, last, static_cast<uint32_t>(quiet)}];
  // The next two bytes of the same two accesses.
  const bool again = race.before.thread == noted_.before.thread &&
                     race.before.epoch == noted_.before.epoch &&
                     race.now.thread == noted_.now.thread && race.now.site == noted_.now.site &&
                     race.address == noted_.address + kGranuleBytes;
  noted_ = race;
  if (again && known.count) return;
  if (++known.count > 1) return;
  std::snprintf(known.text, sizeof known.text, "%s",
                text_of(race.before, race.now, race.address, race.space, *t.home).c_str());
  known.site = race.now.site, known.other_site = race.before.site;
  known.quiet = static_cast<uint32_t>(quiet);
  std::memcpy(known.ctaid, t.home->ctaid, sizeof known.ctaid);
  std::memcpy(known.tid, thread_of(t, race.now).tid, sizeof known.tid);
}

// Puts a race aside as long as nothing depends on what its reader has read; false if something
// does.
bool Observer::suspect(BlockState& block, BlockTrace& trace, const Found& race) {
  const Record& read = race.now.access & kWrite ? race.before : race.now;
  if ((read.access & kWrite) || race.before.block != race.now.block || read.site >= request_.lines)
    return false;
  const uint64_t uses = request_.load_uses[read.site];
  if (uses == ~0ull || (block.threads[read.thread].stored & uses)) return false;
  const auto same = [&](const Suspect& known) {
    return known.reader == read.thread && known.race.before.site == race.before.site &&
           known.race.now.site == race.now.site;
  };
  if (std::none_of(trace.suspects.begin(), trace.suspects.end(), same))
    trace.suspects.push_back({race, read.thread, uses});
  block.threads[read.thread].suspected = true;
  return true;
}

void Observer::check_suspects(ThreadState& t, BlockTrace& trace, uint64_t stored) {
  for (Suspect& known : trace.suspects)
    if (known.reader == t.index && (known.uses & stored)) {
      known.uses = 0;
      raise(t, known.race);
    }
}

void Observer::list_races(Result& result) const {
  result.races = static_cast<Race*>(std::malloc(races_.size() * sizeof(Race)));
  for (const auto& [sites, race] : races_) result.races[result.race_count++] = race;
}

}  // namespace emulator
