// Happens-before, as vector clocks: for each thread, the last of its epochs that is known to have
// passed. A thread knows most of its own block, whose epochs lie in a plain array; what it knows of
// other blocks comes through fences and atomics, and is shared by all who have learned the same.
#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <vector>

namespace emulator {

using Epochs = std::vector<uint32_t>;  // of the threads of one block

// What is known of any number of blocks. A copy costs a pointer: the parts are never changed.
class Snapshot {
 public:
  bool empty() const { return !blocks_; }
  void join(const Snapshot& other);
  void join(uint64_t block, const Epochs& epochs);
  // The epochs of one block; null: nothing is known of it.
  const Epochs* of(uint64_t block) const;
  // Joins are remembered, because the threads of a block make the same ones at a barrier.
  static void forget_joins();

 private:
  struct Known {
    uint64_t block;
    std::shared_ptr<const Epochs> epochs;
  };
  using Blocks = std::shared_ptr<const std::vector<Known>>;  // by block number; null: empty
  struct Joined {
    Blocks first, second, both;
  };
  using Joins = std::array<Joined, 64>;
  static Joins& joins();
  static Blocks join(const Blocks& first, const Blocks& second);

  Blocks blocks_;
};

// What one thread knows, or several of its block together.
struct Clock {
  Epochs threads;  // of the own block; empty: nothing known
  Snapshot others;
  // What fences made public: a strong write publishes it for the GPU, or for the block alone. It is
  // carried by barriers, since all threads may fence before one of them sets a flag.
  Snapshot fenced, fenced_in_block;
  // What strong reads found published. It counts as known after the next fence.
  Snapshot found, found_in_block;

  void join(const Clock& other);  // of the same block
  void join(const Snapshot& other, uint64_t own_block);
  void fence(uint64_t own_block, bool block_scope);
  Snapshot snapshot(uint64_t own_block) const;
  bool knows(uint64_t block, uint32_t thread, uint32_t epoch, uint64_t own_block) const;
};

}  // namespace emulator
