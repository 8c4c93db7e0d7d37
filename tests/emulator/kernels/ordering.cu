// Threads and blocks that hand data to each other: locks, flags, counters and barriers of the grid,
// each right once and wrong in every way that people get them wrong.
#include <cooperative_groups.h>
#include <cuda/atomic>

enum Mistake {
  kNone,
  kNoFenceBeforeRelease,
  kNoFenceAfterAcquire,
  kFencesOfBlock,
  kPlainRelease,
  kNoAtomic
};

// Every block adds to *sum while it holds the lock.
template <Mistake kMistake> __device__ void locked_sum(int* lock, float* sum) {
  if (threadIdx.x != 0) return;
  const auto fence = [] { kMistake == kFencesOfBlock ? __threadfence_block() : __threadfence(); };
  if (kMistake == kNoAtomic) {
    while (*(volatile int*)lock != 0) {}
    *(volatile int*)lock = 1;
  } else {
    while (atomicCAS(lock, 0, 1) != 0) {}
  }
  if (kMistake != kNoFenceAfterAcquire) fence();
  *sum += 1;
  if (kMistake != kNoFenceBeforeRelease) fence();
  if (kMistake == kPlainRelease)
    *lock = 0;
  else if (kMistake == kNoAtomic)
    *(volatile int*)lock = 0;
  else
    atomicExch(lock, 0);
}
extern "C" __global__ void lock(int* l, float* sum) { locked_sum<kNone>(l, sum); }
extern "C" __global__ void lock_without_release_fence(int* l, float* sum) {
  locked_sum<kNoFenceBeforeRelease>(l, sum);
}
extern "C" __global__ void lock_without_acquire_fence(int* l, float* sum) {
  locked_sum<kNoFenceAfterAcquire>(l, sum);
}
extern "C" __global__ void lock_with_fences_of_block(int* l, float* sum) {
  locked_sum<kFencesOfBlock>(l, sum);
}
extern "C" __global__ void lock_with_plain_release(int* l, float* sum) {
  locked_sum<kPlainRelease>(l, sum);
}
extern "C" __global__ void lock_without_atomic(int* l, float* sum) {
  locked_sum<kNoAtomic>(l, sum);
}
extern "C" __global__ void lock_of_libcudacxx(int* l, float* sum) {
  if (threadIdx.x != 0) return;
  cuda::atomic_ref<int, cuda::thread_scope_device> flag(*l);
  while (flag.exchange(1, cuda::memory_order_acquire)) {}
  *sum += 1;
  flag.store(0, cuda::memory_order_release);
}
extern "C" __global__ void lock_of_libcudacxx_relaxed(int* l, float* sum) {
  if (threadIdx.x != 0) return;
  cuda::atomic_ref<int, cuda::thread_scope_device> flag(*l);
  while (flag.exchange(1, cuda::memory_order_acquire)) {}
  *sum += 1;
  flag.store(0, cuda::memory_order_relaxed);
}
extern "C" __global__ void lock_of_one_block_scope(int* l, float* sum) {
  if (threadIdx.x != 0) return;
  cuda::atomic_ref<int, cuda::thread_scope_block> flag(*l);
  while (flag.exchange(1, cuda::memory_order_acquire)) {}
  *sum += 1;
  flag.store(0, cuda::memory_order_release);
}
extern "C" __global__ void lock_released_by_volatile_store(int* l, float* sum) {
  if (threadIdx.x != 0) return;
  while (atomicCAS(l, 0, 1) != 0) {}
  __threadfence();
  *sum += 1;
  __threadfence();
  *(volatile int*)l = 0;
}

// Each block writes its own place and reads its neighbour's, twice.
template <bool kSync> __device__ void neighbours(float* a, float* y) {
  for (int turn = 0; turn < 2; ++turn) {
    if (threadIdx.x == 0) a[blockIdx.x] = float(blockIdx.x + turn);
    if (kSync) cooperative_groups::this_grid().sync();
    if (threadIdx.x == 1) y[blockIdx.x] = a[(blockIdx.x + 1) % gridDim.x];
    if (kSync) cooperative_groups::this_grid().sync();
  }
}
extern "C" __global__ void grid_sync(float* a, float* y) { neighbours<true>(a, y); }
extern "C" __global__ void grid_sync_left_out(float* a, float* y) { neighbours<false>(a, y); }

// Block 0 hands data to block 1, and block 1 to block 2.
template <bool kFence, bool kPlain> __device__ void relay(int* flag, float* data) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x > 0)
    while (*(volatile int*)flag != int(blockIdx.x)) {}
  if (kFence) __threadfence();
  *data += 1;
  if (kFence) __threadfence();
  if (kPlain)
    *flag = int(blockIdx.x) + 1;
  else
    *(volatile int*)flag = int(blockIdx.x) + 1;
}
extern "C" __global__ void relay_fenced(int* flag, float* data) { relay<true, false>(flag, data); }
extern "C" __global__ void relay_unfenced(int* flag, float* data) {
  relay<false, false>(flag, data);
}
extern "C" __global__ void relay_by_plain_stores(int* flag, float* data) {
  relay<true, true>(flag, data);
}

// volatile data needs the fence between it and the flag, whatever fence came before it.
template <bool kFence> __device__ void volatile_relay(volatile int* flag, volatile float* data) {
  if (threadIdx.x != 0) return;
  while (*flag != int(blockIdx.x)) {}
  __threadfence();
  *data += 1;
  if (kFence) __threadfence();
  *flag = int(blockIdx.x) + 1;
}
extern "C" __global__ void volatile_data_fenced(int* flag, float* data) {
  volatile_relay<true>(flag, data);
}
extern "C" __global__ void volatile_data_unfenced(int* flag, float* data) {
  volatile_relay<false>(flag, data);
}
// One fence is enough for the flags that a loop sets.
extern "C" __global__ void many_flags(volatile int* flags, float* data, float* y) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    *data = 1;
    __threadfence();
#pragma unroll 1
    for (unsigned i = 1; i < gridDim.x; ++i) flags[i] = 1;
  } else {
    __threadfence_block();  // of no use, and no harm
    while (flags[blockIdx.x] == 0) {}
    __threadfence();
    y[blockIdx.x] = *data;
  }
}

// The last block to finish sums what all blocks wrote. All threads fence, and one of them counts.
template <bool kRelease, bool kAcquire>
__device__ void last_block_sums(int* count, float* partial, float* sum) {
  __shared__ bool is_last;
  partial[blockIdx.x * blockDim.x + threadIdx.x] = 1;
  if (kRelease) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(count, 1) == int(gridDim.x) - 1;
  __syncthreads();
  if (!is_last) return;
  if (kAcquire) __threadfence();
  float total = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x * blockDim.x; i += blockDim.x) total += partial[i];
  sum[threadIdx.x] = total;
}
extern "C" __global__ void last_block(int* count, float* partial, float* sum) {
  last_block_sums<true, true>(count, partial, sum);
}
extern "C" __global__ void last_block_unreleased(int* count, float* partial, float* sum) {
  last_block_sums<false, true>(count, partial, sum);
}
extern "C" __global__ void last_block_unacquired(int* count, float* partial, float* sum) {
  last_block_sums<true, false>(count, partial, sum);
}

// red returns nothing, so what follows it is not ordered after what it counted.
extern "C" __global__ void acquired_by_reduction(int* flag, float* data) {
  if (threadIdx.x != 0 || blockIdx.x == 0) return;
  if (blockIdx.x == 1) {
    *data = 1;
    __threadfence();
    atomicExch(flag, 1);
  } else {
    asm volatile("red.relaxed.gpu.global.add.s32 [%0], 1;" ::"l"(flag) : "memory");
    __threadfence();
    *data += 1;
  }
}

// Block 1 learns how far the threads of block 0 are. That says nothing of its own threads.
extern "C" __global__ void own_race_after_news(int* flag, float* y) {
  __shared__ float s[64];
  if (blockIdx.x == 0) {
    for (int i = 0; i < 8; ++i) __syncthreads();
    __threadfence();
    if (threadIdx.x == 0) atomicExch(flag, 1);
    return;
  }
  if (threadIdx.x == 0)
    while (atomicAdd(flag, 0) == 0) {}
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0 || threadIdx.x == 63) return;
  s[threadIdx.x] = 1;
  y[threadIdx.x] = s[63 - threadIdx.x];
}

// volatile orders nothing.
extern "C" __global__ void volatile_shared(float* y) {
  __shared__ volatile float s[64];
  s[threadIdx.x] = threadIdx.x;
  y[threadIdx.x] = s[63 - threadIdx.x];
}
extern "C" __global__ void volatile_shared_and_barrier(float* y) {
  __shared__ volatile float s[64];
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = s[63 - threadIdx.x];
}
extern "C" __global__ void volatile_global(volatile float* a, float* y) {
  a[threadIdx.x] = threadIdx.x;
  y[threadIdx.x] = a[63 - threadIdx.x];
}
extern "C" __global__ void volatile_after_an_old_fence(volatile float* a, float* y) {
  __threadfence();
  y[threadIdx.x] = 0;
  a[threadIdx.x] = threadIdx.x;
  y[threadIdx.x] = a[63 - threadIdx.x];
}
extern "C" __global__ void volatile_sum_of_a_warp(float* y) {
  __shared__ volatile float s[64];
  s[threadIdx.x] = s[threadIdx.x + 32] = 1;
  for (int i = 16; i > 0; i /= 2) s[threadIdx.x] += s[threadIdx.x + i];
  y[threadIdx.x] = s[0];
}
extern "C" __global__ void shared_flag(float* y) {
  __shared__ volatile int flag;
  __shared__ float data;
  if (threadIdx.x == 0) flag = 0;
  __syncthreads();
  if (threadIdx.x == 32) {
    data = 5;
    __threadfence_block();
    flag = 1;
  } else if (threadIdx.x == 0) {
    while (flag == 0) {}
    __threadfence_block();
    *y = data;
  }
}

// As CUTLASS has it: blocks in turn, and the last one when all have counted. Where the state space
// stands in an instruction changes nothing.
extern "C" __global__ void turns(int* turn, float* sum) {
  int state = 0;
  if (threadIdx.x == 0) do {
      asm volatile("ld.global.acquire.gpu.b32 %0, [%1];" : "=r"(state) : "l"(turn) : "memory");
    } while (state != int(blockIdx.x));
  __syncthreads();
  if (threadIdx.x == 1) *sum += 1;
  __syncthreads();
  if (threadIdx.x == 0)
    asm volatile("st.global.release.gpu.b32 [%0], %1;" ::"l"(turn), "r"(int(blockIdx.x) + 1)
                 : "memory");
}
extern "C" __global__ void counted(int* count, float* partial, float* sum) {
  partial[blockIdx.x * blockDim.x + threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x == 0)
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(count) : "memory");
  if (blockIdx.x != gridDim.x - 1) return;
  int state = 0;
  if (threadIdx.x == 0) do {
      asm volatile("ld.global.acquire.gpu.b32 %0, [%1];" : "=r"(state) : "l"(count) : "memory");
    } while (state != int(gridDim.x));
  __syncthreads();
  float total = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x * blockDim.x; i += blockDim.x) total += partial[i];
  sum[threadIdx.x] = total;
}
