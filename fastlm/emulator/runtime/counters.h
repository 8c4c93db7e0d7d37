// What a launch did, counted: never a time. The order is mirrored by counters.py.
#pragma once
#include <cstdint>

namespace emulator {

enum Counter : uint32_t {
  // instructions executed by threads, by class
  kInteger,
  kFloat,
  kConversion,
  kMove,
  kControl,
  kSpecial,
  kMemory,
  kAtomic,
  kSync,
  kTensor,
  kCopy,
  // bytes moved, as threads asked for them
  kGlobalRead,
  kGlobalWritten,
  kSharedRead,
  kSharedWritten,
  kLocalRead,
  kLocalWritten,
  // global memory: one request is one instruction of one warp, a sector is 32 aligned bytes
  kGlobalRequests,
  kGlobalSectors,
  kGlobalSectorsLeast,
  // shared memory: a wavefront serves each of the 32 four-byte banks once
  kSharedRequests,
  kSharedWavefronts,
  kSharedWavefrontsLeast,
  kMatrixRequests,
  kMatrixWavefronts,
  kMatrixWavefrontsLeast,  // ldmatrix and stmatrix
  kTensorOperations,       // multiplications and additions of mma and wgmma
  kCounterEnd
};

}  // namespace emulator
