// Watches the accesses of a kernel that was compiled with tracing: counts them, checks that shared
// memory was written before it is read, and finds data races.
#pragma once
#include <array>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "machine.h"

namespace emulator {

// One access, remembered. Two conflict when they touch the same byte and one writes.
struct Record {
  uint32_t block, epoch, site;  // epoch 0: empty
  uint16_t thread;
  uint8_t bytes;  // which of the granule's two
  uint8_t access;
};
// Two bytes of memory: the last write, the last reader, and the last readers that were unordered
// with it from the same and from another warp. Barriers order whole blocks or whole warps, so a
// write that misses any reader misses one of these.
struct Cell {
  Record write, reader, neighbour, stranger;
};

constexpr uint64_t kGranuleBytes = 2;

class Observer {
 public:
  explicit Observer(const Request& request) : request_(request) {}
  ~Observer() { Snapshot::forget_joins(); }
  void start_block(BlockState&);
  void finish_block(BlockState&);  // folds the block's requests into the counters
  void land(BlockState&, uint32_t offset, uint32_t bytes);
  // Threads may store one value together; called before another thread runs, this checks that the
  // stores which looked like that did not change anything.
  void settle(ThreadState&);
  void access(ThreadState&, uint32_t site, Space, uint64_t address, uint32_t bytes,
              uint32_t access);

  // Late products read shared memory in the name of their warpgroup, which has a place of its own
  // in every clock: a thread knows of those reads once it has waited for the products.
  void begin_products(BlockState&, uint32_t warpgroup);
  void product_read(ThreadState&, uint32_t site, uint64_t offset, uint32_t bytes);
  void end_products(BlockState&, uint32_t warpgroup);

  // Happens-before edges. `release` adds what the thread knows and starts its next epoch.
  void release(ThreadState&, Clock& into);
  void fence(ThreadState&, bool block_scope);

  // The races that were seen and not raised.
  void list_races(Result&) const;

 private:
  struct Requests {  // of one instruction and warp: where each lane's n-th execution went
    uint32_t bytes, access;
    Space space;
    std::vector<uint64_t> lanes[32];
  };
  struct Found {  // a race
    Record before, now;
    uint64_t address;
    Space space;
  };
  // A thread that has read what another of its block overwrites, by a load whose value only stores
  // use. As long as it makes none of them, nothing depends on what it has read.
  struct Suspect {
    Found race;
    uint32_t reader;
    uint64_t uses;  // bits of the stores
  };
  struct Published {
    Snapshot known;
    uint64_t stores = 0;  // that have replaced what the address published for the GPU
  };
  struct BlockTrace {
    std::vector<uint8_t> byte_states;                   // of shared memory: see ByteState
    std::vector<Cell> cells;                            // of shared memory
    std::unordered_map<uint64_t, Requests> requests;    // by warp and site
    uint32_t products[kWarpgroups] = {};                // epochs of the warpgroups' products
    std::unordered_map<uint64_t, Published> published;  // for the block, at an address
    std::vector<Suspect> suspects;
  };
  using Page = std::vector<Cell>;
  // A store over an unordered one of the same instruction, and what stood there.
  struct Repeated {
    Found race;
    uint16_t value;
  };

  void count(ThreadState&, BlockTrace&, uint32_t site, Space, uint64_t address, uint32_t bytes,
             uint32_t access);
  static void count_requests(const Requests&, uint64_t* counters);
  void check_initialized(ThreadState&, BlockTrace&, uint32_t site, uint64_t offset, uint32_t bytes,
                         uint32_t access);
  void check_shadows(ThreadState&, uint32_t site, uint64_t address, uint32_t bytes,
                     uint32_t access);
  void synchronize(ThreadState&, BlockTrace&, Space, uint64_t address, uint32_t access);

  void check_races(ThreadState&, BlockTrace&, Record now, Space, uint64_t address, uint32_t bytes);
  void check_cell(ThreadState&, BlockTrace&, Cell&, const Record& now, uint64_t address, Space);
  Cell& cell_at(BlockTrace&, Space, uint64_t granule);
  void report(ThreadState&, BlockTrace&, const Found&);
  void raise(ThreadState&, const Found&);
  void note(ThreadState&, const Found&, Quiet);
  bool suspect(BlockState&, BlockTrace&, const Found&);
  void check_suspects(ThreadState&, BlockTrace&, uint64_t stored);
  bool is_suppressed(uint32_t site) const;

  const Request& request_;
  std::vector<Repeated> repeated_;  // by the thread that runs
  std::unordered_map<uint64_t, BlockTrace> blocks_;
  std::unordered_map<uint64_t, Page> pages_;
  std::unordered_map<uint64_t, Published> published_;  // for the GPU, at a global address
  std::map<std::array<uint32_t, 3>, Race> races_;      // by both sites, and why they are quiet
  Found noted_ = {};                                   // the last of them
};

}  // namespace emulator
