// Integer and floating-point arithmetic as PTX defines it, where C++ differs or leaves it
// undefined. T is the instruction's type: uint32_t for .u32, int32_t for .s32, float for .f32 and
// so on.
#pragma once
#include <cstdint>

namespace emulator {

template <class T> constexpr bool is_signed_type = T(-1) < T(0);
template <class T> constexpr int bits_of = 8 * int(sizeof(T));
template <class T>
constexpr T lowest_of = is_signed_type<T> ? T(uint64_t(1) << (bits_of<T> - 1)) : T(0);
template <class T> constexpr T highest_of = T(~lowest_of<T>);

// Shifts by the width or more give 0, or the sign (C++ leaves them undefined).
template <class T> inline T shift_left(T v, uint32_t n) {
  return n >= uint32_t(bits_of<T>) ? T(0) : T(uint64_t(v) << n);
}
template <class T> inline T shift_right(T v, uint32_t n) {
  if (n >= uint32_t(bits_of<T>)) return v < T(0) ? T(-1) : T(0);
  return T(v >> n);
}

template <class T> inline T multiply_high(T a, T b) {
  if constexpr (sizeof(T) < 8 && is_signed_type<T>)
    return T((int64_t(a) * int64_t(b)) >> bits_of<T>);
  else if constexpr (sizeof(T) < 8)
    return T((uint64_t(a) * uint64_t(b)) >> bits_of<T>);
  else if constexpr (is_signed_type<T>)
    return T((__int128(a) * __int128(b)) >> 64);
  else
    return T((static_cast<unsigned __int128>(a) * b) >> 64);
}
// x / 0 and lowest / -1 trap on the host; on the GPU they give all ones and lowest.
template <class T> inline T divide(T a, T b) {
  if (b == T(0)) return T(-1);
  if (is_signed_type<T> && b == T(-1)) return T(0 - uint64_t(a));
  return T(a / b);
}
template <class T> inline T remainder(T a, T b) {
  if (b == T(0)) return a;
  if (is_signed_type<T> && b == T(-1)) return T(0);
  return T(a % b);
}
template <class T> inline T saturated_add(T a, T b) {
  const int64_t sum = int64_t(a) + int64_t(b);
  return sum > highest_of<T> ? highest_of<T> : sum < lowest_of<T> ? lowest_of<T> : T(sum);
}
template <class T> inline T saturated_subtract(T a, T b) {
  const int64_t sum = int64_t(a) - int64_t(b);
  return sum > highest_of<T> ? highest_of<T> : sum < lowest_of<T> ? lowest_of<T> : T(sum);
}

template <class T> inline T bit_field_extract(T v, uint32_t position, uint32_t length) {
  position &= 255, length &= 255;
  T result = 0;
  const T sign = T(v >> (position + length - 1 < uint32_t(bits_of<T>) ? position + length - 1
                                                                      : bits_of<T> - 1)) &
                 1;
  for (uint32_t i = 0; i < uint32_t(bits_of<T>); ++i) {
    const bool in_field = i < length && position + i < uint32_t(bits_of<T>);
    const T bit = length == 0 ? T(0)
                  : in_field  ? T(T(v >> (position + i)) & 1)
                              : T(is_signed_type<T> ? sign : T(0));
    result = T(result | T(uint64_t(bit) << i));
  }
  return result;
}
template <class T> inline T bit_field_insert(T field, T base, uint32_t position, uint32_t length) {
  position &= 255, length &= 255;
  if (length == 0 || position >= uint32_t(bits_of<T>)) return base;
  const T ones = length >= uint32_t(bits_of<T>) ? T(-1) : T((T(1) << length) - 1);
  const T mask = T(ones << position);
  return T((base & ~mask) | (T(field << position) & mask));
}
template <class T> inline uint32_t find_highest(T v, bool as_shift) {
  const T x = is_signed_type<T> && v < T(0) ? T(~v) : v;
  if (x == T(0)) return 0xffffffffu;
  const uint32_t at = 63u - uint32_t(__builtin_clzll(uint64_t(x) & (~0ull >> (64 - bits_of<T>))));
  return as_shift ? uint32_t(bits_of<T>) - 1 - at : at;
}
inline uint32_t count_leading_zeros(uint32_t v) { return v ? uint32_t(__builtin_clz(v)) : 32; }
inline uint32_t count_leading_zeros(uint64_t v) { return v ? uint32_t(__builtin_clzll(v)) : 64; }
template <class T> inline T reverse_bits(T v) {
  T result = 0;
  for (int i = 0; i < bits_of<T>; ++i) result = T(result | T((v >> i & 1) << (bits_of<T> - 1 - i)));
  return result;
}
// prmt: each selector nibble picks one byte of b:a, or, with its top bit, that byte's sign.
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t pick = selector >> (4 * i) & 15;
    const uint32_t byte = uint32_t(bytes >> (8 * (pick & 7))) & 255;
    result |= (pick & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
  }
  return result;
}
// lop3: the table's bit number (a b c) is the result.
inline uint32_t logic3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  for (int i = 0; i < 8; ++i)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}
inline uint32_t funnel_left(uint32_t low, uint32_t high, uint32_t n) {
  return uint32_t(((uint64_t(high) << 32 | low) << n) >> 32);
}
inline uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t n) {
  return uint32_t((uint64_t(high) << 32 | low) >> n);
}

// ---- 16-bit floats, computed in float and rounded once
struct half {
  uint16_t bits;
};
struct bfloat {
  uint16_t bits;
};
inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(half v) { return float(__builtin_bit_cast(_Float16, v.bits)); }
inline float widen(bfloat v) { return __builtin_bit_cast(float, uint32_t(v.bits) << 16); }

// Nearest even. NaN becomes the canonical 0x7fff, as cvt gives it.
template <class T> T narrow(double v);
template <> inline float narrow<float>(double v) { return float(v); }
template <> inline double narrow<double>(double v) { return v; }
inline bfloat narrow_bfloat(float v, bool toward_zero = false) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {uint16_t(toward_zero ? bits >> 16 : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
inline half narrow_half(float v) {
  if (v != v) return {0x7fff};
  return {__builtin_bit_cast(uint16_t, _Float16(v))};
}
// From a double: first to float with the lost bits kept in its last one (round to odd), so that the
// second rounding decides as if it had seen the exact value.
inline float to_odd_float(double v) {
  const float f = float(v);
  if (double(f) == v || f != f || f - f != 0.0f) return f;
  uint32_t bits = __builtin_bit_cast(uint32_t, f);
  if (!(bits & 1)) bits += (double(f) < v) == (f > 0) ? 1u : -1u;
  return __builtin_bit_cast(float, bits);
}
template <> inline half narrow<half>(double v) { return narrow_half(to_odd_float(v)); }
template <> inline bfloat narrow<bfloat>(double v) { return narrow_bfloat(to_odd_float(v)); }

// a * b + c in double, rounded to odd, for fma of 16-bit types: the product is exact in double.
inline double fma_to_odd(double a, double b, double c) {
  const double product = a * b, sum = product + c, back = sum - product;
  const double lost = (product - (sum - back)) + (c - back);
  if (lost == 0 || lost != lost) return sum;
  uint64_t bits = __builtin_bit_cast(uint64_t, sum);
  if (!(bits & 1)) bits += (lost > 0) == (sum > 0) ? 1ull : -1ull;
  return __builtin_bit_cast(double, bits);
}

// ---- float
inline float flush(float v) {  // .ftz: subnormals become zero of the same sign
  return __builtin_fabsf(v) < 1.17549435e-38f ? __builtin_copysignf(0.0f, v) : v;
}
inline float flush_half(float v) {  // the same for a value of an f16
  return __builtin_fabsf(v) < 6.103515625e-05f ? __builtin_copysignf(0.0f, v) : v;
}
inline float relu(float v) { return v != v ? v : v > 0.0f ? v : 0.0f; }
inline float saturate(float v) { return v > 0.0f ? (v < 1.0f ? v : 1.0f) : 0.0f; }  // NaN gives 0
inline double saturate(double v) { return v > 0.0 ? (v < 1.0 ? v : 1.0) : 0.0; }
// Without .NaN a NaN operand loses; -0 is less than +0.
template <class F> inline F minimum(F a, F b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return __builtin_signbit(a) ? a : b;
  return a < b ? a : b;
}
template <class F> inline F maximum(F a, F b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return __builtin_signbit(a) ? b : a;
  return a > b ? a : b;
}
template <class F> inline F minimum_nan(F a, F b) {
  return a != a ? a : b != b ? b : minimum(a, b);
}
template <class F> inline F maximum_nan(F a, F b) {
  return a != a ? a : b != b ? b : maximum(a, b);
}

// Out of range saturates and NaN gives 0: cvt's rule. v is already an integer value.
template <class T, class F> inline T to_integer(F v) {
  if (v != v) return T(0);
  if (v <= F(lowest_of<T>)) return lowest_of<T>;
  if (v >= F(highest_of<T>)) return highest_of<T>;
  return T(v);
}
template <class T, class S> inline T clamp_integer(S v) {  // cvt.sat between integers
  const __int128 wide = v;
  if (wide < __int128(lowest_of<T>)) return lowest_of<T>;
  if (wide > __int128(highest_of<T>)) return highest_of<T>;
  return T(v);
}

// Directed rounding: 'z' to zero, 'm' down, 'p' up. Out of line: rare, and the compiler must not
// move arithmetic across the change of rounding mode.
float add_rounded(float a, float b, char mode);
float multiply_rounded(float a, float b, char mode);
float fma_rounded(float a, float b, float c, char mode);
float divide_rounded(float a, float b, char mode);
float sqrt_rounded(float a, char mode);
double add_rounded(double a, double b, char mode);
double multiply_rounded(double a, double b, char mode);
double fma_rounded(double a, double b, double c, char mode);
double divide_rounded(double a, double b, char mode);
double sqrt_rounded(double a, char mode);
float convert_rounded(double a, char mode);
float convert_rounded(int64_t a, char mode);
float convert_rounded(uint64_t a, char mode);

}  // namespace emulator
