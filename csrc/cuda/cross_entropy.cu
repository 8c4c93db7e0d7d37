// cross_entropy, forward and backward, one block per row.
//
// Forward reads the logits once: while the sum of exponentials is built, as many of the row's packs
// as fit stay in shared memory (all of GPT-2's 50257 in bfloat16), and the gradient is written from
// there; what does not fit is read again, from L2. 2 * rows * classes elements of traffic with the
// gradient, 1 without.
// Backward reads the logits and writes the gradient, with the saved lse.
//
// A row of 50257 classes starts at any multiple of 2 bytes: up to 7 elements at its head and tail
// go one by one, what lies between in 16-byte packs. Where logits and gradient do not stand at the
// same offset from a multiple of 16, all go one by one. Thread t owns the packs t, t + threads, ...
// through all sweeps, so shared memory needs no barrier, and the gradient may overwrite the logits.
//
// lse is a sum of two floats (base, log_total): differences with large logits are exact then.
// A target outside [0, classes) that is not ignore_index gives a loss and a gradient row of NaN; to
// raise, the host would have to wait for the device.
#include "../cross_entropy.h"

#include "reduce.cuh"

namespace fastlm::cuda {
namespace {

constexpr int kThreads = 512;
constexpr float kLog2e = 1.4426950408889634f;

struct LogSum {
  float base, log_total;
  double lse;
};

// What one row's sweeps share.
template <class T> struct Row {
  const T* logits;
  const float* weight;  // or null
  float softcap;        // 0: none
  int64_t classes, head, packs, held;
  Pack<T>* kept;  // in shared memory: packs 0 to held - 1, once a first sweep has passed

  __device__ Row(const T* logits, const T* dlogits, const void* weight,
                 const CrossEntropyOptions& options, int64_t classes, int64_t room, Pack<T>* kept)
      : logits(logits),
        weight(static_cast<const float*>(weight)),
        softcap(float(options.softcap)),
        classes(classes),
        kept(kept) {
    const auto at = reinterpret_cast<uintptr_t>(logits);
    const bool together = !dlogits || (at - reinterpret_cast<uintptr_t>(dlogits)) % 16 == 0;
    const int64_t to_boundary = int64_t((16 - at % 16) % 16 / sizeof(T));
    head = together && to_boundary < classes ? to_boundary : classes;
    packs = (classes - head) / kPack<T>;
    held = packs < room ? packs : room;
  }

  __device__ float capped(float raw) const {
    return softcap > 0 ? softcap * tanhf(raw / softcap) : raw;
  }
  __device__ float weight_at(int64_t c) const { return weight ? weight[c] : 1.0f; }

  // f(class, raw logit) of every class of this thread; f returns the gradient where out is given.
  template <bool kFirst, class F> __device__ void sweep(T* out, const F& f) const {
    const int64_t body_end = head + packs * kPack<T>;
    for (int64_t i = threadIdx.x; i < classes - packs * kPack<T>; i += kThreads) {
      const int64_t c = i < head ? i : body_end + i - head;
      const float value = f(c, widen(logits[c]));
      if (out) out[c] = narrow<T>(value);
    }
    for (int64_t i = threadIdx.x; i < packs; i += kThreads) {
      const int64_t c = head + i * kPack<T>;
      const bool from_shared = !kFirst && i < held;
      Pack<T> pack = from_shared ? kept[i] : *reinterpret_cast<const Pack<T>*>(logits + c);
      if (kFirst && i < held) kept[i] = pack;
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) {
        const float value = f(c + j, widen(pack.at[j]));
        if (out) pack.at[j] = narrow<T>(value);
      }
      if (out) *reinterpret_cast<Pack<T>*>(out + c) = pack;
    }
  }
};

__device__ float block_max(float v) {
  __shared__ float of_warp[kThreads / 32];
  v = warp_max(v);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = v;
  __syncthreads();
  for (int w = 0; w < kThreads / 32; ++w) v = fmaxf(v, of_warp[w]);
  __syncthreads();
  return v;
}

__device__ float block_sum(float v) {
  float one[1] = {v};
  row_sum(one);
  return one[0];
}

// exp(z - base), and 0 for -inf whatever the base.
__device__ float relative_exp(float z, float base) { return exp2f((z - base) * kLog2e); }

// Online softmax: a thread's sum is relative to its own maximum so far.
template <class T> __device__ LogSum log_sum_exp(const Row<T>& row) {
  float peak = -INFINITY, total = 0;
  row.template sweep<true>(nullptr, [&](int64_t, float raw) {
    const float z = row.capped(raw);
    if (z > peak) {
      total *= relative_exp(peak, z);
      peak = z;
    }
    if (z != -INFINITY) total += relative_exp(z, peak);  // a NaN is added
    return 0.0f;
  });
  const float highest = block_max(peak);
  const float base = highest > -INFINITY ? highest : 0.0f;
  total = block_sum(total != 0 ? total * relative_exp(peak, base) : 0.0f);
  const double log_total = log(double(total));
  return {base, float(log_total), double(base) + log_total};
}

// Sums over classes of w_c and of w_c (base - z_c), for label smoothing.
template <class T> __device__ void smoothing_sums(const Row<T>& row, float base, float (&sums)[2]) {
  sums[0] = sums[1] = 0;
  row.template sweep<false>(nullptr, [&](int64_t c, float raw) {
    const float w = row.weight_at(c);
    sums[0] += w;
    sums[1] += w * (base - row.capped(raw));
    return 0.0f;
  });
  row_sum(sums);
}

// The gradient of one row: softmax * slope - each * w_c - [c = target] * hard, times dloss and the
// softcap's derivative.
struct Gradient {
  LogSum lse;
  int64_t target;
  float slope, each, hard;

  template <class T> __device__ void write(const Row<T>& row, T* out) const {
    row.template sweep<false>(out, [&](int64_t c, float raw) {
      const float z = row.capped(raw);
      float g = exp2f(((z - lse.base) - lse.log_total) * kLog2e) * slope;
      if (each != 0) g -= each * row.weight_at(c);
      if (c == target) g -= hard;
      if (row.softcap > 0) g *= 1.0f - (z / row.softcap) * (z / row.softcap);
      return g;
    });
  }
};

template <class T>
__device__ Gradient gradient_of(const Row<T>& row, LogSum lse, int64_t target,
                                const CrossEntropyOptions& o, float weight_total, float dloss) {
  const float each = float(o.label_smoothing) / float(row.classes);
  const float hard = float(1.0 - o.label_smoothing) * row.weight_at(target);
  const float slope =
      hard + each * weight_total + 2.0f * float(o.lse_square_scale) * (lse.base + lse.log_total);
  return {lse, target, dloss * slope, dloss * each, dloss * hard};
}

template <class T> __device__ void fill(const Row<T>& row, T* out, float value) {
  row.template sweep<true>(out, [&](int64_t, float) { return value; });
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_forward_kernel(const CrossEntropyForward p, const int64_t room) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int64_t r = blockIdx.x, target = p.target[r];
  T* const out = p.dlogits ? static_cast<T*>(p.dlogits) + r * p.classes : nullptr;
  const Row<T> row(static_cast<const T*>(p.logits) + r * p.classes, out, p.weight, p.options,
                   p.classes, room, reinterpret_cast<Pack<T>*>(shared));
  const bool ignored = target == p.options.ignore_index;
  const bool known = target >= 0 && target < p.classes;
  // Read before anything is written: an in-place gradient overwrites it.
  const float at_target = known && !ignored ? row.capped(widen(row.logits[target])) : 0.0f;
  const LogSum lse = log_sum_exp(row);
  float sums[2] = {float(p.classes), 0.0f};
  if (p.options.label_smoothing > 0) smoothing_sums(row, lse.base, sums);
  const float sum = lse.base + lse.log_total;
  if (threadIdx.x == 0) {
    static_cast<double*>(p.lse)[r] = lse.lse;
    float loss = 0;
    if (!ignored && known) {
      const float smooth = float(p.options.label_smoothing) / float(p.classes);
      loss = float(1.0 - p.options.label_smoothing) * row.weight_at(target) *
             ((lse.base - at_target) + lse.log_total);
      loss += float(p.options.lse_square_scale) * sum * sum;
      if (smooth > 0) loss += smooth * (sums[0] * lse.log_total + sums[1]);
    }
    static_cast<float*>(p.loss)[r] = ignored || known ? loss : NAN;
  }
  if (!out) return;
  if (ignored || !known) return fill(row, out, ignored ? 0.0f : NAN);
  gradient_of(row, lse, target, p.options, sums[0], float(p.dloss)).write(row, out);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_backward_kernel(const CrossEntropyBackward p) {
  const int64_t r = blockIdx.x, target = p.target[r];
  T* const out = static_cast<T*>(p.dlogits) + r * p.classes;
  const Row<T> row(static_cast<const T*>(p.logits) + r * p.classes, out, p.weight, p.options,
                   p.classes, 0, nullptr);
  const bool ignored = target == p.options.ignore_index;
  if (ignored || target < 0 || target >= p.classes) return fill(row, out, ignored ? 0.0f : NAN);
  const double lse = static_cast<const double*>(p.lse)[r];
  const LogSum parts{float(lse), float(lse - double(float(lse))), lse};
  float weight_total = float(p.classes);
  if (p.options.label_smoothing > 0 && row.weight) {
    weight_total = 0;
    for (int64_t c = threadIdx.x; c < p.classes; c += kThreads) weight_total += row.weight[c];
    weight_total = block_sum(weight_total);
  }
  const float dloss = static_cast<const float*>(p.dloss)[r];
  gradient_of(row, parts, target, p.options, weight_total, dloss).write(row, out);
}

}  // namespace

void launch(const CrossEntropyForward& p, int64_t stream) {
  if (p.rows == 0 || p.classes == 0) return;
  for_dtype(p.dtype, "cross_entropy", [&](auto element) {
    using T = decltype(element);
    // Without a second sweep nothing need be kept.
    const bool sweeps_again = p.dlogits || p.options.label_smoothing > 0;
    const int64_t packs = p.classes / kPack<T>,
                  room = (most_shared() - 1024) / int64_t(sizeof(Pack<T>));
    const int64_t held = sweeps_again ? least(packs, room) : 0;
    const int shared = int(held * int64_t(sizeof(Pack<T>)));
    allow_shared(cross_entropy_forward_kernel<T>, shared, "cross_entropy_forward");
    cross_entropy_forward_kernel<T>
        <<<unsigned(p.rows), kThreads, shared, stream_of(stream)>>>(p, held);
    check_launch("cross_entropy_forward");
  });
}

void launch(const CrossEntropyBackward& p, int64_t stream) {
  if (p.rows == 0 || p.classes == 0) return;
  for_dtype(p.dtype, "cross_entropy", [&](auto element) {
    cross_entropy_backward_kernel<decltype(element)>
        <<<unsigned(p.rows), kThreads, 0, stream_of(stream)>>>(p);
    check_launch("cross_entropy_backward");
  });
}

}  // namespace fastlm::cuda
