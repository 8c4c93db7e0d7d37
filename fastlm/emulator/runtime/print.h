// printf from a kernel.
#pragma once
#include "thread.h"

namespace emulator {

// vprintf's contract: `arguments` is packed with natural alignment, floats widened to double.
// Returns the number of arguments, as CUDA does.
int32_t print(Thread&, uint32_t site, const char* format, const char* arguments);

}  // namespace emulator
