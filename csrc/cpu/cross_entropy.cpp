// cross_entropy, forward and backward, a row of logits at a time.
//
// Forward without a gradient reads the logits once, in one pass of online softmax over chunks. Forward with a gradient also
// keeps the exponentials of the row in a scratch row that stays in L2, and turns them into the gradient at its end: one
// exponential per logit, one read and one write of memory. With logits in base 2, e^(z - base) is one fused multiply-add and 2^.
#include "../cross_entropy.h"

#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

constexpr int64_t kChunk = 2048;  // logits

// The general form: softcap and weights, each an option of the whole call.
template <class T>
struct Row {
  using A = acc_t<T>;
  const T* logits;
  const A* weight;  // or null
  A softcap;        // 0: none

  template <class Span>
  FASTLM_INLINE Vec<A> at(int64_t c, Span span) const {
    const Vec<A> raw = load(logits + c, span);
    return softcap > 0 ? softcap * tanh<A>(raw / softcap) : raw;
  }
  template <class Span>
  FASTLM_INLINE Vec<A> weight_at(int64_t c, Span span) const {
    return weight ? load(weight + c, span) : live<A>(all(A(1)), span);
  }
  A one(int64_t c) const { return softcap > 0 ? at(c, Part{1})[0] : A(scalar(logits[c])); }
};

template <class A, class Span>
FASTLM_INLINE Vec<A> tail_is(Vec<A> v, Span span, A dead) {
  if constexpr (__is_same(Span, Part)) return live<A>(v, span, dead);
  else return v;
}

// One chunk of logits: the largest (base 2), the sum of exponentials relative to `base`, and those themselves in `kept`.
template <class A> struct ChunkSums { A peak, sum; };

template <class T>
ChunkSums<acc_t<T>> chunk_sums(const Row<T>& row, int64_t start, int64_t length, acc_t<T> base, acc_t<T>* kept) {
  using A = acc_t<T>;
  Vec<A> highest = all(-A(INFINITY)), sums{};
  sweep<A>(length, [&](int64_t c, auto span) __attribute__((always_inline)) {
    prefetch(row.logits + start + c);
    const Vec<A> z = tail_is<A>(row.at(start + c, span), span, -A(INFINITY));
    const Vec<A> e = exp2_bounded(z * A(kLog2e) - base);
    highest = max(highest, z);
    sums += e;
    if (kept) store(kept + start + c, e, span);
  });
  return {largest<A>(highest) * A(kLog2e), sum<A>(sums)};
}

template <class T>
acc_t<T> chunk_peak(const Row<T>& row, int64_t start, int64_t length) {
  using A = acc_t<T>;
  Vec<A> highest = all(-A(INFINITY));
  sweep<A>(length, [&](int64_t c, auto span) __attribute__((always_inline)) {
    highest = max(highest, tail_is<A>(row.at(start + c, span), span, -A(INFINITY)));
  });
  return largest<A>(highest) * A(kLog2e);
}

// Online softmax over chunks; the lse, in natural logarithm. Exponentials are relative to the largest logit of the first chunk,
// and to a new one only where a later chunk exceeds it by 2^kSlack: float32 has room, and one pass replaces two. `kept` receives
// the exponentials, `bases` what those of each chunk are relative to; both may be null.
template <class T>
acc_t<T> log_sum_exp(const Row<T>& row, int64_t classes, acc_t<T>* kept, acc_t<T>* bases) {
  using A = acc_t<T>;
  constexpr A kSlack = 60;  // 2^60 * 50257 * 2^60 is far from overflow
  A base = -A(INFINITY), total = 0;
  for (int64_t start = 0; start < classes; start += kChunk) {
    const int64_t length = least(kChunk, classes - start);
    if (base == -A(INFINITY)) base = chunk_peak(row, start, length);
    const A relative_to = base == -A(INFINITY) ? A(0) : base;  // only -inf so far: its exponentials are 0
    ChunkSums<A> sums = chunk_sums(row, start, length, relative_to, kept);
    if (sums.peak > relative_to + kSlack) {
      total *= A(::exp2(double(relative_to - sums.peak)));
      base = sums.peak;
      sums = chunk_sums(row, start, length, base, kept);
    }
    total += sums.sum;
    if (bases) bases[start / kChunk] = base == -A(INFINITY) ? A(0) : base;
  }
  return (base + A(__builtin_log2(double(total)))) * A(kLn2);
}

template <class T>
acc_t<T> weighted_sum(const Row<T>& row, int64_t classes) {
  using A = acc_t<T>;
  Vec<A> total{};
  sweep<A>(classes, [&](int64_t c, auto span) __attribute__((always_inline)) {
    total += live<A>(row.at(c, span), span) * row.weight_at(c, span);
  });
  return sum<A>(total);
}

template <class A>
struct Coefficients {
  A softmax;   // the gradient is  softmax * p_c - smooth * w_c - [c = t] * target
  A smooth, target;
};

template <class A>
Coefficients<A> coefficients(const CrossEntropyOptions& o, int64_t classes, A target_weight, A weight_total, A lse, A dloss) {
  const A smooth = A(o.label_smoothing) / A(classes), hard = A(1 - o.label_smoothing) * target_weight;
  return {dloss * (hard + smooth * weight_total + A(2 * o.lse_square_scale) * lse), dloss * smooth, dloss * hard};
}

// The gradient of one row. p_c comes from the kept exponentials where there are any, else from the logits and the lse.
template <class T, bool kStream>
void gradient_row(const Row<T>& row, int64_t classes, int64_t target, acc_t<T> lse, const Coefficients<acc_t<T>>& k,
                  const acc_t<T>* kept, const acc_t<T>* bases, T* out) {
  using A = acc_t<T>;
  const A lse2 = lse * A(kLog2e);
  // The target's own entry needs a logit that an in-place gradient is about to overwrite.
  const A z_target = row.one(target);
  // With kept exponentials the logits are done with, and memory can bring the next row's.
  const int64_t ahead = kept ? classes * int64_t(sizeof(T)) : kAheadBytes;
  for (int64_t start = 0; start < classes; start += kChunk) {
    const int64_t length = least(kChunk, classes - start);
    const A rescale = kept ? k.softmax * A(::exp2(double(bases[start / kChunk] - lse2))) : A(0);
    write_row<kStream>(out + start, length, [&](int64_t i, auto span) __attribute__((always_inline)) {
      const int64_t c = start + i;
      Vec<A> g = kept ? load(kept + c, span) * rescale : exp2_bounded(row.at(c, span) * A(kLog2e) - lse2) * k.softmax;
      if (k.smooth != 0) g -= row.weight_at(c, span) * k.smooth;
      if (row.softcap > 0) {
        const Vec<A> t = row.at(c, span) / row.softcap;
        g *= A(1) - t * t;
      }
      prefetch(row.logits + c, ahead);
      return g;
    });
  }
  const A probability = A(::exp2(double(z_target * A(kLog2e) - lse2)));
  const A w = row.weight ? row.weight[target] : A(1), t = row.softcap > 0 ? z_target / row.softcap : A(0);
  put(out + target, (k.softmax * probability - k.smooth * w - k.target) * (A(1) - t * t));
}

template <class A>
A total_of(const void* weight, int64_t classes) {
  if (!weight) return A(classes);
  A total = 0;
  for (int64_t c = 0; c < classes; ++c) total += static_cast<const A*>(weight)[c];
  return total;
}

template <class T, bool kStream>
void forward(const CrossEntropyForward& p, int64_t threads) {
  using A = acc_t<T>;
  const int64_t chunks = ceil_div(p.classes, kChunk);
  const A weight_total = total_of<A>(p.weight, p.classes);
  const A* weight = static_cast<const A*>(p.weight);
  parallel_for(p.rows, p.classes * int64_t(sizeof(T)), threads, [&](int64_t first, int64_t last) {
    Scratch<A> scratch(p.dlogits ? p.classes + chunks : 1);
    A *kept = p.dlogits ? scratch.data() : nullptr, *bases = kept ? kept + p.classes : nullptr;
    for (int64_t r = first; r < last; ++r) {
      const Row<T> row{static_cast<const T*>(p.logits) + r * p.classes, weight, A(p.options.softcap)};
      T* gradient = p.dlogits ? static_cast<T*>(p.dlogits) + r * p.classes : nullptr;
      A &loss = static_cast<A*>(p.loss)[r], &lse = static_cast<A*>(p.lse)[r];
      const int64_t target = p.target[r];
      lse = log_sum_exp(row, p.classes, kept, bases);
      if (target == p.options.ignore_index) {
        loss = 0;
        if (gradient) memset(gradient, 0, size_t(p.classes) * sizeof(T));
        continue;
      }
      const A w = weight ? weight[target] : A(1), smooth = A(p.options.label_smoothing) / A(p.classes);
      loss = A(1 - p.options.label_smoothing) * w * (lse - row.one(target)) + A(p.options.lse_square_scale) * lse * lse;
      if (smooth > 0) loss += smooth * (weight_total * lse - weighted_sum(row, p.classes));
      if (!gradient) continue;
      const auto k = coefficients<A>(p.options, p.classes, w, weight_total, lse, A(p.dloss));
      gradient_row<T, kStream>(row, p.classes, target, lse, k, kept, bases, gradient);
    }
    if (kStream) end_of_streaming();
  });
}

template <class T>
void backward(const CrossEntropyBackward& p, int64_t threads) {
  using A = acc_t<T>;
  const A weight_total = total_of<A>(p.weight, p.classes);
  const A* weight = static_cast<const A*>(p.weight);
  const bool large = p.dlogits != p.logits && p.rows * p.classes * 4 >= kStreamBytes;
  parallel_for(p.rows, p.classes * int64_t(sizeof(T)) * 2, threads, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const Row<T> row{static_cast<const T*>(p.logits) + r * p.classes, weight, A(p.options.softcap)};
      T* gradient = static_cast<T*>(p.dlogits) + r * p.classes;
      const int64_t target = p.target[r];
      if (target == p.options.ignore_index) {
        memset(gradient, 0, size_t(p.classes) * sizeof(T));
        continue;
      }
      const A lse = static_cast<const A*>(p.lse)[r], w = weight ? weight[target] : A(1);
      const auto k = coefficients<A>(p.options, p.classes, w, weight_total, lse, static_cast<const A*>(p.dloss)[r]);
      if (large) gradient_row<T, true>(row, p.classes, target, lse, k, nullptr, nullptr, gradient);
      else gradient_row<T, false>(row, p.classes, target, lse, k, nullptr, nullptr, gradient);
    }
    if (large) end_of_streaming();
  });
}

}  // namespace

void launch(const CrossEntropyForward& p, int64_t threads) {
  if (p.rows == 0) return;
  const bool large = p.dlogits && p.dlogits != p.logits && p.rows * p.classes * 4 >= kStreamBytes;
  switch (p.dtype) {
    case DType::f32: return large ? forward<float, true>(p, threads) : forward<float, false>(p, threads);
    case DType::bf16: return large ? forward<bf16, true>(p, threads) : forward<bf16, false>(p, threads);
    default: return forward<double, false>(p, threads);
  }
}

void launch(const CrossEntropyBackward& p, int64_t threads) {
  switch (p.dtype) {
    case DType::f32: return backward<float>(p, threads);
    case DType::bf16: return backward<bf16>(p, threads);
    default: return backward<double>(p, threads);
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA
