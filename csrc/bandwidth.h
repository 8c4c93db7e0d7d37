// The memory traffic that floors are made of, measured in the run whose rows are held against it.
#pragma once

#include <cstdint>

namespace fastlm {

enum class Traffic : int { read, copy, in_place };  // copy writes past the caches

// One pass over `count` floats: reads source; or writes target = source; or target += 1.
struct Bandwidth {
  const float* source;
  float* target;
  int64_t count;
  Traffic traffic;
};

namespace cpu {
void launch(const Bandwidth& p, int64_t threads);
}

}  // namespace fastlm
