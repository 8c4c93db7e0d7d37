// Packs: 16 bytes of a row in one access, as floats. What is not a whole aligned pack goes element
// by element.
#pragma once

#include "launch.cuh"

namespace fastlm::cuda {

template <class T> constexpr int kPack = 16 / int(sizeof(T));

__device__ inline float widen(float v) { return v; }
__device__ inline float widen(bf16 v) { return __bfloat162float(v); }
__device__ inline float widen(f16 v) { return __half2float(v); }

template <class T> __device__ T narrow(float v);
template <> __device__ inline float narrow(float v) { return v; }
template <> __device__ inline bf16 narrow(float v) { return __float2bfloat16_rn(v); }
template <> __device__ inline f16 narrow(float v) { return __float2half_rn(v); }

// What v becomes when it is stored.
template <class T> __device__ float rounded(float v) { return widen(narrow<T>(v)); }

template <class T> struct alignas(16) Pack {
  T at[kPack<T>];
};

__host__ __device__ inline bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}
inline bool all_aligned(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers)
    if (!is_aligned(p)) return false;
  return true;
}

// `count` elements from p, and zeros, into as many packs as v has; `vector`: p is a multiple of 16.
template <class T, int kCount>
__device__ void load(const T* p, int64_t count, bool vector, float (&v)[kCount]) {
  static_assert(kCount % kPack<T> == 0);
#pragma unroll
  for (int at = 0; at < kCount; at += kPack<T>) {
    if (vector && count >= at + kPack<T>) {
      const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(p + at);
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) v[at + i] = widen(pack.at[i]);
      continue;
    }
#pragma unroll
    for (int i = at; i < at + kPack<T>; ++i) v[i] = i < count ? widen(p[i]) : 0.0f;
  }
}

template <class T>
__device__ void store(T* p, int64_t count, bool vector, const float (&v)[kPack<T>]) {
  if (vector && count >= kPack<T>) {
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) pack.at[i] = narrow<T>(v[i]);
    *reinterpret_cast<Pack<T>*>(p) = pack;
    return;
  }
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i)
    if (i < count) p[i] = narrow<T>(v[i]);
}

// A pack's columns of a parameter row in T or float32, or `absent` where there is no such row.
template <class T>
__device__ void load_parameter(const void* row, DType dtype, int64_t column, int64_t count,
                               bool vector, float absent, float (&v)[kPack<T>]) {
  if (!row || count <= 0) {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) v[i] = absent;
  } else if (sizeof(T) == 4 || dtype != DType::f32) {
    load(static_cast<const T*>(row) + column, count, vector, v);
  } else {
    load(static_cast<const float*>(row) + column, count, vector, v);
  }
}

}  // namespace fastlm::cuda
