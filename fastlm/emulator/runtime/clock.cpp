#include "clock.h"

#include <algorithm>

namespace emulator {
namespace {

void join_epochs(Epochs& into, const Epochs& other) {
  if (into.size() < other.size()) into.resize(other.size());
  for (size_t i = 0; i < other.size(); ++i) into[i] = std::max(into[i], other[i]);
}

bool covers(const Epochs& a, const Epochs& b) {
  for (size_t i = 0; i < b.size(); ++i)
    if (i < a.size() ? a[i] < b[i] : b[i] != 0) return false;
  return true;
}

// The one that covers the other, or a new one that covers both.
std::shared_ptr<const Epochs> joined(const std::shared_ptr<const Epochs>& a,
                                     const std::shared_ptr<const Epochs>& b) {
  if (a == b || covers(*a, *b)) return a;
  if (covers(*b, *a)) return b;
  auto both = std::make_shared<Epochs>(*a);
  join_epochs(*both, *b);
  return both;
}

}  // namespace

Snapshot::Joins& Snapshot::joins() {
  static thread_local Joins places;
  return places;
}

void Snapshot::forget_joins() { joins().fill(Joined{}); }

void Snapshot::join(const Snapshot& other) {
  if (!other.blocks_ || blocks_ == other.blocks_) return;
  if (!blocks_) {
    blocks_ = other.blocks_;
    return;
  }
  constexpr size_t kAlignment = 16;  // of what malloc returns
  const auto mine = reinterpret_cast<size_t>(blocks_.get()) / kAlignment;
  const auto theirs = reinterpret_cast<size_t>(other.blocks_.get()) / kAlignment;
  Joined& joined = joins()[(mine ^ 3 * theirs) % joins().size()];
  if (joined.first != blocks_ || joined.second != other.blocks_)
    joined = {blocks_, other.blocks_, join(blocks_, other.blocks_)};
  blocks_ = joined.both;
}

// One of the two if it has it all.
Snapshot::Blocks Snapshot::join(const Blocks& first, const Blocks& second) {
  const auto &mine = *first, &theirs = *second;
  std::vector<Known> both;
  both.reserve(std::max(mine.size(), theirs.size()));
  bool only_mine = true, only_theirs = true;
  for (size_t i = 0, j = 0; i < mine.size() || j < theirs.size();) {
    if (j == theirs.size() || (i < mine.size() && mine[i].block < theirs[j].block)) {
      both.push_back(mine[i++]);
      only_theirs = false;
    } else if (i == mine.size() || theirs[j].block < mine[i].block) {
      both.push_back(theirs[j++]);
      only_mine = false;
    } else {
      const auto &a = mine[i++].epochs, &b = theirs[j].epochs;
      both.push_back({theirs[j++].block, joined(a, b)});
      only_mine = only_mine && both.back().epochs == a;
      only_theirs = only_theirs && (both.back().epochs == b || covers(*b, *a));
    }
  }
  if (only_mine) return first;
  return only_theirs ? second : std::make_shared<const std::vector<Known>>(std::move(both));
}

void Snapshot::join(uint64_t block, const Epochs& epochs) {
  Snapshot one;
  one.blocks_ = std::make_shared<const std::vector<Known>>(
      std::vector<Known>{{block, std::make_shared<const Epochs>(epochs)}});
  join(one);
}

const Epochs* Snapshot::of(uint64_t block) const {
  if (!blocks_) return nullptr;
  const auto found = std::lower_bound(blocks_->begin(), blocks_->end(), block,
                                      [](const Known& k, uint64_t b) { return k.block < b; });
  return found != blocks_->end() && found->block == block ? found->epochs.get() : nullptr;
}

void Clock::join(const Clock& other) {
  join_epochs(threads, other.threads);
  others.join(other.others);
  fenced.join(other.fenced);
  fenced_in_block.join(other.fenced_in_block);
  found.join(other.found);
  found_in_block.join(other.found_in_block);
}

void Clock::join(const Snapshot& other, uint64_t own_block) {
  others.join(other);
  if (const Epochs* own = other.of(own_block)) join_epochs(threads, *own);
}

void Clock::fence(uint64_t own_block, bool block_scope) {
  join(found_in_block, own_block);
  found_in_block = Snapshot{};
  if (!block_scope) {
    join(found, own_block);
    found = Snapshot{};
  }
  fenced_in_block = snapshot(own_block);
  if (!block_scope) fenced = fenced_in_block;
}

Snapshot Clock::snapshot(uint64_t own_block) const {
  Snapshot all = others;
  all.join(own_block, threads);
  return all;
}

bool Clock::knows(uint64_t block, uint32_t thread, uint32_t epoch, uint64_t own_block) const {
  if (block == own_block) return threads[thread] >= epoch;
  const Epochs* known = others.of(block);
  return known && known->size() > thread && (*known)[thread] >= epoch;
}

}  // namespace emulator
