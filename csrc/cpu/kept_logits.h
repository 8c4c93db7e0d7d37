// A row of the logits that linear_cross_entropy keeps from forward to backward, in three quarters
// of their memory: then the weight's gradient has room for a third more rows than there are
// features.
//
// forward: begin(the largest), store() what it has, end(); backward: open(), load().
#pragma once

#include "../cross_entropy_tile.h"
#include "simd.h"

namespace fastlm::cpu::FASTLM_ISA {

FASTLM_INLINE int64_t live_lanes(Full) { return kLanes<float>; }
FASTLM_INLINE int64_t live_lanes(Part part) { return part.count; }

// float64, for gradcheck: as they are.
template <class T> struct KeptRow {
  static constexpr bool kCapped = false;  // whether logits are kept after the softcap
  T* logits;

  KeptRow(const CrossEntropyTile& p, int64_t r, uint16_t*)
      : logits(static_cast<T*>(p.kept) + r * p.classes) {}
  void begin(T) {}
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
  static constexpr float kSteps = 4194303.0f;  // 2^22 - 1: a code is round(z / factor) + 2^22
  static constexpr uint32_t kInfinite = 1u << 23;
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));

  uint16_t* low;
  uint8_t* high;
  float* factor;
  float steps = 0;

  KeptRow(const CrossEntropyTile& p, int64_t r, uint16_t*) {
    low = static_cast<uint16_t*>(p.kept);
    high = reinterpret_cast<uint8_t*>(low + p.kept_rows * p.classes) + r * p.classes;
    low += r * p.classes;
    factor = static_cast<float*>(p.factor) + r;
  }
  void begin(float reach) {
    *factor = reach / kSteps;
    // Below 1e-30 a logit is as good as zero, and its steps would not be finite.
    steps = reach > 1e-30f ? kSteps / reach : 0;
  }
  template <class Span> FASTLM_INLINE void store(int64_t c, Vec<float> z, Span span) const {
    // Adding 1.5 * 2^23 rounds to whole numbers and leaves them, plus 2^22, in the low 23 bits.
    Vec<uint32_t> code = bit_cast<Vec<uint32_t>>(z * steps + 12582912.0f) & 0x7fffffu;
    code = z == -INFINITY ? Vec<uint32_t>{} + kInfinite : code;
    const Half16 two = to_16_bits(code & 0xffffu);
    const Bytes one = __builtin_convertvector(code >> 16, Bytes);
    memcpy(low + c, &two, size_t(live_lanes(span)) * 2);
    memcpy(high + c, &one, size_t(live_lanes(span)));
  }
  void end() const {}
  void open() const {}
  template <class Span> FASTLM_INLINE Vec<float> load(int64_t c, Span span) const {
    Half16 two{};
    Bytes one{};
    memcpy(&two, low + c, size_t(live_lanes(span)) * 2);
    memcpy(&one, high + c, size_t(live_lanes(span)));
    const Vec<uint32_t> code = to_32_bits(two) | __builtin_convertvector(one, Vec<uint32_t>) << 16;
    // As the low bits of a float in [2^23, 2^24), it is the number plus 2^23 + 2^22.
    const Vec<float> z = (bit_cast<Vec<float>>(code | 0x4b000000u) - 12582912.0f) * *factor;
    return code == kInfinite ? all(-INFINITY) : z;
  }
};

// Floats of twelve bits: a sign, four of exponent and seven of mantissa, as bfloat16 has. They are
// exact down to 2^-13 of the factor, the power of two of the row's largest in the tile, and have an
// error of 2^-21 of it below. `codes` holds them apart, a row at a time.
template <> struct KeptRow<bf16> {
  static constexpr bool kCapped = false;
  static constexpr uint32_t kLeastNormal = 1u << 7, kInfinite = 0xfff;

  uint8_t* low;   // the lower eight bits of each
  uint8_t* high;  // the upper four of the first half of the classes and of the second, in pairs
  int64_t classes, half;
  bf16* factor;
  uint16_t* codes;
  uint32_t base = 0;          // what the code of a normal number lacks to the upper half of a float
  float step = 0, steps = 0;  // of a smaller one, and its inverse

  KeptRow(const CrossEntropyTile& p, int64_t r, uint16_t* codes)
      : classes(p.classes), half(ceil_div(classes, 2)), codes(codes) {
    low = static_cast<uint8_t*>(p.kept) + r * classes;
    high = static_cast<uint8_t*>(p.kept) + p.kept_rows * classes + r * half;
    factor = static_cast<bf16*>(p.factor) + r;
  }
  void begin(float reach) {
    // Not so small that a step would be denormal.
    put(factor,
        bit_cast<float>(bit_cast<uint32_t>(reach > 0x1p-100f ? reach : 0x1p-100f) & 0xff800000u));
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
    code = z == -INFINITY ? Vec<uint32_t>{} + kInfinite : code;
    const Half16 lanes = to_16_bits(code);
    memcpy(codes + c, &lanes, size_t(live_lanes(span)) * 2);
  }
  void end() const {
    const uint16_t* second = codes + half;
    for (int64_t c = 0; c < classes; ++c) low[c] = uint8_t(codes[c]);
    for (int64_t c = 0; c < classes - half; ++c)
      high[c] = uint8_t(codes[c] >> 8 | second[c] >> 8 << 4);
    if (half > classes - half) high[half - 1] = uint8_t(codes[half - 1] >> 8);
  }
  void open() {
    set_scale();
    uint16_t* second = codes + half;
    for (int64_t c = 0; c < half; ++c) codes[c] = uint16_t(low[c] | (high[c] & 15) << 8);
    for (int64_t c = 0; c < classes - half; ++c)
      second[c] = uint16_t(low[half + c] | high[c] >> 4 << 8);
  }
  template <class Span> FASTLM_INLINE Vec<float> load(int64_t c, Span span) const {
    Half16 lanes{};
    memcpy(&lanes, codes + c, size_t(live_lanes(span)) * 2);
    const Vec<uint32_t> code = to_32_bits(lanes), number = code & 0x7ffu;
    const Vec<float> small = __builtin_convertvector(bit_cast<Vec<int32_t>>(number), Vec<float>);
    const Vec<uint32_t> size =
        number >= kLeastNormal ? (number + base) << 16 : bit_cast<Vec<uint32_t>>(small * step);
    const Vec<float> z = bit_cast<Vec<float>>(size | code >> 11 << 31);
    return code == kInfinite ? all(-INFINITY) : z;
  }

 private:
  void set_scale() {
    base = (uint32_t(factor->bits)) - (14u << 7);
    step = scalar(*factor) * 0x1p-20f;
    steps = 0x1p20f / scalar(*factor);
  }
};

}  // namespace fastlm::cpu::FASTLM_ISA
