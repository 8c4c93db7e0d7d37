// Vectors of the widest registers that this translation unit may use, on the compiler's own vector
// types.
//
// Every kernel file is compiled once per instruction set (setup.py) into the namespace FASTLM_ISA,
// and dispatch.cpp picks one at run time. Two rules follow. Nothing here may be a template or
// inline function of the standard library: the linker would keep one copy for all instruction sets.
// And nothing here throws.
//
// A kernel's body is written once over a Span: Full for whole vectors, Part for the tail of a row.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FASTLM_INLINE inline __attribute__((always_inline))

namespace fastlm::cpu::FASTLM_ISA {

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif

struct bf16 {
  uint16_t bits;
};

template <class T> struct Acc {
  using type = float;
};
template <> struct Acc<double> {
  using type = double;
};
template <class T> using acc_t = typename Acc<T>::type;  // what a T is computed in

template <class A> struct VecOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A> using Vec = typename VecOf<A>::type;
template <class A> constexpr int64_t kLanes = kVectorBytes / int64_t(sizeof(A));

template <class A> struct BitsOf {
  using type = int32_t;
};
template <> struct BitsOf<double> {
  using type = int64_t;
};
template <class A> using bits_t = typename BitsOf<A>::type;
typedef uint16_t Half16
    __attribute__((vector_size(kVectorBytes / 2)));  // as many 16-bit as 32-bit lanes

template <class To, class From> FASTLM_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

FASTLM_INLINE constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FASTLM_INLINE constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
FASTLM_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class A> FASTLM_INLINE Vec<A> all(A value) { return value - Vec<A>{}; }

// ---- conversions ----

// By name: GCC 12 converts 16-bit lanes in two to four times as many instructions.
FASTLM_INLINE Vec<uint32_t> to_32_bits(Half16 half) {
#if defined(__AVX512F__)
  return bit_cast<Vec<uint32_t>>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(half)));
#elif defined(__AVX2__)
  return bit_cast<Vec<uint32_t>>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(half)));
#else
  return __builtin_convertvector(half, Vec<uint32_t>);
#endif
}
// Of lanes below 2^16.
FASTLM_INLINE Half16 to_16_bits(Vec<uint32_t> lanes) {
#if defined(__AVX512F__)
  return bit_cast<Half16>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(lanes)));
#elif defined(__AVX2__)
  const __m256i both = bit_cast<__m256i>(lanes);
  return bit_cast<Half16>(
      _mm_packus_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1)));
#else
  return __builtin_convertvector(lanes, Half16);
#endif
}
FASTLM_INLINE Vec<float> widen(Half16 half) { return bit_cast<Vec<float>>(to_32_bits(half) << 16); }
// Round to nearest even; a NaN stays one.
FASTLM_INLINE Half16 narrow(Vec<float> wide) {
#if defined(__AVX512BF16__)
  return bit_cast<Half16>(_mm512_cvtneps_pbh(bit_cast<__m512>(wide)));
#endif
  const Vec<uint32_t> bits = bit_cast<Vec<uint32_t>>(wide);
  const Vec<uint32_t> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return to_16_bits(wide == wide ? rounded : (bits >> 16) | 0x40u);
}
FASTLM_INLINE float scalar(float x) { return x; }
FASTLM_INLINE double scalar(double x) { return x; }
FASTLM_INLINE float scalar(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
FASTLM_INLINE void put(float* p, float x) { *p = x; }
FASTLM_INLINE void put(double* p, double x) { *p = x; }
FASTLM_INLINE void put(bf16* p, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  p->bits = x == x ? uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)
                   : uint16_t((bits >> 16) | 0x40u);
}

// ---- loads and stores ----

struct Full {};
struct Part {
  int64_t count;
};  // 0 < count < lanes
template <class A> FASTLM_INLINE int64_t live_lanes(Full) { return kLanes<A>; }
template <class A> FASTLM_INLINE int64_t live_lanes(Part part) { return part.count; }

FASTLM_INLINE Vec<float> load(const float* p, Full = {}) {
  Vec<float> v;
  memcpy(&v, p, sizeof v);
  return v;
}
FASTLM_INLINE Vec<double> load(const double* p, Full = {}) {
  Vec<double> v;
  memcpy(&v, p, sizeof v);
  return v;
}
FASTLM_INLINE Vec<float> load(const bf16* p, Full = {}) {
  Half16 h;
  memcpy(&h, p, sizeof h);
  return widen(h);
}
FASTLM_INLINE void store(float* p, Vec<float> v, Full = {}) { memcpy(p, &v, sizeof v); }
FASTLM_INLINE void store(double* p, Vec<double> v, Full = {}) { memcpy(p, &v, sizeof v); }
FASTLM_INLINE void store(bf16* p, Vec<float> v, Full = {}) {
  const Half16 h = narrow(v);
  memcpy(p, &h, sizeof h);
}

// Lanes past the end read as zero.
FASTLM_INLINE Vec<float> load(const float* p, Part part) {
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(_mm512_maskz_loadu_ps(__mmask16((1u << part.count) - 1), p));
#else
  Vec<float> v{};
  memcpy(&v, p, size_t(part.count) * sizeof *p);
  return v;
#endif
}
FASTLM_INLINE Vec<double> load(const double* p, Part part) {
  Vec<double> v{};
  memcpy(&v, p, size_t(part.count) * sizeof *p);
  return v;
}
FASTLM_INLINE Vec<float> load(const bf16* p, Part part) {
  Half16 h{};
  memcpy(&h, p, size_t(part.count) * sizeof *p);
  return widen(h);
}
FASTLM_INLINE void store(float* p, Vec<float> v, Part part) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, __mmask16((1u << part.count) - 1), bit_cast<__m512>(v));
#else
  memcpy(p, &v, size_t(part.count) * sizeof *p);
#endif
}
FASTLM_INLINE void store(double* p, Vec<double> v, Part part) {
  memcpy(p, &v, size_t(part.count) * sizeof *p);
}
FASTLM_INLINE void store(bf16* p, Vec<float> v, Part part) {
  const Half16 h = narrow(v);
  memcpy(p, &h, size_t(part.count) * sizeof *p);
}

// Asks for what a streaming loop reads a few hundred cycles from now: the processor's own
// prefetchers stop at every 4 KB page, and start late where a pass over memory alternates with
// passes over what it brought. Past the end of an array it does nothing.
constexpr int64_t kAheadBytes = 4096;
template <class T> FASTLM_INLINE void prefetch(const T* p, int64_t bytes_ahead = kAheadBytes) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + bytes_ahead);
}

// body(index, Span) over [0, n).
template <class A, class Body> FASTLM_INLINE void sweep(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) body(i, Full{});
  if (i < n) body(i, Part{n - i});
}

// sweep for sums: body(index, Span, way) with way in 0 .. kWays - 1, so that kWays accumulators
// hide the latency of an addition.
constexpr int kWays = 4;
template <int kWay> struct Way {
  static constexpr int index = kWay;
};
template <class A, class Body> FASTLM_INLINE void sweep_ways(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kWays * kLanes<A> <= n; i += kWays * kLanes<A>) {
    body(i, Full{}, Way<0>{});
    body(i + kLanes<A>, Full{}, Way<1>{});
    body(i + 2 * kLanes<A>, Full{}, Way<2>{});
    body(i + 3 * kLanes<A>, Full{}, Way<3>{});
  }
  sweep<A>(n - i, [&](int64_t j, auto span)
                      __attribute__((always_inline)) { body(i + j, span, Way<0>{}); });
}

// Only the live lanes of v, zero elsewhere: for sums over a tail.
template <class A> FASTLM_INLINE Vec<A> live(Vec<A> v, Full) { return v; }
template <class A> FASTLM_INLINE Vec<A> live(Vec<A> v, Part part, A dead = 0) {
  for (int64_t i = part.count; i < kLanes<A>; ++i) v[i] = dead;
  return v;
}

// ---- streaming: stores past the caches, for results larger than they are ----

// Below this a result is wanted in the cache by whoever comes next; above it, it would only evict.
constexpr int64_t kStreamBytes = 16 << 20;

// 64 aligned bytes at once where the registers allow: halves of a line reach memory at a third of
// the speed.
FASTLM_INLINE void stream_line(void* p, const void* bytes) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(p), _mm512_loadu_si512(bytes));
#elif defined(__AVX2__)
  for (int i = 0; i < 2; ++i)
    _mm256_stream_si256(static_cast<__m256i*>(p) + i,
                        _mm256_loadu_si256(static_cast<const __m256i*>(bytes) + i));
#elif defined(__x86_64__)
  for (int i = 0; i < 4; ++i)
    _mm_stream_si128(static_cast<__m128i*>(p) + i,
                     _mm_loadu_si128(static_cast<const __m128i*>(bytes) + i));
#else
  memcpy(p, bytes, 64);
#endif
}
FASTLM_INLINE void end_of_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// out[i] = body(i, Span) over [0, n), in order, through the caches or past them.
template <bool kStream, class T, class Body>
FASTLM_INLINE void write_row(T* out, int64_t n, const Body& body) {
  using A = acc_t<T>;
  constexpr int64_t kLine = 64 / int64_t(sizeof(T)), kLane = kLanes<A>;
  int64_t i = 0;
  if constexpr (kStream) {
    const int64_t past = int64_t(reinterpret_cast<uintptr_t>(out) % 64) / int64_t(sizeof(T));
    const int64_t head = past ? least(kLine - past, n) : 0;
    for (; i + kLane <= head; i += kLane) store(out + i, body(i, Full{}));
    if (i < head) store(out + i, body(i, Part{head - i}), Part{head - i});
    for (i = head; i + kLine <= n; i += kLine) {
#if defined(__AVX512F__)
      if constexpr (sizeof(T) < sizeof(A)) {
        // In registers: halves that were just stored are not forwarded to the load of a line.
        const __m256i low = bit_cast<__m256i>(narrow(body(i, Full{})));
        const __m256i high = bit_cast<__m256i>(narrow(body(i + kLane, Full{})));
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i),
                            _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
        continue;
      }
#endif
      T line[kLine];
#pragma GCC unroll 8
      for (int64_t j = 0; j < kLine; j += kLane) store(line + j, body(i + j, Full{}));
      stream_line(out + i, line);
    }
  }
  for (; i + kLane <= n; i += kLane) store(out + i, body(i, Full{}));
  if (i < n) store(out + i, body(i, Part{n - i}), Part{n - i});
}

// ---- arithmetic ----

// v, in a register: what is computed from it is not fused with how it was. Where a formula is
// inlined in two places that must agree to the bit, the compiler would otherwise fuse them
// differently.
template <class V> FASTLM_INLINE V rounded(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

FASTLM_INLINE Vec<float> max(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(_mm512_max_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(__AVX2__)
  return bit_cast<Vec<float>>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}
FASTLM_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return a > b ? a : b; }
FASTLM_INLINE Vec<float> sqrt(Vec<float> v) {
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(_mm512_sqrt_ps(bit_cast<__m512>(v)));
#elif defined(__AVX2__)
  return bit_cast<Vec<float>>(_mm256_sqrt_ps(bit_cast<__m256>(v)));
#elif defined(__x86_64__)
  return bit_cast<Vec<float>>(_mm_sqrt_ps(bit_cast<__m128>(v)));
#else
  for (int64_t i = 0; i < kLanes<float>; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}
// To the nearest whole number, of lanes from 0 to 2^24; any number for a NaN.
FASTLM_INLINE Vec<uint32_t> nearest_whole(Vec<float> v) {
#if defined(__AVX512F__)
  return bit_cast<Vec<uint32_t>>(_mm512_cvtps_epi32(bit_cast<__m512>(v)));
#elif defined(__AVX2__)
  return bit_cast<Vec<uint32_t>>(_mm256_cvtps_epi32(bit_cast<__m256>(v)));
#elif defined(__x86_64__)
  return bit_cast<Vec<uint32_t>>(_mm_cvtps_epi32(bit_cast<__m128>(v)));
#else
  Vec<uint32_t> whole{};
  for (int64_t i = 0; i < kLanes<float>; ++i)
    whole[i] = v[i] == v[i] ? uint32_t(__builtin_rintf(v[i])) : 0;
  return whole;
#endif
}
// Of lanes below 2^31.
FASTLM_INLINE Vec<float> to_float(Vec<uint32_t> v) {
  return __builtin_convertvector(bit_cast<Vec<int32_t>>(v), Vec<float>);
}

// All lanes by combine(half of them, the other half), again and again; kBytes: of v.
template <class A, int64_t kBytes, class V, class Combine>
FASTLM_INLINE A reduce(V v, const Combine& combine) {
  if constexpr (kBytes == 2 * int64_t(sizeof(A))) {
    return combine(v[0], v[1]);
  } else {
    typedef A Half __attribute__((vector_size(kBytes / 2)));
    struct Halves {
      Half low, high;
    } halves;
#if defined(__AVX512F__)
    if constexpr (kBytes ==
                  64) {  // by name: GCC 12 keeps what it splits in memory, loops before too
      const __m512d bits = bit_cast<__m512d>(v);
      halves = {bit_cast<Half>(_mm512_castpd512_pd256(bits)),
                bit_cast<Half>(_mm512_extractf64x4_pd(bits, 1))};
    } else
#endif
      halves = bit_cast<Halves>(v);
    return reduce<A, kBytes / 2>(combine(halves.low, halves.high), combine);
  }
}
template <class A> FASTLM_INLINE A sum(Vec<A> v) {
  return reduce<A, kVectorBytes>(
      v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}
template <class A> FASTLM_INLINE A sum(const Vec<A> (&ways)[kWays]) {
  return sum<A>((ways[0] + ways[1]) + (ways[2] + ways[3]));
}
template <class A> FASTLM_INLINE A largest(Vec<A> v) {
  return reduce<A, kVectorBytes>(
      v, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}

// ---- shuffles ----

template <class V> struct Pair {
  V low, high;
};

// (a0 b0 a1 b1 ..., the rest)
template <class A> FASTLM_INLINE Pair<Vec<A>> zip(Vec<A> a, Vec<A> b) {
  Vec<bits_t<A>> low{}, high{};
  for (int i = 0; i < kLanes<A>; ++i) {
    low[i] = i / 2 + (i % 2) * kLanes<A>;
    high[i] = low[i] + kLanes<A> / 2;
  }
  return {__builtin_shuffle(a, b, low), __builtin_shuffle(a, b, high)};
}

}  // namespace fastlm::cpu::FASTLM_ISA
