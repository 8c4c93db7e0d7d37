// A row of the logits that linear_cross_entropy keeps from forward to backward, in three quarters
// of their memory: then the weight's gradient has room for a third more rows than there are
// features.
//
// forward: begin(the largest, whether -inf may be among them), store() what it has, end();
// backward: open(), load().
#pragma once

#include "../dtype.h"
#include "simd.h"

namespace fastlm::cpu::FASTLM_ISA {

// Those of a tile, as they lie in memory. float64: the logits. float32: codes of three bytes,
// rows * classes of two, then as many of one. bfloat16: codes of twelve bits, rows * classes bytes,
// then a byte for each two of a row; what an odd class lacks is apart. Codes have one scale a row:
// float32's factor, bfloat16's exponent.
struct KeptLogits {
  void* codes;
  void* scales;
  uint8_t* odd;  // (rows)
  int64_t rows, classes;
};

template <class T> struct ScaleOf {
  using type = float;
};
template <> struct ScaleOf<bf16> {
  using type = uint8_t;
};
template <class T> using scale_t = typename ScaleOf<T>::type;

// Of how many rows a memory of `bytes` has room for the logits.
template <class T> int64_t rows_that_fit(int64_t bytes, int64_t classes) {
  const int64_t size = classes * int64_t(sizeof(T));
  return bytes / (sizeof(T) == 8 ? size : 3 * size / 4);
}

// float64, for gradcheck: as they are.
template <class T> struct KeptRow {
  static constexpr bool kCapped = false;  // whether logits are kept after the softcap
  T* logits;

  KeptRow(const KeptLogits& kept, int64_t r, uint16_t*)
      : logits(static_cast<T*>(kept.codes) + r * kept.classes) {}
  void begin(T, bool) {}
  template <class Span> FASTLM_INLINE void store(int64_t c, Vec<T> z, Span span) const {
    cpu::FASTLM_ISA::store(logits + c, z, span);
  }
  void end() const {}
  void open() const {}
  template <class Span> FASTLM_INLINE Vec<T> load(int64_t c, Span span) const {
    return cpu::FASTLM_ISA::load(logits + c, span);
  }
};

// Fixed-point numbers of 23 bits, relative to the row's largest in the tile. Their error, 2^-23 of
// that one, is about what the product that made them rounds.
template <> struct KeptRow<float> {
  static constexpr bool kCapped = true;
  static constexpr float kSteps = 4194303.0f;  // 2^22 - 1: a code is round(z / scale) + 2^22
  static constexpr uint32_t kInfinite = 1u << 23;
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));

  uint16_t* low;
  uint8_t* high;
  float* scale;
  float steps = 0;
  bool infinite = true;

  KeptRow(const KeptLogits& kept, int64_t r, uint16_t*) {
    low = static_cast<uint16_t*>(kept.codes);
    high = reinterpret_cast<uint8_t*>(low + kept.rows * kept.classes) + r * kept.classes;
    low += r * kept.classes;
    scale = static_cast<float*>(kept.scales) + r;
  }
  void begin(float reach, bool with_infinite) {
    infinite = with_infinite;
    *scale = reach / kSteps;
    // Below 1e-30 a logit is as good as zero, and its steps would not be finite.
    steps = reach > 1e-30f ? kSteps / reach : 0;
  }
  template <class Span> FASTLM_INLINE void store(int64_t c, Vec<float> z, Span span) const {
    // Adding 1.5 * 2^23 rounds to whole numbers and leaves them, plus 2^22, in the low 23 bits.
    Vec<uint32_t> code = bit_cast<Vec<uint32_t>>(z * steps + 12582912.0f) & 0x7fffffu;
    if (infinite) code = z == -INFINITY ? Vec<uint32_t>{} + kInfinite : code;
    const Half16 two = to_16_bits(code & 0xffffu);
    const Bytes one = __builtin_convertvector(code >> 16, Bytes);
    memcpy(low + c, &two, size_t(live_lanes<float>(span)) * 2);
    memcpy(high + c, &one, size_t(live_lanes<float>(span)));
  }
  void end() const {}
  void open() const {}
  // By name: GCC 12 takes the bytes one by one.
  static FASTLM_INLINE Vec<uint32_t> to_32_bits_of(Bytes bytes) {
#if defined(__AVX512F__)
    return bit_cast<Vec<uint32_t>>(_mm512_cvtepu8_epi32(bit_cast<__m128i>(bytes)));
#elif defined(__AVX2__)
    return bit_cast<Vec<uint32_t>>(
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&bytes))));
#else
    return __builtin_convertvector(bytes, Vec<uint32_t>);
#endif
  }
  template <class Span> FASTLM_INLINE Vec<float> load(int64_t c, Span span) const {
    Half16 two{};
    Bytes one{};
    memcpy(&two, low + c, size_t(live_lanes<float>(span)) * 2);
    memcpy(&one, high + c, size_t(live_lanes<float>(span)));
    const Vec<uint32_t> code = to_32_bits(two) | to_32_bits_of(one) << 16;
    // As the low bits of a float in [2^23, 2^24), it is the number plus 2^23 + 2^22.
    const Vec<float> z = (bit_cast<Vec<float>>(code | 0x4b000000u) - 12582912.0f) * *scale;
    return code == kInfinite ? all(-INFINITY) : z;
  }
};

// Floats of twelve bits: a sign, four of exponent and seven of mantissa, as bfloat16 has. They are
// exact down to 2^-13 of the power of two of the row's largest in the tile, whose exponent is the
// scale, and have an error of 2^-21 of it below. `codes` holds them apart, a row at a time.
template <> struct KeptRow<bf16> {
  static constexpr bool kCapped = false;
  static constexpr uint32_t kLeastNormal = 1u << 7, kInfinite = 0xfff;

  uint8_t* low;   // the lower eight bits of each
  uint8_t* high;  // the upper four of the first half of the classes and of the second, in pairs
  uint8_t* odd;   // and of the middle class, where their number is odd
  int64_t first, second;  // as many classes
  uint8_t* exponent;
  uint16_t* codes;
  uint32_t base = 0;          // what the code of a normal number lacks to the upper half of a float
  float step = 0, steps = 0;  // of a smaller one, and its inverse
  bool infinite = true;

  KeptRow(const KeptLogits& kept, int64_t r, uint16_t* codes)
      : first(ceil_div(kept.classes, 2)), second(kept.classes / 2), codes(codes) {
    low = static_cast<uint8_t*>(kept.codes) + r * kept.classes;
    high = static_cast<uint8_t*>(kept.codes) + kept.rows * kept.classes + r * second;
    odd = kept.odd + r;
    exponent = static_cast<uint8_t*>(kept.scales) + r;
  }
  void begin(float reach, bool with_infinite) {
    infinite = with_infinite;
    // Not so small that a step would be denormal.
    *exponent = uint8_t(bit_cast<uint32_t>(reach > 0x1p-100f ? reach : 0x1p-100f) >> 23);
    set_scale();
  }
  template <class Span> FASTLM_INLINE void store(int64_t c, Vec<float> z, Span span) const {
    const Vec<uint32_t> bits = bit_cast<Vec<uint32_t>>(z), size = bits & 0x7fffffffu;
    // Adding 2^23 rounds to whole numbers and leaves them in the low bits.
    const Vec<float> small = bit_cast<Vec<float>>(size) * steps + 8388608.0f;
    const Vec<uint32_t> normal = (size >> 16) - base;
    const Vec<uint32_t> number =
        (size >> 16) >= base + kLeastNormal ? normal : bit_cast<Vec<uint32_t>>(small);
    Vec<uint32_t> code = (number & 0x7ffu) | bits >> 31 << 11;
    if (infinite) code = z == -INFINITY ? Vec<uint32_t>{} + kInfinite : code;
    const Half16 lanes = to_16_bits(code);
    memcpy(codes + c, &lanes, size_t(live_lanes<float>(span)) * 2);
  }
  void end() const {
    pack(codes, low, high, first, second);
    if (first > second) *odd = uint8_t(codes[second] >> 8);
  }
  void open() {
    set_scale();
    unpack(codes, low, high, first, second);
    if (first > second) codes[second] = uint16_t(low[second] | *odd << 8);
  }
  template <class Span> FASTLM_INLINE Vec<float> load(int64_t c, Span span) const {
    Half16 lanes{};
    memcpy(&lanes, codes + c, size_t(live_lanes<float>(span)) * 2);
    const Vec<uint32_t> code = to_32_bits(lanes), number = code & 0x7ffu;
    const Vec<float> small = __builtin_convertvector(bit_cast<Vec<int32_t>>(number), Vec<float>);
    const Vec<uint32_t> size =
        number >= kLeastNormal ? (number + base) << 16 : bit_cast<Vec<uint32_t>>(small * step);
    const Vec<float> z = bit_cast<Vec<float>>(size | code >> 11 << 31);
    return code == kInfinite ? all(-INFINITY) : z;
  }

 private:
  // Static: a byte that is written could be one of the members.
  static void pack(const uint16_t* __restrict codes, uint8_t* __restrict low,
                   uint8_t* __restrict high, int64_t first, int64_t second) {
    in_blocks(first + second, [&](int64_t c) { low[c] = uint8_t(codes[c]); });
    in_blocks(second,
              [&](int64_t c) { high[c] = uint8_t(codes[c] >> 8 | codes[first + c] >> 8 << 4); });
  }
  static void unpack(uint16_t* __restrict codes, const uint8_t* __restrict low,
                     const uint8_t* __restrict high, int64_t first, int64_t second) {
    in_blocks(second, [&](int64_t c) {
      codes[c] = uint16_t(low[c] | (high[c] & 15) << 8);
      codes[first + c] = uint16_t(low[first + c] | high[c] >> 4 << 8);
    });
  }
  // body(i) for i in [0, n): the compiler's vectors of all that is left are whole.
  template <class Body> static FASTLM_INLINE void in_blocks(int64_t n, const Body& body) {
    constexpr int64_t kBlock = 32;
    int64_t i = 0;
    for (; i + kBlock <= n; i += kBlock)
#pragma GCC ivdep
      for (int64_t j = 0; j < kBlock; ++j) body(i + j);
    for (; i < n; ++i) body(i);
  }
  void set_scale() {
    const uint32_t power = *exponent;
    base = (power - 14) << 7;
    step = bit_cast<float>((power - 20) << 23);
    steps = bit_cast<float>((254 - (power - 20)) << 23);
  }
};

}  // namespace fastlm::cpu::FASTLM_ISA
