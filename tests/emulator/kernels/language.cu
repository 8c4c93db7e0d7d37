// What CUDA C++ offers around the arithmetic: printf, assert, calls, variables, atomics, grid
// barrier.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cassert>
#include <cstdio>

__device__ int counter;
__device__ int squares[4] = {0, 1, 4, 9};
__constant__ float table[4];
__device__ const char* const names[2] = {"even", "odd"};

extern "C" __global__ void print(int n, float x) {
  printf("n=%d x=%.2f %s %lld %c%%\n", n, x, names[n & 1], 1ll << 40, 'c');
}
extern "C" __global__ void check(int n) { assert(n > 0 && "n must be positive"); }
extern "C" __global__ void variables(float* y) {
  y[threadIdx.x] = table[threadIdx.x] + float(squares[threadIdx.x] + atomicAdd(&counter, 1));
}

struct Pair {
  float low, high;
  int steps;
};
__device__ __noinline__ Pair halve(Pair p, const float* at) {
  return {p.low / 2 + *at, p.high / 2, p.steps + 1};
}
__device__ __noinline__ int factorial(int n) { return n <= 1 ? 1 : n * factorial(n - 1); }
extern "C" __global__ void calls(float* y, Pair p, int n) {
  const Pair half = halve(p, y + 3);
  y[0] = half.low, y[1] = half.high, y[2] = float(half.steps + factorial(n));
}

// A function with shared memory of its own, beside that of the kernel that calls it.
__device__ __noinline__ int neighbour(int value) {
  __shared__ int mine[32];
  mine[threadIdx.x] = value;
  __syncthreads();
  return mine[(threadIdx.x + 1) % 32];
}
extern "C" __global__ void shared_in_a_function(int* y) {
  __shared__ int own[32];
  own[threadIdx.x] = -int(threadIdx.x);
  y[threadIdx.x] = neighbour(threadIdx.x);
  __syncthreads();
  y[threadIdx.x] += 100 * own[31 - threadIdx.x];
}

using Function = float (*)(float);
__device__ float twice(float x) { return 2 * x; }
__device__ float square(float x) { return x * x; }
__device__ Function functions[2] = {twice, square};
extern "C" __global__ void indirect(float* y, int which) { *y = functions[which](*y); }

extern "C" __global__ void half_pairs(const __half2* a, const __half2* b, __half2* y) {
  y[0] = __hadd2(*a, *b), y[1] = __hmul2(*a, *b), y[2] = __hfma2(*a, *b, *a),
  y[3] = __hmax2(*a, *b);
  y[4] = __hsub2(*a, *b), y[5] = __hneg2(*a), y[6] = __hmin2(*a, *b), y[7] = __hgt2(*a, *b);
}
extern "C" __global__ void bfloat_pairs(const __nv_bfloat162* a, const __nv_bfloat162* b,
                                        __nv_bfloat162* y) {
  y[0] = __hadd2(*a, *b), y[1] = __hmul2(*a, *b), y[2] = __hfma2(*a, *b, *a),
  y[3] = __hmax2(*a, *b);
  y[4] = __hsub2(*a, *b), y[5] = __hneg2(*a), y[6] = __hmin2(*a, *b), y[7] = __hgt2(*a, *b);
}

extern "C" __global__ void atomics(int* i, unsigned* u, float* f, double* d, __half2* h) {
  atomicAdd(i, 2), atomicSub(i + 1, 2), atomicMin(i + 2, int(threadIdx.x) - 5),
      atomicMax(i + 3, int(threadIdx.x));
  atomicAnd(i + 4, ~(1 << threadIdx.x)), atomicOr(i + 5, 1 << threadIdx.x),
      atomicXor(i + 6, 1 << threadIdx.x);
  atomicInc(u, 9), atomicDec(u + 1, 9), atomicExch(i + 7, 77),
      atomicCAS(u + 2, threadIdx.x, threadIdx.x + 1);
  atomicAdd(f, 0.5f), atomicAdd(d, 0.25), atomicAdd(h, __floats2half2_rn(1, 2));
  atomicAdd_block(i + 8, 1), atomicAdd_system(i + 9, 1);
}
extern "C" __global__ void shared_atomics(int* y) {
  __shared__ int bins[4];
  if (threadIdx.x < 4) bins[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(&bins[threadIdx.x % 4], int(threadIdx.x));
  __syncthreads();
  if (threadIdx.x < 4) y[threadIdx.x] = bins[threadIdx.x];
}

// Each block writes its place, all wait, each reads its neighbour's: wrong unless all are resident.
extern "C" __global__ void grid_barrier(unsigned* arrived, int* places, int* y) {
  if (threadIdx.x == 0) places[blockIdx.x] = int(blockIdx.x) * 10;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1);
    while (*reinterpret_cast<volatile unsigned*>(arrived) < gridDim.x) {}
    __threadfence();
  }
  __syncthreads();
  if (threadIdx.x == 0) y[blockIdx.x] = places[(blockIdx.x + 1) % gridDim.x];
}

extern "C" __global__ void cooperative(int* places, int* y) {
  const auto grid = cooperative_groups::this_grid();
  if (threadIdx.x == 0) places[blockIdx.x] = int(blockIdx.x) * 10;
  grid.sync();
  if (threadIdx.x == 0) y[blockIdx.x] = places[(blockIdx.x + 1) % gridDim.x];
}

extern "C" __global__ void wait_for_time(int* y) {
  const long long start = clock64();
  while (clock64() < start + 1000) y[0] = 1;
}

extern "C" __global__ void votes(int* y) {
  const int lane = threadIdx.x;
  const unsigned odd = __ballot_sync(~0u, lane % 2);
  const int total = __reduce_add_sync(~0u, lane), most = __reduce_max_sync(~0u, lane - 40);
  const int same = __popc(__match_any_sync(~0u, lane / 8));
  const int block = __syncthreads_count(lane < 5) + 100 * __syncthreads_and(lane >= 0) +
                    1000 * __syncthreads_or(lane == 7);
  if (lane == 0)
    y[0] = int(odd), y[1] = total, y[2] = most, y[3] = same, y[4] = block, y[5] = __any_sync(1, 0),
    y[6] = __all_sync(1, 1);
}

// Bank conflicts and coalescing, for the counters.
extern "C" __global__ void copy_rows(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }
extern "C" __global__ void copy_columns(const float* x, float* y) {
  y[threadIdx.x * 32] = x[threadIdx.x * 32];
}
template <int kStride> __device__ void matrix_rows(unsigned* y) {
  __shared__ __align__(16) unsigned s[8 * kStride];
  for (int i = threadIdx.x; i < 8 * kStride; i += 32) s[i] = i;
  __syncwarp();
  unsigned r[4], at = unsigned(__cvta_generic_to_shared(s + threadIdx.x % 8 * kStride));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
  y[threadIdx.x] = r[0] + r[1] + r[2] + r[3];
}
extern "C" __global__ void matrix_no_conflicts(unsigned* y) {
  matrix_rows<36>(y);
}  // 144 bytes a row
extern "C" __global__ void matrix_conflicts(unsigned* y) {
  matrix_rows<32>(y);
}  // 128: one bank group
