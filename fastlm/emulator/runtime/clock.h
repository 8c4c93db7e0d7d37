// Vector clocks: for each thread of the block, the last of its epochs that is known to have passed.
// Knowledge of other blocks is rare (it comes through fences and atomics) and kept aside.
#pragma once
#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

namespace emulator {

struct Clock {
  std::vector<uint32_t> threads;                      // of the own block; empty: nothing known
  std::map<uint64_t, std::vector<uint32_t>> foreign;  // by block number

  static void join_threads(std::vector<uint32_t>& into, const std::vector<uint32_t>& other) {
    if (into.size() < other.size()) into.resize(other.size());
    for (size_t i = 0; i < other.size(); ++i) into[i] = std::max(into[i], other[i]);
  }
  // `other` was made by a thread of block `from`, this one belongs to block `own`.
  void join(const Clock& other, uint64_t from, uint64_t own) {
    if (from == own)
      join_threads(threads, other.threads);
    else
      join_threads(foreign[from], other.threads);
    for (const auto& [block, known] : other.foreign)
      join_threads(block == own ? threads : foreign[block], known);
  }
  void join(const Clock& other) { join(other, 0, 0); }  // both of one block
  bool knows(uint64_t block, uint32_t thread, uint32_t epoch, uint64_t own) const {
    if (block == own) return threads[thread] >= epoch;
    const auto found = foreign.find(block);
    return found != foreign.end() && found->second.size() > thread &&
           found->second[thread] >= epoch;
  }
};

}  // namespace emulator
