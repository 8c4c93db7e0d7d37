// Directed rounding, compiled with -frounding-math so that no operation leaves its mode's scope.
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

#define EMULATOR_ROUNDED(NAME, PARAMETERS, EXPRESSION) \
  NAME PARAMETERS {                                     \
    const RoundingMode scope(mode);                     \
    return EXPRESSION;                                  \
  }
EMULATOR_ROUNDED(float add_rounded, (float a, float b, char mode), a + b)
EMULATOR_ROUNDED(float multiply_rounded, (float a, float b, char mode), a * b)
EMULATOR_ROUNDED(float fma_rounded, (float a, float b, float c, char mode), std::fma(a, b, c))
EMULATOR_ROUNDED(float divide_rounded, (float a, float b, char mode), a / b)
EMULATOR_ROUNDED(float sqrt_rounded, (float a, char mode), std::sqrt(a))
EMULATOR_ROUNDED(double add_rounded, (double a, double b, char mode), a + b)
EMULATOR_ROUNDED(double multiply_rounded, (double a, double b, char mode), a * b)
EMULATOR_ROUNDED(double fma_rounded, (double a, double b, double c, char mode), std::fma(a, b, c))
EMULATOR_ROUNDED(double divide_rounded, (double a, double b, char mode), a / b)
EMULATOR_ROUNDED(double sqrt_rounded, (double a, char mode), std::sqrt(a))
EMULATOR_ROUNDED(float convert_rounded, (double a, char mode), static_cast<float>(a))
EMULATOR_ROUNDED(float convert_rounded, (int64_t a, char mode), static_cast<float>(a))
EMULATOR_ROUNDED(float convert_rounded, (uint64_t a, char mode), static_cast<float>(a))
#undef EMULATOR_ROUNDED

}  // namespace emulator
