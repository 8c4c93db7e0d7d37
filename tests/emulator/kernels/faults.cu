// One small kernel for each kind of fault, and its correct sister where the difference is
// instructive.
#include <cuda_runtime.h>
#include <cstdint>

extern "C" __global__ void divergent_barrier(float* p) {
  if (threadIdx.x < 16) __syncthreads();
  p[threadIdx.x] = 1;
}
extern "C" __global__ void barrier_not_reached(float* p) {
  if (threadIdx.x < 32) __syncthreads();
  p[threadIdx.x] = 1;
}
extern "C" __global__ void early_exit(float* p, int n) {
  if (int(threadIdx.x) >= n) return;
  p[threadIdx.x] += __shfl_xor_sync(~0u, p[threadIdx.x], 1);
}
extern "C" __global__ void divergent_shuffle(float* p) {
  float v = p[threadIdx.x];
  if (threadIdx.x < 16) v += __shfl_xor_sync(~0u, v, 1);
  __syncwarp();
  p[threadIdx.x] = v;
}
extern "C" __global__ void misaligned(float* p) {
  const float4 v = *reinterpret_cast<float4*>(p + 1);
  p[0] = v.x + v.w;
}
extern "C" __global__ void uninitialized(float* p) {
  __shared__ float s[64];
  if (threadIdx.x < 32) s[threadIdx.x] = 1;
  __syncthreads();
  p[threadIdx.x] = s[threadIdx.x];
}
template <bool kSync> __device__ void reverse(float* p) {
  __shared__ float s[32];
  s[threadIdx.x] = p[threadIdx.x];
  if (kSync) __syncwarp();
  p[threadIdx.x] = s[31 - threadIdx.x];
}
extern "C" __global__ void lanes_unsynchronized(float* p) { reverse<false>(p); }
extern "C" __global__ void lanes_synchronized(float* p) { reverse<true>(p); }
extern "C" __global__ void dynamic_overrun(float* p, int n) {
  extern __shared__ float d[];
  for (int i = threadIdx.x; i <= n; i += 32) d[i] = 1;
  __syncthreads();
  p[threadIdx.x] = d[threadIdx.x];
}
extern "C" __global__ void static_overrun(float* p, int n) {  // ends in the neighbouring array
  __shared__ float a[8], b[8];
  if (threadIdx.x < 8) a[threadIdx.x] = b[threadIdx.x] = 0;
  __syncthreads();
  if (threadIdx.x < n) a[threadIdx.x] = 2;
  __syncthreads();
  p[threadIdx.x] = a[threadIdx.x % 8] + b[threadIdx.x % 8];
}
extern "C" __global__ void counter_not_atomic(int* c) { ++*c; }
extern "C" __global__ void counter_atomic(int* c) { atomicAdd(c, 1); }
extern "C" __global__ void blocks_write_one_place(float* p) {
  if (threadIdx.x == 0) p[0] = float(blockIdx.x);
}
extern "C" __global__ void never_ends(float* p) {
  volatile float local = 1;
  while (local != 0) local = local + 1;
  p[0] = local;
}
extern "C" __global__ void waits_for_nobody(volatile int* flag) {
  while (*flag == 0) {}
}
__device__ __noinline__ int deeper(int n, int* p) {
  volatile int frame[64];
  frame[n % 64] = n;
  return n < 0 ? 0 : deeper(n + 1, p) + frame[p[0] % 64];
}
extern "C" __global__ void endless_recursion(int* p) { p[0] = deeper(0, p); }
extern "C" __global__ void local_overrun(float* p, int n) {  // an index that no compiler knows
  float a[8];
  for (int i = 0; i < 8; ++i) a[i] = p[i];
  for (int i = 0; i < n; ++i) a[i * 7 % n] += a[i];
  p[0] = a[n - 1];
}
__device__ __noinline__ float sum_of(const float* a, int n) {
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += a[i * 7 % n];
  return sum;
}
extern "C" __global__ void local_overrun_in_a_function(float* p, int n) {
  float a[8];
  for (int i = 0; i < 8; ++i) a[i] = p[i];
  p[0] = sum_of(a, n);
}
extern "C" __global__ void adds_to(float* p, const float* x) { p[threadIdx.x] += x[threadIdx.x]; }
extern "C" __global__ void stores_to(float* p, const float* x) { p[threadIdx.x] = x[threadIdx.x]; }
extern "C" __global__ void counts_in(float* p) { atomicAdd(p, 1.0f); }
extern "C" __global__ void lock_never_released(int* l) {
  while (atomicCAS(l, 0, 1) != 0) {}
}
extern "C" __global__ void wild_pointer(float** p) { *p[0] = 1; }

// A value handed from block 1 to block 0 through a flag: with and without fences.
template <bool kFences> __device__ void hand_over(int* data, volatile int* flag, int* result) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 1) {
    *data = 42;
    if (kFences) __threadfence();
    *flag = 1;
  } else {
    while (*flag == 0) {}
    if (kFences) __threadfence();
    *result = *data;
  }
}
extern "C" __global__ void hand_over_fenced(int* data, int* flag, int* result) {
  hand_over<true>(data, flag, result);
}
extern "C" __global__ void hand_over_unfenced(int* data, int* flag, int* result) {
  hand_over<false>(data, flag, result);
}

// cp.async: with its wait, and without.
template <bool kWait> __device__ void async_copy(float* p) {
  __shared__ float s[32];
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(&s[threadIdx.x]));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(p + threadIdx.x)
               : "memory");
  asm volatile("cp.async.commit_group;" ::: "memory");
  if (kWait) asm volatile("cp.async.wait_group 0;" ::: "memory");
  p[threadIdx.x] = s[threadIdx.x] + 1;
  asm volatile("cp.async.wait_group 0;" ::: "memory");
}
extern "C" __global__ void async_copy_waited(float* p) { async_copy<true>(p); }
extern "C" __global__ void async_copy_not_waited(float* p) { async_copy<false>(p); }
