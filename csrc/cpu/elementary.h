// Elementary functions of vectors: 2^x, 1 / x, tanh, erf.
#pragma once

#include "simd.h"

namespace fastlm::cpu::FASTLM_ISA {

// 2^y for y <= 127. Cody-Waite: n = round(y), and 2^(y - n) by the degree-5 minimax polynomial of
// relative error 9.1e-8 whose value at 0 is exactly 1. 0 far below the smallest float, and at -inf;
// a NaN stays one.
FASTLM_INLINE Vec<float> exp2_bounded(Vec<float> y) {
#if defined(__AVX512F__)
  const __m512 x = _mm512_max_ps(_mm512_set1_ps(-160.0f),
                                 bit_cast<__m512>(y));  // the second operand where one is NaN
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec<float> r = bit_cast<Vec<float>>(_mm512_sub_ps(x, n));
#else
  // 1.5 * 2^23, and the exponent's bias: adding it leaves round(y) + 127 in the low bits.
  constexpr float kRound = 12582912.0f + 127.0f;
  const Vec<float> shifted = y + kRound;
  const Vec<float> r = y - (shifted - kRound);
#endif
  Vec<float> p = all(1.326472717e-03f);
  p = p * r + 9.671512642e-03f;
  p = p * r + 5.550733743e-02f;
  p = p * r + 2.402224209e-01f;
  p = p * r + 6.931469776e-01f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(_mm512_scalef_ps(bit_cast<__m512>(p), n));
#else
  // A product and no addition to the exponent's bits, which would make numbers of some NaNs.
  const Vec<float> scale = bit_cast<Vec<float>>(bit_cast<Vec<uint32_t>>(shifted) << 23);
  return y < -126.0f ? Vec<float>{} : p * scale;
#endif
}
// 2^y, at most 2^127.
FASTLM_INLINE Vec<float> exp2(Vec<float> y) { return exp2_bounded(y > 127.0f ? all(127.0f) : y); }
// float64 is here for gradcheck, not for speed: the C library's function, lane by lane.
FASTLM_INLINE Vec<double> exp2(Vec<double> y) {
  for (int64_t i = 0; i < kLanes<double>; ++i) y[i] = ::exp2(y[i]);
  return y;
}
FASTLM_INLINE Vec<double> exp2_bounded(Vec<double> y) { return exp2(y); }

// 1 / x for finite x >= 1.
FASTLM_INLINE Vec<float> reciprocal(Vec<float> x) {
#if defined(__AVX512F__)
  // 14 bits and one Newton step: a third of the time of a division, which would hold GELU above its
  // memory floor.
  const Vec<float> guess = bit_cast<Vec<float>>(_mm512_rcp14_ps(bit_cast<__m512>(x)));
  return guess * (2.0f - x * guess);
#else
  return 1.0f / x;
#endif
}
FASTLM_INLINE Vec<double> reciprocal(Vec<double> x) { return 1.0 / x; }

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

// tanh, of relative error 1.5e-7 at any size of x: a softcap multiplies small ones by a large
// number. Below 0.7, x + x^3 P(x^2) with the degree-4 minimax polynomial P; above, 1 - 2 / (1 +
// exp(2x)).
FASTLM_INLINE Vec<float> tanh(Vec<float> x) {
  const Vec<float> square = x * x;
  Vec<float> p = all(-5.138662644e-03f);
  p = p * square + 2.009197138e-02f;
  p = p * square - 5.355885997e-02f;
  p = p * square + 1.332911104e-01f;
  p = p * square - 3.333319128e-01f;
  const Vec<float> near = x + x * (p * square);
  const Vec<float> far = 1.0f - 2.0f * reciprocal(1.0f + exp2(x * float(2 * kLog2e)));
  return square < 0.49f ? near : far;
}
FASTLM_INLINE Vec<double> tanh(Vec<double> x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = ::tanh(x[i]);
  return x;
}

// erf. 1 - 2^(-|x| P(|x|)), P the degree-8 minimax polynomial of -log2(erfc(x)) / x on [0, 4]:
// absolute error 2.3e-9 before rounding. Past 4, erf is 1 to float32's precision.
FASTLM_INLINE Vec<float> erf(Vec<float> x) {
  const Vec<float> magnitude = x < 0.0f ? -x : x;
  const Vec<float> a = magnitude > 4.0f ? all(4.0f) : magnitude;
  Vec<float> p = all(-1.160477837e-05f);
  p = p * a + 1.529640801e-04f;
  p = p * a - 8.482333780e-04f;
  p = p * a + 2.274783705e-03f;
  p = p * a - 8.480345540e-05f;
  p = p * a - 2.772447712e-02f;
  p = p * a + 1.483079113e-01f;
  p = p * a + 9.184429005e-01f;
  p = p * a + 1.627907267e+00f;
  const Vec<float> result = 1.0f - exp2_bounded(-a * p);
  return x < 0.0f ? -result : result;
}
FASTLM_INLINE Vec<double> erf(Vec<double> x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = ::erf(x[i]);
  return x;
}

}  // namespace fastlm::cpu::FASTLM_ISA
