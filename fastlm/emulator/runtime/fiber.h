// Stacks and the switch between them. A switch costs about 16 ns on x86-64; elsewhere ucontext
// does the same job some 15 times slower, because it saves the signal mask.
#pragma once
#include "thread.h"

#if !defined(__x86_64__)
#define EMULATOR_UCONTEXT 1
#include <ucontext.h>
#endif

namespace emulator {

struct Context {
#ifdef EMULATOR_UCONTEXT
  ucontext_t state;
#else
  void* stack_pointer = nullptr;
#endif
};

// Prepares `context` to call `entry`, which must never return, on the stack that starts at `stack`.
void make_context(Context& context, char* stack, void (*entry)());
void switch_context(Context& from, Context& to);

struct StackPool {
  char* (*take)();
  void (*give)(char* stack);
};

// A stack of kStackBytes above a page that faults, from a pool that outlives launches.
char* acquire_stack();
void release_stack(char* stack);

}  // namespace emulator
