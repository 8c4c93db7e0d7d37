#include "../bandwidth.h"

#include "parallel.h"
#include "simd.h"

namespace fastlm::cpu::FASTLM_ISA {

void launch(const Bandwidth& p, int64_t threads) {
  parallel_for(p.count, sizeof(float), threads, [&](int64_t first, int64_t last) {
    const float* source = p.source + first;
    float* target = p.target + first;
    Vec<float> sums[kWays] = {};
    if (p.traffic == Traffic::read) {
      sweep_ways<float>(last - first,
                        [&](int64_t i, auto span, auto way) __attribute__((always_inline)) {
                          sums[way.index] += load(source + i, span);
                        });
      if (sum<float>(sums) == -1.0f)
        target[0] = 0;  // never for non-negative input, but the compiler cannot know
    } else if (p.traffic == Traffic::copy) {
      write_row<true>(target, last - first,
                      [&](int64_t i, auto span)
                          __attribute__((always_inline)) { return load(source + i, span); });
      end_of_streaming();
    } else {
      sweep<float>(last - first, [&](int64_t i, auto span) __attribute__((always_inline)) {
        store(target + i, load(target + i, span) + 1.0f, span);
      });
    }
  });
}

}  // namespace fastlm::cpu::FASTLM_ISA
