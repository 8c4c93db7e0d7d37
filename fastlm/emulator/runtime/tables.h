// What a translated module tells the runtime about its kernels and variables.
#pragma once
#include "thread.h"

#define EMULATOR_EXPORT __attribute__((visibility("default")))
// Counts an instruction of the class, where kernels are compiled for tracing.
#if EMULATOR_TRACED
#define COUNT(kind) ++t.counts[kind];
#else
#define COUNT(kind)
#endif

namespace emulator {

struct SharedVariable {
  uint32_t offset, bytes;
};
struct KernelInfo {
  const char* name;
  void (*run)(Thread&, const char* parameters);
  uint32_t static_shared, dynamic_alignment, parameter_bytes;
  const SharedVariable* variables;
  uint32_t variable_count;
  uint32_t async_proxy;  // the module has wgmma or TMA: track who wrote what without a proxy fence
  uint32_t synchronizes_grid;  // as cooperative groups do: all blocks must be resident
};

struct VariableInfo {  // a .global or .const variable
  const char* name;
  char* address;
  uint64_t bytes;
};

}  // namespace emulator
