// The machine behind the kernels: launches, workers, resident blocks, warps and their threads.
//
// A worker (one OS thread) runs one fiber at a time. It stays in a block until nothing there can
// run; when only spinning threads are left it goes on to another resident block or starts a new
// one, so a kernel whose blocks wait for each other finishes as it would on a GPU that holds them
// all.
#pragma once
#include <atomic>
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "clock.h"
#include "fiber.h"
#include "tables.h"

namespace emulator {

struct ThreadState;
struct BlockState;
struct AsyncEngine;
class Observer;

enum class Schedule : uint32_t { kOrder, kReverse, kRandom };

// The seam to Python (native.py mirrors these with ctypes).
struct Shadow {  // for each of `bytes` from `begin` on, whether it has been written
  uint64_t begin, bytes;
  uint8_t* written;
};
struct Request {
  const void* parameters;
  const Range* ranges;  // memory the kernel may touch; null: any
  uint32_t range_count;
  uint32_t grid[3], block[3];
  uint32_t dynamic_shared, shared_limit;
  uint32_t schedule;
  uint64_t seed;
  uint32_t workers, resident;  // OS threads; blocks under way in each of them, 0: a GPU's
  uint64_t spin_limit;         // turns that spinning threads get while nothing else happens
  uint32_t late_copies, late_wgmma, check_proxies;
  uint32_t detect_races, detect_uninitialized, count;  // for kernels compiled with tracing
  uint32_t all_races;                                  // go on after a race
  const Shadow* shadows;  // global memory whose first writes are watched
  uint32_t shadow_count;
  // By PTX line, of `lines`: which stores use what a load has read, the bit of a store, and whether
  // races of the instruction are suppressed (dataflow.py, races.py).
  uint32_t lines;
  const uint64_t *load_uses, *store_bits;
  const uint8_t* suppressed;
};
struct Failure {
  char message[768];
  uint32_t failed, site, other_site;
  uint32_t ctaid[3], tid[3];
};
// Why a race is listed and not raised.
enum class Quiet : uint32_t { kLoud, kSameValue, kUnused, kSuppressed };
struct Race {  // of two instructions: the first time that it was seen, and how often it was
  char text[256];
  uint32_t site, other_site, quiet;
  uint32_t ctaid[3], tid[3];
  uint64_t count;
};
constexpr int kCounters = 64;
struct Result {
  Failure failure;
  uint64_t counters[kCounters];
  char* printed;  // what printf wrote; freed by emulator_free, as the races are
  Race* races;
  uint64_t race_count;
};

struct Launch {
  const Request& request;
  const KernelInfo& kernel;
  Result& result;
  Range ranges[kRanges];
  uint32_t grid_workspace[8] = {};
  std::vector<uint64_t> order;  // of the blocks
  uint64_t most_resident;       // blocks that each worker may have under way
  std::atomic<uint64_t> next{0}, progress{0};
  std::atomic<bool> stop{false};
  std::string printed;
  std::unique_ptr<Observer> observer;

  Launch(const Request&, const KernelInfo&, Result&);
  ~Launch();
};

// What lanes of a warp (or warps of a warpgroup) wait for together.
struct Collective {
  const char* name;
  uint32_t mask, arrived, site;
  void* operands[32];
};
struct Warp {
  BlockState* block;
  uint32_t index, live, ready, spinning;
  Collective slots[4];  // one for each disjoint set of lanes that waits
};
struct Barrier {
  uint32_t arrived, expected;
  uint32_t waiting[32];        // lanes of each warp
  uint32_t site[32];           // where each warp waits
  uint32_t votes, last_votes;  // predicates counted by barrier.red, in this phase and the last
  Clock clock;                 // what the threads that have arrived know
};

constexpr uint32_t kWarpgroupThreads = 128, kWarpgroups = 8;

struct AsyncCopy {  // cp.async of one thread
  uint32_t destination, bytes, source_bytes, site;
  uint64_t source;
};
struct ThreadState : Thread {
  Context context;
  BlockState* home;
  char* stack_memory;
  const char* waiting_for;
  uint32_t waiting_site;
  bool done;
  std::vector<AsyncCopy> copies;         // committed and open cp.async, in order
  std::vector<uint32_t> copy_groups;     // ends of the committed groups in `copies`
  std::vector<SharedVariable> unfenced;  // written through the generic proxy, no proxy fence yet
  Clock clock;                           // what happened before now, as far as this thread knows
  // kRelease after a fence, up to the next write that is not of the same volatile instruction: that
  // instruction sets a flag. With kBlockScope it does so for the own block alone; without it writes
  // to shared memory do not count.
  uint32_t flags, flag_site;
  uint64_t stored;  // bits of the stores that it has made
  bool suspected;   // has read what another overwrites: see Suspect
};

struct BlockState : Block {
  Worker* worker;
  Launch* launch;
  uint64_t number;  // linear block index
  uint32_t thread_count, alive, ready_warps, spinning_warps;
  std::unique_ptr<ThreadState[]> threads;
  Warp warps[32];
  Barrier barriers[16];
  char* arena;
  std::vector<uint16_t> generic_writer;   // per byte: 1 + the thread whose write is not fenced yet
  std::vector<SharedVariable> published;  // unfenced writes that a barrier has made known since
  std::unique_ptr<AsyncEngine> engine;    // TMA and wgmma in flight

  BlockState(Worker&, Launch&, uint32_t thread_count);
  ~BlockState();
  void start(uint64_t number);
};

struct Worker {
  Launch& launch;
  uint64_t random_state;
  Context main;
  ThreadState* current = nullptr;
  std::vector<std::unique_ptr<BlockState>> resident, idle;
  BlockState* block = nullptr;  // the one being run
  uint64_t spins = 0, progress_seen = 0;
  uint64_t most_resident;  // blocks
  size_t place = 0;        // of the resident block whose turn it is
  bool news = false;       // something happened since the spinning threads last looked
  size_t starts = 0;       // blocks to start before they look again

  Worker(Launch& launch, uint64_t seed)
      : launch(launch), random_state(seed), most_resident(launch.most_resident) {}
  ~Worker();
  void run();
  uint32_t random(uint32_t bound);
  ThreadState* pick();
  void switch_to(ThreadState* next);

 private:
  ThreadState* pick_in(BlockState&);
  bool start_block();
  bool heard_progress();
  size_t wake_spinners();  // the number of blocks that they are in
  void retire_blocks();
  void report_deadlock();
  uint32_t choose(uint32_t set);
};

inline ThreadState& state(Thread& t) { return static_cast<ThreadState&>(t); }
inline BlockState& block_of(Thread& t) { return *state(t).home; }
inline const Request& request_of(Thread& t) { return block_of(t).launch->request; }

// Blocks the calling thread until another makes it ready again.
void wait(Thread&, const char* what, uint32_t site);
void make_ready(Warp&, uint32_t lanes);
// Like wait, for a loop that polls memory: runs again once nothing else can.
void spin(Thread&, uint32_t site);
void finish_thread(ThreadState&);
// The first failure of a launch is kept; every worker stops at its next choice of a thread.
void record_failure(Thread&, uint32_t site, uint32_t other_site, const std::string& text);
// Ends a launch whose blocks all wait for each other and are more than `most`.
void refuse_grid(Launch&, uint64_t most);
void append_printed(Launch&, const std::string& text);
[[noreturn]] void leave(Thread&);  // abandons the launch after record_failure
// Records that something happened which a spinning thread may have waited for.
inline void progress(Thread& t) {
  block_of(t).launch->progress.fetch_add(1, std::memory_order_relaxed);
}

// Every lane of `mask` calls with its operands; the last to come runs `leader(operands, mask)` for
// all, and all go on. Lanes of an `aligned` collective must come from the same instruction.
bool arrive(Thread&, const char* name, uint32_t mask, void* operands, uint32_t site, bool aligned,
            Collective*& slot);
template <class Leader>
void collective(Thread& t, const char* name, uint32_t mask, void* operands, uint32_t site,
                bool aligned, Leader&& leader) {
  Collective* slot;
  if (!arrive(t, name, mask, operands, site, aligned, slot)) return wait(t, name, site);
  slot->arrived = 0;
  leader(slot->operands, mask);
  make_ready(*t.warp, mask & ~(1u << t.lane));
}

}  // namespace emulator
