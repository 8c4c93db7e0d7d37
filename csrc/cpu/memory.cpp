#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace fastlm::cpu {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;

// Few distinct sizes, so that blocks are found again: four between powers of two, whole steps of
// 256 KB above.
size_t rounded(size_t bytes) {
  size_t step = 64;
  while (step < kHugePage / 8 && step * 8 < bytes) step *= 2;
  return std::max<size_t>(1, (bytes + step - 1) / step) * step;
}

void* from_system(size_t size) {
  if (size < kHugePage) {
    void* block = aligned_alloc(64, size);
    if (!block) throw std::bad_alloc();
    return block;
  }
  // One page more, so that the block can start on a huge page; the rest goes back at once.
  char* raw = static_cast<char*>(
      mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (raw == MAP_FAILED) throw std::bad_alloc();
  char* block = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(raw) + kHugePage - 1) /
                                        kHugePage * kHugePage);
  if (block != raw) munmap(raw, size_t(block - raw));
  if (raw + kHugePage != block) munmap(block + size, size_t(raw + kHugePage - block));
#ifdef MADV_HUGEPAGE
  madvise(block, size, MADV_HUGEPAGE);
#endif
  return block;
}

void to_system(void* block, size_t size) {
  if (size < kHugePage)
    free(block);
  else
    munmap(block, size);
}

class Pool {
 public:
  Pool() {
    const int64_t physical = int64_t(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
    stats_.limit = std::min<int64_t>(int64_t(4) << 30, physical / 8);
  }
  void* take(size_t size) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stats_.in_use += int64_t(size);
      std::vector<void*>& blocks = free_[size];
      if (!blocks.empty()) {
        void* block = blocks.back();
        blocks.pop_back();
        stats_.held -= int64_t(size);
        return block;
      }
    }
    try {
      return from_system(size);
    } catch (const std::bad_alloc&) {
      empty();  // what is held in other sizes may be what is missing
    }
    return from_system(size);
  }
  void give(void* block, size_t size) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stats_.in_use -= int64_t(size);
      if (stats_.held + int64_t(size) <= stats_.limit) {
        free_[size].push_back(block);
        stats_.held += int64_t(size);
        return;
      }
    }
    to_system(block, size);
  }
  void empty() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [size, blocks] : free_)
      for (void* block : blocks) to_system(block, size);
    free_.clear();
    stats_.held = 0;
  }
  void limit(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stats_.limit = bytes;
      if (stats_.held <= bytes) return;
    }
    empty();
  }
  MemoryStats stats() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return stats_;
  }

 private:
  std::mutex mutex_;
  std::map<size_t, std::vector<void*>> free_;
  MemoryStats stats_{};
};

Pool& pool() {
  static Pool* const the_pool =
      new Pool;  // never destroyed: tensors may outlive every static object
  return *the_pool;
}

struct Block {
  dlpack::ManagedTensor managed;
  std::vector<int64_t> shape;
  size_t bytes;
};

}  // namespace

void* take_block(size_t bytes) { return pool().take(rounded(bytes)); }
void give_block(void* block, size_t bytes) { pool().give(block, rounded(bytes)); }
void empty_cache() { pool().empty(); }
void set_memory_limit(int64_t bytes) { pool().limit(bytes); }
MemoryStats memory_stats() { return pool().stats(); }

dlpack::ManagedTensor* new_tensor(const int64_t* shape, int dims, dlpack::DataType dtype) {
  auto block = std::make_unique<Block>();
  block->shape.assign(shape, shape + dims);
  block->bytes = dtype.bits / 8;
  for (int64_t extent : block->shape) block->bytes *= size_t(extent);
  dlpack::Tensor& tensor = block->managed.tensor;
  tensor = {take_block(block->bytes), {dlpack::kCpu, 0}, dims, dtype,
            block->shape.data(),      nullptr,           0};
  block->managed.context = block.get();
  block->managed.deleter = [](dlpack::ManagedTensor* self) {
    const std::unique_ptr<Block> owner(static_cast<Block*>(self->context));
    give_block(self->tensor.data, owner->bytes);
  };
  return &block.release()->managed;
}

}  // namespace fastlm::cpu
