#include "counters.h"

#include <algorithm>
#include <set>

#include "observer.h"

namespace emulator {
namespace {

constexpr uint32_t kSectorBytes = 32, kBankBytes = 4, kBanks = 32;

// Distinct 32-byte sectors that the lanes' accesses touch.
uint64_t sectors(const std::vector<uint64_t>& addresses, uint32_t bytes) {
  std::set<uint64_t> touched;
  for (const uint64_t address : addresses)
    for (uint64_t s = address / kSectorBytes; s <= (address + bytes - 1) / kSectorBytes; ++s)
      touched.insert(s);
  return touched.size();
}

// A wavefront serves 128 bytes: a warp's 8-byte accesses go in halves, 16-byte ones in quarters.
// Within such a group the busiest bank decides; lanes that read the same word share it.
uint64_t wavefronts(const std::vector<uint64_t>& addresses, uint32_t bytes) {
  const size_t group = std::max<size_t>(1, kBanks * kBankBytes / std::max(bytes, kBankBytes));
  uint64_t total = 0;
  for (size_t begin = 0; begin < addresses.size(); begin += group) {
    std::set<uint64_t> words[kBanks];
    for (size_t i = begin; i < std::min(begin + group, addresses.size()); ++i)
      for (uint64_t w = addresses[i] / kBankBytes; w <= (addresses[i] + bytes - 1) / kBankBytes;
           ++w)
        words[w % kBanks].insert(w);
    size_t busiest = 0;
    for (const auto& bank : words) busiest = std::max(busiest, bank.size());
    total += busiest;
  }
  return total;
}

uint64_t divide_up(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

}  // namespace

void Observer::count(ThreadState& t, BlockTrace& trace, uint32_t site, Space space,
                     uint64_t address, uint32_t bytes, uint32_t access) {
  static constexpr Counter kReads[] = {kGlobalRead, kSharedRead, kLocalRead};
  static constexpr Counter kWrites[] = {kGlobalWritten, kSharedWritten, kLocalWritten};
  if (access & kRead) t.counts[kReads[space]] += bytes;
  if (access & kWrite) t.counts[kWrites[space]] += bytes;
  if (space == kLocal) return;
  Requests& requests = trace.requests[uint64_t(t.warp->index) << 32 | site];
  requests.bytes = bytes, requests.access = access, requests.space = space;
  requests.lanes[t.lane].push_back(address);
}

void Observer::count_requests(const Requests& requests, uint64_t* counters) {
  size_t executions = 0;
  for (const auto& lane : requests.lanes) executions = std::max(executions, lane.size());
  const bool matrix = requests.access & kMatrix, shared = requests.space == kShared;
  for (size_t i = 0; i < executions; ++i) {
    std::vector<uint64_t> addresses;
    for (const auto& lane : requests.lanes)
      if (i < lane.size()) addresses.push_back(lane[i]);
    const uint64_t bytes = addresses.size() * requests.bytes;
    const Counter first = matrix ? kMatrixRequests : shared ? kSharedRequests : kGlobalRequests;
    counters[first] += 1;
    counters[first + 1] +=
        shared ? wavefronts(addresses, requests.bytes) : sectors(addresses, requests.bytes);
    counters[first + 2] += divide_up(bytes, shared ? kBanks * kBankBytes : kSectorBytes);
  }
}

void Observer::finish_block(BlockState& block) {
  const BlockTrace& trace = blocks_[block.number];
  for (const auto& [key, requests] : trace.requests)
    count_requests(requests, block.launch->result.counters);
  for (const Suspect& known : trace.suspects)
    if (known.uses) note(block.threads[known.race.now.thread], known.race, Quiet::kUnused);
  blocks_.erase(block.number);
}

}  // namespace emulator
