// cross_entropy, forward and backward, a row of logits at a time.
//
// Forward without a gradient reads the logits once: a chunk of 8 KB is in L1 for its maximum and for its
// exponentials, and chunks are joined as in online softmax. Forward with a gradient also keeps the exponentials of the
// row in a scratch row that stays in L2, and turns them into the gradient at its end: one exponential per logit, one
// read and one write of memory. With the base-2 logits y = z * log2(e), e^(z - max) is one fused multiply-add and 2^.
#include "../cross_entropy.h"

#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

constexpr int64_t kChunk = 2048;  // logits

// What a row's loss and gradient need to know of its softmax.
template <class A>
struct RowSums {
  A lse;         // natural log
  A peak2;       // the maximum, times log2(e), that exponentials are relative to
  A inverse;     // 1 / sum of exponentials
  A weighted;    // sum over classes of w_c z_c; only with label smoothing
};

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

// Online softmax over chunks. Where `kept` is given it receives the exponentials, each relative to its own chunk's
// running maximum, and `peaks` those maxima.
template <class T>
RowSums<acc_t<T>> softmax_sums(const Row<T>& row, int64_t classes, acc_t<T>* kept, acc_t<T>* peaks) {
  using A = acc_t<T>;
  A peak = -A(INFINITY), total = 0;
  for (int64_t start = 0; start < classes; start += kChunk) {
    const int64_t length = least(kChunk, classes - start);
    Vec<A> highest = all(peak);
    sweep<A>(length, [&](int64_t c, auto span) __attribute__((always_inline)) {
      highest = max(highest, tail_is<A>(row.at(start + c, span), span, -A(INFINITY)) * A(kLog2e));
    });
    const A new_peak = largest<A>(highest);
    const A base = new_peak == -A(INFINITY) ? A(0) : new_peak;  // a chunk of -inf only: its exponentials are 0
    Vec<A> sums[2] = {};
    int64_t turn = 0;
    sweep<A>(length, [&](int64_t c, auto span) __attribute__((always_inline)) {
      const Vec<A> e = live<A>(exp2(row.at(start + c, span) * A(kLog2e) - base), span);
      sums[turn++ & 1] += e;
      if (kept) store(kept + start + c, e, span);
    });
    if (total > 0) total *= A(::exp2(double(peak - base)));
    total += sum<A>(sums[0] + sums[1]);
    peak = new_peak;
    if (peaks) peaks[start / kChunk] = base;
  }
  return {(peak + A(__builtin_log2(double(total)))) * A(kLn2), peak, A(1) / total, A(0)};
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
                  const acc_t<T>* kept, const acc_t<T>* peaks, T* out) {
  using A = acc_t<T>;
  const A lse2 = lse * A(kLog2e);
  // The target's own entry needs a logit that an in-place gradient is about to overwrite.
  const A z_target = row.one(target);
  for (int64_t start = 0; start < classes; start += kChunk) {
    const int64_t length = least(kChunk, classes - start);
    const A rescale = kept ? k.softmax * A(::exp2(double(peaks[start / kChunk] - lse2))) : A(0);
    sweep_aligned(out + start, length, [&](int64_t i, auto span) __attribute__((always_inline)) {
      const int64_t c = start + i;
      Vec<A> g;
      if (kept) g = load(kept + c, span) * rescale;
      else g = exp2(row.at(c, span) * A(kLog2e) - lse2) * k.softmax;
      if (k.smooth != 0) g -= row.weight_at(c, span) * k.smooth;
      if (row.softcap > 0) {
        const Vec<A> t = row.at(c, span) / row.softcap;
        g *= A(1) - t * t;
      }
      emit<kStream>(out + c, g, span);
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
    A *kept = p.dlogits ? scratch.data() : nullptr, *peaks = kept ? kept + p.classes : nullptr;
    for (int64_t r = first; r < last; ++r) {
      const Row<T> row{static_cast<const T*>(p.logits) + r * p.classes, weight, A(p.options.softcap)};
      T* gradient = p.dlogits ? static_cast<T*>(p.dlogits) + r * p.classes : nullptr;
      A &loss = static_cast<A*>(p.loss)[r], &lse = static_cast<A*>(p.lse)[r];
      const int64_t target = p.target[r];
      lse = softmax_sums(row, p.classes, kept, peaks).lse;
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
      gradient_row<T, kStream>(row, p.classes, target, lse, k, kept, peaks, gradient);
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
