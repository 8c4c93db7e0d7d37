// Directed rounding. Operands and results are volatile: compilers move arithmetic across a change
// of the rounding mode, which they do not know.
#include "arithmetic.h"

#include <cfenv>
#include <cmath>

namespace emulator {
namespace {

class RoundingMode {
 public:
  explicit RoundingMode(char mode) : before_(std::fegetround()) {
    std::fesetround(mode == 'z' ? FE_TOWARDZERO : mode == 'm' ? FE_DOWNWARD : FE_UPWARD);
  }
  ~RoundingMode() { std::fesetround(before_); }

 private:
  int before_;
};

}  // namespace

#define EMULATOR_ROUNDED(T, NAME, PARAMETERS, EXPRESSION) \
  T NAME PARAMETERS {                                     \
    const RoundingMode scope(mode);                       \
    const volatile T result = EXPRESSION;                 \
    return result;                                        \
  }
#define EMULATOR_ROUNDED_TYPE(T)                                                          \
  EMULATOR_ROUNDED(T, add_rounded, (volatile T a, volatile T b, char mode), a + b)        \
  EMULATOR_ROUNDED(T, multiply_rounded, (volatile T a, volatile T b, char mode), a* b)    \
  EMULATOR_ROUNDED(T, divide_rounded, (volatile T a, volatile T b, char mode), a / b)     \
  EMULATOR_ROUNDED(T, sqrt_rounded, (volatile T a, char mode), std::sqrt(a))              \
  EMULATOR_ROUNDED(T, fma_rounded, (volatile T a, volatile T b, volatile T c, char mode), \
                   std::fma(a, b, c))
EMULATOR_ROUNDED_TYPE(float)
EMULATOR_ROUNDED_TYPE(double)
EMULATOR_ROUNDED(float, convert_rounded, (volatile double a, char mode), static_cast<float>(a))
EMULATOR_ROUNDED(float, convert_rounded, (volatile int64_t a, char mode), static_cast<float>(a))
EMULATOR_ROUNDED(float, convert_rounded, (volatile uint64_t a, char mode), static_cast<float>(a))
#undef EMULATOR_ROUNDED_TYPE
#undef EMULATOR_ROUNDED

}  // namespace emulator
