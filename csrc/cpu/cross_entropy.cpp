// cross_entropy, forward and backward, a row of logits at a time.
//
// Forward reads the logits once, in one pass of online softmax over chunks. Where it also writes
// the gradient, the exponentials of a row stay in a scratch row in L2, and become its gradient
// while the next row is being read: one exponential per logit, one read and one write of memory,
// and the two under way together, because a core alone reads or writes at half the rate at which it
// does both. With logits in base 2, e^(z - base) is one fused multiply-add and 2^.
#include "../cross_entropy.h"

#include "for_dtype.h"
#include "logits_row.h"
#include "parallel.h"
#include "scratch.h"

namespace fastlm::cpu::FASTLM_ISA {
namespace {

constexpr int64_t kChunk = 2048;  // logits

// lse = base + log_total. Apart, they give differences of logits that their sum would round away.
template <class A> struct LogSum {
  A base, log_total;
};

// The gradient of one row: softmax * p_c - smooth * w_c - [c = target] * hard, times the softcap's
// derivative.
template <class T> struct RowGradient {
  using A = acc_t<T>;
  Row<T> row;
  T* out = nullptr;  // null: nothing to write
  int64_t target;
  LogSum<A> lse;
  A softmax, smooth, at_target;
  const A *kept = nullptr, *bases = nullptr;  // of log_sum_exp, where it kept them

  RowGradient() = default;
  RowGradient(const Row<T>& row_, T* out_, int64_t target_, LogSum<A> lse_, A weight_total,
              int64_t classes, const CrossEntropyOptions& o, A dloss)
      : row(row_), out(out_), target(target_), lse(lse_) {
    const A w = row.weight ? row.weight[target] : A(1), each = A(o.label_smoothing) / A(classes);
    const A hard = A(1 - o.label_smoothing) * w;
    softmax = dloss *
              (hard + each * weight_total + A(2 * o.lse_square_scale) * (lse.base + lse.log_total));
    smooth = dloss * each;
    // Computed now: an in-place gradient may overwrite the logit before its turn comes.
    const A z = row.one(target), t = row.softcap > 0 ? z / row.softcap : A(0);
    at_target =
        (softmax * A(::exp(double((z - lse.base) - lse.log_total))) - smooth * w - dloss * hard) *
        (A(1) - t * t);
  }
  // What the kept exponentials of the chunk from `start` on are multiplied by.
  A rescale(int64_t start) const {
    return softmax * A(::exp(double((bases[start / kChunk] - lse.base) - lse.log_total)));
  }
  // log2 of the probability of a logit.
  FASTLM_INLINE Vec<A> relative(Vec<A> z) const {
    return ((z - lse.base) - lse.log_total) * A(kLog2e);
  }

  template <class Span> FASTLM_INLINE Vec<A> finish(Vec<A> g, int64_t c, Span span) const {
    if (smooth != 0) g = rounded(g) - rounded(row.weight_at(c, span) * smooth);
    if (row.softcap > 0) {
      const Vec<A> t = row.at(c, span) / row.softcap;
      g *= A(1) - t * t;
    }
    return g;
  }
  void put_target() const {
    if (out) put(out + target, at_target);
  }
};

// The largest logit of a chunk, and the sum of its exponentials relative to a base.
template <class T> struct ChunkSums {
  using A = acc_t<T>;
  Vec<A> highest = all(-A(INFINITY)), sums = {};

  template <class Span>
  FASTLM_INLINE Vec<A> add(const Row<T>& row, int64_t c, Span span, A base, A* kept) {
    prefetch(row.logits + c);
    const Vec<A> z = tail_is<A>(row.at(c, span), span, -A(INFINITY));
    const Vec<A> e = exp2_bounded((z - base) * A(kLog2e));
    highest = max(highest, z);
    if (kept) store(kept + c, e, span);
    return e;
  }
};

template <class T>
ChunkSums<T> chunk_sums(const Row<T>& row, int64_t start, int64_t length, acc_t<T> base,
                        acc_t<T>* kept) {
  using A = acc_t<T>;
  ChunkSums<T> result;
  sweep<A>(length, [&](int64_t i, auto span) __attribute__((always_inline)) {
    result.sums += live<A>(result.add(row, start + i, span, base, kept), span);
  });
  return result;
}

// The same, while the gradient of the row before is written. That goes in aligned lines, so the sum
// is taken from what was kept: in an order that depends on neither alignment nor threads.
template <class T, bool kStream>
ChunkSums<T> chunk_sums(const Row<T>& row, int64_t start, int64_t length, acc_t<T> base,
                        acc_t<T>* kept, const RowGradient<T>& before) {
  using A = acc_t<T>;
  const A rescale = before.rescale(start);
  ChunkSums<T> result;
  write_row<kStream>(
      before.out + start, length, [&](int64_t i, auto span) __attribute__((always_inline)) {
        result.add(row, start + i, span, base, kept);
        return before.finish(load(before.kept + start + i, span) * rescale, start + i, span);
      });
  sweep<A>(length, [&](int64_t i, auto span) __attribute__((always_inline)) {
    result.sums += load(kept + start + i, span);
  });
  return result;
}

template <class T> acc_t<T> chunk_peak(const Row<T>& row, int64_t start, int64_t length) {
  using A = acc_t<T>;
  Vec<A> highest = all(-A(INFINITY));
  sweep<A>(length, [&](int64_t i, auto span) __attribute__((always_inline)) {
    highest = max(highest, tail_is<A>(row.at(start + i, span), span, -A(INFINITY)));
  });
  return largest<A>(highest);
}

// Online softmax over chunks. Exponentials are relative to the largest logit of the first chunk,
// and to a new one only where a later chunk exceeds it by kSlack: float32 has room, and one pass
// replaces two. `kept` receives the exponentials, `bases` what those of each chunk are relative to;
// both may be null.
template <class T, bool kStream>
LogSum<acc_t<T>> log_sum_exp(const Row<T>& row, int64_t classes, acc_t<T>* kept, acc_t<T>* bases,
                             const RowGradient<T>& before) {
  using A = acc_t<T>;
  constexpr A kSlack = 40;  // e^40 * 50257 * e^40 is far from overflow
  A base = -A(INFINITY), total = 0;
  for (int64_t start = 0; start < classes; start += kChunk) {
    const int64_t length = least(kChunk, classes - start);
    if (base == -A(INFINITY)) base = chunk_peak(row, start, length);
    // Where there was only -inf so far, exponentials are 0.
    const A relative_to = base == -A(INFINITY) ? A(0) : base;
    ChunkSums<T> chunk = before.out
                             ? chunk_sums<T, kStream>(row, start, length, relative_to, kept, before)
                             : chunk_sums(row, start, length, relative_to, kept);
    const A peak = largest<A>(chunk.highest);
    if (peak > relative_to + kSlack) {
      total *= A(::exp(double(relative_to - peak)));
      base = peak;
      chunk = chunk_sums(row, start, length, base, kept);
    }
    total += sum<A>(chunk.sums);
    if (bases)
      bases[start / kChunk] = base;  // -inf: what was kept of this chunk is multiplied by 0
  }
  before.put_target();
  return {base, A(::log(double(total)))};
}

// Sum over classes of w_c (base - z_c).
template <class T> acc_t<T> weighted_distance(const Row<T>& row, int64_t classes, acc_t<T> base) {
  using A = acc_t<T>;
  Vec<A> total{};
  sweep<A>(classes, [&](int64_t c, auto span) __attribute__((always_inline)) {
    total += live<A>(base - row.at(c, span), span) * row.weight_at(c, span);
  });
  return sum<A>(total);
}

// A row's gradient alone: from the kept exponentials, or from the logits and the lse.
template <class T, bool kStream> void write_gradient(const RowGradient<T>& g, int64_t classes) {
  using A = acc_t<T>;
  for (int64_t start = 0; start < classes; start += kChunk) {
    const A rescale = g.kept ? g.rescale(start) : A(0);
    write_row<kStream>(g.out + start, least(kChunk, classes - start),
                       [&](int64_t i, auto span) __attribute__((always_inline)) {
                         const int64_t c = start + i;
                         if (g.kept) return g.finish(load(g.kept + c, span) * rescale, c, span);
                         prefetch(g.row.logits + c);
                         return g.finish(exp2_bounded(g.relative(g.row.at(c, span))) * g.softmax, c,
                                         span);
                       });
  }
  g.put_target();
}

template <class A> A total_of(const void* weight, int64_t classes) {
  if (!weight) return A(classes);
  A total = 0;
  for (int64_t c = 0; c < classes; ++c) total += static_cast<const A*>(weight)[c];
  return total;
}

template <class T, bool kStream>
void forward_rows(const CrossEntropyForward& p, int64_t first, int64_t last,
                  acc_t<T> weight_total) {
  using A = acc_t<T>;
  constexpr int64_t kLine = 64 / int64_t(sizeof(A));
  const int64_t kept_size = ceil_div(p.classes + kLine, kLine) * kLine,
                chunks = ceil_div(p.classes, kChunk);
  Scratch<A> scratch(p.dlogits ? 2 * (kept_size + chunks) : 1);
  RowGradient<T> before;  // of the row before, not yet written
  for (int64_t r = first; r < last; ++r) {
    const Row<T> row{static_cast<const T*>(p.logits) + r * p.classes,
                     static_cast<const A*>(p.weight), A(p.options.softcap)};
    A *kept = nullptr, *bases = nullptr;
    if (p.dlogits) {
      // Written while the row before is, so placed in its line as that is: stores that cross lines
      // cost twice.
      const int64_t past =
          int64_t(reinterpret_cast<uintptr_t>(before.out) % 64 / sizeof(T)) % kLine;
      kept = scratch.data() + (r & 1) * kept_size + past;
      bases = scratch.data() + 2 * kept_size + (r & 1) * chunks;
    }
    const LogSum<A> lse = log_sum_exp<T, kStream>(row, p.classes, kept, bases, before);
    static_cast<double*>(p.lse)[r] = double(lse.base) + double(lse.log_total);
    before.out = nullptr;
    T* gradient = p.dlogits ? static_cast<T*>(p.dlogits) + r * p.classes : nullptr;
    A& loss = static_cast<A*>(p.loss)[r];
    const int64_t target = p.target[r];
    if (target == p.options.ignore_index) {
      loss = 0;
      if (gradient) memset(gradient, 0, size_t(p.classes) * sizeof(T));
      continue;
    }
    const A w = row.weight ? row.weight[target] : A(1),
            smooth = A(p.options.label_smoothing) / A(p.classes);
    const A sum = lse.base + lse.log_total;
    loss = A(1 - p.options.label_smoothing) * w * ((lse.base - row.one(target)) + lse.log_total) +
           A(p.options.lse_square_scale) * sum * sum;
    if (smooth > 0)
      loss += smooth * (weight_total * lse.log_total + weighted_distance(row, p.classes, lse.base));
    if (!gradient) continue;
    before =
        RowGradient<T>(row, gradient, target, lse, weight_total, p.classes, p.options, A(p.dloss));
    before.kept = kept;
    before.bases = bases;
  }
  if (before.out) write_gradient<T, kStream>(before, p.classes);
  if (kStream) end_of_streaming();
}

template <class T, bool kStream> void forward(const CrossEntropyForward& p, int64_t threads) {
  const auto weight_total = total_of<acc_t<T>>(p.weight, p.classes);
  parallel_for(p.rows, p.classes * int64_t(sizeof(T)), threads, [&](int64_t first, int64_t last) {
    forward_rows<T, kStream>(p, first, last, weight_total);
  });
}

template <class T, bool kStream> void backward(const CrossEntropyBackward& p, int64_t threads) {
  using A = acc_t<T>;
  const A weight_total = total_of<A>(p.weight, p.classes);
  parallel_for(p.rows, p.classes * int64_t(sizeof(T)) * 2, threads,
               [&](int64_t first, int64_t last) {
                 for (int64_t r = first; r < last; ++r) {
                   const Row<T> row{static_cast<const T*>(p.logits) + r * p.classes,
                                    static_cast<const A*>(p.weight), A(p.options.softcap)};
                   T* gradient = static_cast<T*>(p.dlogits) + r * p.classes;
                   if (p.target[r] == p.options.ignore_index) {
                     memset(gradient, 0, size_t(p.classes) * sizeof(T));
                     continue;
                   }
                   const double lse = static_cast<const double*>(p.lse)[r];
                   const LogSum<A> parts{A(lse), A(lse - double(A(lse)))};
                   const RowGradient<T> g(row, gradient, p.target[r], parts, weight_total,
                                          p.classes, p.options, static_cast<const A*>(p.dloss)[r]);
                   write_gradient<T, kStream>(g, p.classes);
                 }
                 if (kStream) end_of_streaming();
               });
}

}  // namespace

void launch(const CrossEntropyForward& p, int64_t threads) {
  if (p.rows == 0) return;
  const bool large = p.dlogits && p.dlogits != p.logits && p.rows * p.classes * 4 >= kStreamBytes;
  for_dtype(p.dtype, large, [&](auto element, auto stream) {
    forward<decltype(element), stream.value>(p, threads);
  });
}

void launch(const CrossEntropyBackward& p, int64_t threads) {
  const bool large = p.dlogits != p.logits && p.rows * p.classes * 4 >= kStreamBytes;
  for_dtype(p.dtype, large, [&](auto element, auto stream) {
    backward<decltype(element), stream.value>(p, threads);
  });
}

}  // namespace fastlm::cpu::FASTLM_ISA
