// The recycling pool: blocks of memory that were touched before.
//
// The C library gives a block of over 32 MB back to the system when it is freed, and first touch of
// the next one costs about 2 GB/s, many times what a kernel needs to fill it. The pool keeps such
// blocks, on 2 MB pages, up to a limit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../dlpack.h"

namespace fastlm::cpu {

struct MemoryStats {
  int64_t in_use, held, limit;
};  // bytes handed out, kept for reuse, kept at most

void* take_block(size_t bytes);  // aligned to 64 bytes, contents undefined; throws std::bad_alloc
void give_block(void* block, size_t bytes);
void empty_cache();
void set_memory_limit(int64_t bytes);
MemoryStats memory_stats();

// A contiguous tensor over a block that goes back to the pool with the tensor.
dlpack::ManagedTensor* new_tensor(const int64_t* shape, int dims, dlpack::DataType dtype);

}  // namespace fastlm::cpu
