// Asynchronous copies and warpgroup products: what is in flight, and when it lands.
//
// Two modes. Early: done at issue. Late: a destination holds NaN until the program has waited as
// the ISA asks, and a source is read only then; code that waits too little computes with NaN or
// reads what has been overwritten since.
#pragma once
#include <map>

#include "copies.h"
#include "machine.h"
#include "matrix.h"

namespace emulator {

// A tensor map in the emulator's own 128 bytes; tensor_map.py packs the same fields. `strides` are
// of dimensions 1.., in bytes; swizzle 0 none, 1, 2, 3: 32, 64, 128 bytes.
struct TensorMap {
  uint64_t address, strides[4];
  uint32_t dims[5], box[5], element_strides[5];
  uint32_t rank_minus_one, element_type, interleave, swizzle, fill, unused[2];
};
static_assert(sizeof(TensorMap) == 128);

struct BulkCopy {
  bool to_shared, tensor, adds;
  uint32_t site, shared, mbarrier, bytes, rank;
  uint64_t global;
  TensorMap map;
  int32_t coordinates[5];
  uint32_t issuer, group;  // of a store: thread, and its bulk group
};
struct MbarrierClocks {
  Clock arriving, completed;
};
struct PendingWgmma {
  uint32_t site, group;
  Wgmma shape;
  WgmmaOperands operands;                      // of the first thread: descriptors and flags
  std::vector<std::vector<uint32_t*>> d;       // by thread
  std::vector<std::vector<uint32_t>> initial;  // accumulators at issue, when they were valid
  std::vector<uint32_t> a;                     // four registers by thread
};
struct WarpGroup {
  uint32_t arrived = 0, site = 0, groups = 0;
  const char* name = "";
  void* operands[128];
  std::vector<PendingWgmma> pending;
};
struct AsyncEngine {
  std::vector<BulkCopy> loads, stores;
  std::map<uint32_t, uint32_t> store_groups;  // committed so far, by thread
  std::map<uint32_t, MbarrierClocks> clocks;  // by mbarrier
  WarpGroup warpgroups[kWarpgroups];
};

// Called by the scheduler when a thread returns: everything it started must have been waited for.
void finish_copies(ThreadState&);

// Unfenced ordinary stores: see proxy_fence in copies.h.
void publish_writes(ThreadState&);
void check_proxy(Thread&, uint32_t site, uint32_t offset, uint32_t bytes, const char* reader);
void clear_generic_writes(BlockState&, uint32_t offset, uint32_t bytes);

void land_loads(Thread&, uint32_t mbarrier);
// A copy that an mbarrier counts: who waits sees what the issuing thread did up to then, and
// nothing of the thread whose turn lets it land.
void mbarrier_issued(Thread&, uint64_t address);
void mbarrier_landed(Thread&, uint32_t site, uint64_t address, uint32_t bytes);
uint32_t swizzled(uint32_t mode, uint32_t address);

}  // namespace emulator
