// A row of exponentials that linear_cross_entropy keeps from forward to backward, in three quarters
// of the memory of its logits: then the weight's gradient has room for a third more rows than there
// are features.
//
// An exponential is relative to a base of its row and tile, the whole number above the largest
// logit so far. So it lies between 0 and 1, and a root of it is kept in a whole number of steps,
// which are finest where probabilities are largest. The size of the logits does not matter.
//
// Of the base a byte is kept, which says how far it is below the row's log-sum-exp.
//
// forward: store() each vector of the row, then end(); backward: open(), then load().
#pragma once

#include "../dtype.h"
#include "simd.h"

namespace fastlm::cpu::FASTLM_ISA {

// The exponentials of a tile, as they lie in memory. float64: themselves. float32: codes of three
// bytes, rows * classes of two, then as many of one. bfloat16: codes of twelve bits, rows * classes
// bytes, then a byte for each two classes of a row; the upper half of an odd class is in `odd`.
struct KeptExponentials {
  void* codes;
  uint8_t* shifts;  // (rows)
  uint8_t* odd;     // (rows)
  int64_t rows, classes;
};

// A base by its distance from the whole number above lse, which it may exceed by 1, and back. Past
// 254, exponentials are 0 in float32.
constexpr uint8_t kFarBelow = 255;
inline uint8_t shift_of(double base, double lse) {
  const double shift = ::ceil(lse) + 1 - base;
  return shift < kFarBelow ? uint8_t(shift > 0 ? shift : 0) : kFarBelow;
}
inline double base_of(uint8_t shift, double lse) {
  return shift == kFarBelow ? -double(INFINITY) : ::ceil(lse) + 1 - double(shift);
}

// The number of rows whose exponentials fit into `bytes`.
template <class T> int64_t rows_that_fit(int64_t bytes, int64_t classes) {
  const int64_t size = classes * int64_t(sizeof(T));
  return bytes / (sizeof(T) == 8 ? size : 3 * size / 4);
}

// float64, which is there for gradcheck: nothing is rounded.
template <class T> struct KeptRow {
  T* exponentials;

  KeptRow(const KeptExponentials& kept, int64_t r, uint16_t*)
      : exponentials(static_cast<T*>(kept.codes) + r * kept.classes) {}
  template <class Span> FASTLM_INLINE void store(int64_t c, Vec<T> e, Span span) const {
    cpu::FASTLM_ISA::store(exponentials + c, e, span);
  }
  void end() const {}
  void open() const {}
  template <class Span> FASTLM_INLINE Vec<T> load(int64_t c, Span span) const {
    return cpu::FASTLM_ISA::load(exponentials + c, span);
  }
};

// The square root in 24 bits: an error of 2^-24 sqrt(e) in an exponential e; 0 below 2^-50.
template <> struct KeptRow<float> {
  // A little below 2^24: a square root may be rounded to more than 1.
  static constexpr float kSteps = 16777208.0f;
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));

  uint16_t* low;
  uint8_t* high;

  KeptRow(const KeptExponentials& kept, int64_t r, uint16_t*)
      : low(static_cast<uint16_t*>(kept.codes) + r * kept.classes),
        high(static_cast<uint8_t*>(kept.codes) + (2 * kept.rows + r) * kept.classes) {}
  template <class Span> FASTLM_INLINE void store(int64_t c, Vec<float> e, Span span) const {
    const Vec<uint32_t> code = nearest_whole(sqrt(e) * kSteps);
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
    const Vec<float> root = to_float(code) * (1.0f / kSteps);
    return root * root;
  }
};

// The fourth root in 12 bits: an error of 2^-11 e^(3/4) in an exponential e, for the largest a
// third of what bfloat16 rounds a gradient by; 0 below 2^-52. `codes` holds a row of them, 16 bits
// each.
template <> struct KeptRow<bf16> {
  static constexpr float kSteps = 4095.0f;

  uint8_t* low;   // the lower eight bits of each
  uint8_t* high;  // the upper four of the first half of the classes and of the second, in pairs
  uint8_t* odd;   // and of the middle class, where their number is odd
  int64_t first, second;  // the number of classes in each half
  uint16_t* codes;

  KeptRow(const KeptExponentials& kept, int64_t r, uint16_t* codes)
      : first(ceil_div(kept.classes, 2)), second(kept.classes / 2), codes(codes) {
    low = static_cast<uint8_t*>(kept.codes) + r * kept.classes;
    high = static_cast<uint8_t*>(kept.codes) + kept.rows * kept.classes + r * second;
    odd = kept.odd + r;
  }
  template <class Span> FASTLM_INLINE void store(int64_t c, Vec<float> e, Span span) const {
    // & 0xfff: a NaN has any code; the row's gradient is NaN because its lse is.
    const Half16 code = to_16_bits(nearest_whole(sqrt(sqrt(e)) * kSteps) & 0xfffu);
    memcpy(codes + c, &code, size_t(live_lanes<float>(span)) * 2);
  }
  void end() const {
    pack(codes, low, high, first, second);
    if (first > second) *odd = uint8_t(codes[second] >> 8);
  }
  void open() const {
    unpack(codes, low, high, first, second);
    if (first > second) codes[second] = uint16_t(low[second] | *odd << 8);
  }
  template <class Span> FASTLM_INLINE Vec<float> load(int64_t c, Span span) const {
    Half16 code{};
    memcpy(&code, codes + c, size_t(live_lanes<float>(span)) * 2);
    const Vec<float> root = to_float(to_32_bits(code)) * (1.0f / kSteps);
    return (root * root) * (root * root);
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
};

}  // namespace fastlm::cpu::FASTLM_ISA
