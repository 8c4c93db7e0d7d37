#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <mutex>
#include <new>
#include <vector>

#include "tables.h"

namespace emulator {
namespace {

constexpr int kMadviseGuard = 102;  // MADV_GUARD_INSTALL, which older headers do not have

std::mutex pool_mutex;
std::vector<char*> pool;

char* take_stack() {
  {
    const std::lock_guard<std::mutex> lock(pool_mutex);
    if (!pool.empty()) {
      char* stack = pool.back();
      pool.pop_back();
      return stack;
    }
  }
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  // A guard that does not split the mapping (from Linux 6.13 on), or one that does: of mappings a
  // process has 65530. Without a guard, a thread would write over the stack below.
  if (madvise(memory, page, kMadviseGuard) != 0 && mprotect(memory, page, PROT_NONE) != 0) {
    munmap(memory, page + kStackBytes);
    throw std::bad_alloc();
  }
  return static_cast<char*>(memory) + page;
}

void give_stack(char* stack) {
  const std::lock_guard<std::mutex> lock(pool_mutex);
  pool.push_back(stack);
}

}  // namespace

#ifdef EMULATOR_UCONTEXT
void make_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = kStackBytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}
void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
#else
// The six registers that the System V ABI lets a callee keep, then the stack pointer.
extern "C" __attribute__((visibility("hidden"))) void emulator_switch(void** save, void* load);
__asm__(R"(
.text
.hidden emulator_switch
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");

void make_context(Context& context, char* stack, void (*entry)()) {
  // At entry the ABI wants rsp 8 below a multiple of 16, as after a call.
  void** top = reinterpret_cast<void**>(stack + kStackBytes - 16);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}
void switch_context(Context& from, Context& to) {
  emulator_switch(&from.stack_pointer, to.stack_pointer);
}
#endif

// Stacks and their guards are many mappings: every library that is loaded uses the pool of the
// first (native.py).
extern "C" EMULATOR_EXPORT StackPool emulator_stacks;
StackPool emulator_stacks = {take_stack, give_stack};

char* acquire_stack() { return emulator_stacks.take(); }
void release_stack(char* stack) { emulator_stacks.give(stack); }

}  // namespace emulator
