// What a translated kernel sees of the machine: its thread, its block, and the memory it may touch.
// Free of the standard library, because every translated kernel is compiled with it.
#pragma once
#include <cstdint>

namespace emulator {

struct Warp;
struct Worker;
struct Block;

// A piece of host memory that stands for device memory. Table entry 0 is always valid.
struct Range {
  uint64_t begin, bytes;
};
constexpr int kRanges = 256;
constexpr uint64_t kStackBytes = 512 * 1024;  // of one thread: its local memory and its calls

// How an instruction touches memory. Strong accesses (volatile, relaxed, atomic) do not race with
// each other, unless both are volatile and no fence makes the write a flag; acquire and release
// also order the accesses around them.
enum Access : uint32_t {
  kRead = 1,
  kWrite = 2,
  kStrong = 4,
  kAcquire = 8,
  kRelease = 16,
  kBlockScope = 32,  // .cta: orders threads of one block only
  kVolatile = 64,
  kUnrecorded = 128,   // checked against earlier accesses, not remembered for later ones
  kInFlight = 256,     // the data is still to come: nobody may read it before observe_landing
  kMatrix = 512,       // a row of ldmatrix or stmatrix
  kNoResult = 1024,    // red: the value that it changes is not returned, so it acquires nothing
  kTensorCopy = 2048,  // a row of a tensor copy: no request that is counted
};
enum Space : uint32_t { kGlobal, kShared, kLocal };

// The part of a block that kernels read. `shared` addresses in PTX are offsets from `shared`.
struct Block {
  char* shared;
  uint32_t shared_bytes;   // static and dynamic together
  uint32_t dynamic_bytes;  // what the launch asked for
  uint32_t ctaid[3], ntid[3], nctaid[3];
  uint64_t grid_workspace;  // of cooperative groups: the barrier of the grid lies 4 bytes in
};

struct LocalArray;

// One CUDA thread, run by one fiber.
struct Thread {
  const Range* ranges;
  int64_t fuel;  // loop iterations left before the thread is called stuck
  Block* block;
  Warp* warp;
  uint32_t lane, index;  // index: linear thread number in the block
  uint32_t tid[3];
  uint64_t stack;            // lowest address of the fiber's stack: local memory
  const LocalArray* arrays;  // of the function that runs, then of its callers
  uint64_t* counts;          // instructions by class, where they are counted
};

// Local memory that a function has, from its call to its end: nobody may touch the rest of the
// stack.
struct LocalArray {
  LocalArray(Thread& thread, const char* memory, uint64_t size)
      : begin(reinterpret_cast<uint64_t>(memory)),
        bytes(size),
        outer(thread.arrays),
        owner(thread) {
    thread.arrays = this;
  }
  ~LocalArray() { owner.arrays = outer; }
  const uint64_t begin, bytes;
  const LocalArray* const outer;
  Thread& owner;
};

// `site` everywhere below is the PTX line of the instruction: errors are traced back through it.
[[noreturn]] void fail(Thread&, uint32_t site, const char* format, ...)
    __attribute__((format(printf, 3, 4)));
[[noreturn]] void fail_bounds(Thread&, uint32_t site, Space, uint64_t address, uint32_t bytes,
                              uint32_t access);
[[noreturn]] void fail_stuck(Thread&, uint32_t site);

// Finds the range that holds the bytes and remembers it in `hint`, or fails.
void search_ranges(Thread&, uint32_t site, uint64_t address, uint32_t bytes, uint32_t access,
                   uint8_t& hint);
// Counters, races and initialisation; called by kernels compiled with EMULATOR_TRACED.
void observe(Thread&, uint32_t site, Space, uint64_t address, uint32_t bytes, uint32_t access);
// The data of a copy that was observed as kInFlight has arrived.
void observe_landing(Thread&, uint32_t offset, uint32_t bytes);
// Marks bytes written through the generic proxy: wgmma and TMA may not read them before a fence.
void mark_generic_write(Thread&, uint32_t offset, uint32_t bytes);

}  // namespace emulator
