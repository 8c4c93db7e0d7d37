// Chooses, once per process, the instruction set whose copy of the kernels runs (setup.py compiles
// one copy for each), and makes the checks of values that the kernels rely on.
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

#include "../attention.h"
#include "../bandwidth.h"
#include "../cross_entropy.h"
#include "../elementwise.h"
#include "../layer_norm.h"
#include "../linear.h"
#include "../linear_cross_entropy.h"
#include "../rms_norm.h"

#if defined(__x86_64__)
#define FASTLM_FOR_EACH_ISA(X) X(avx512bf16) X(avx512) X(avx2) X(baseline)
#else
#define FASTLM_FOR_EACH_ISA(X) X(baseline)
#endif

namespace fastlm::cpu {
namespace {

bool runs_here(const std::string& isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == "avx512bf16")
    return __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16");
  if (isa == "avx512") return __builtin_cpu_supports("x86-64-v4");
  if (isa == "avx2") return __builtin_cpu_supports("x86-64-v3");
#endif
  return isa == "baseline";
}

std::string& chosen() {
  static std::string isa = available_isas().front();
  return isa;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
#define FASTLM_NAME(isa) \
  if (runs_here(#isa)) names.emplace_back(#isa);
  FASTLM_FOR_EACH_ISA(FASTLM_NAME)
  return names;
}

std::string isa() { return chosen(); }

void set_isa(const std::string& name) {
  for (const std::string& isa : available_isas())
    if (isa == name) {
      chosen() = name;
      return;
    }
  throw std::invalid_argument("set_isa: this machine does not run '" + name +
                              "'; accepted are those of available_isas()");
}

#define FASTLM_COPIES(isa_name)                      \
  namespace isa_name {                               \
  void launch(const LayerNormForward&, int64_t);     \
  void launch(const LayerNormBackward&, int64_t);    \
  void launch(const RmsNormForward&, int64_t);       \
  void launch(const RmsNormBackward&, int64_t);      \
  void launch(const GeluForward&, int64_t);          \
  void launch(const GeluBackward&, int64_t);         \
  void launch(const Dropout&, int64_t);              \
  void launch(const CrossEntropyForward&, int64_t);  \
  void launch(const CrossEntropyBackward&, int64_t); \
  void launch(const LinearCrossEntropy&, int64_t);   \
  void launch(const AttentionForward&, int64_t);     \
  void launch(const AttentionBackward&, int64_t);    \
  void launch(const CacheAppend&, int64_t);          \
  void launch(const Linear&, int64_t);               \
  void launch(const Bandwidth&, int64_t);            \
  }
FASTLM_FOR_EACH_ISA(FASTLM_COPIES)

namespace {

template <class Params>
void dispatch(const Params& p, int64_t threads){
#define FASTLM_TRY(isa_name) \
  if (chosen() == #isa_name) return isa_name::launch(p, threads);
    FASTLM_FOR_EACH_ISA(FASTLM_TRY)}

std::string number(int64_t value) {
  return std::to_string(value);
}

void check_targets(const char* op, const int64_t* target, int64_t rows, int64_t classes,
                   int64_t ignore_index) {
  for (int64_t row = 0; row < rows; ++row)
    if (target[row] != ignore_index && (target[row] < 0 || target[row] >= classes))
      throw std::out_of_range(std::string(op) + ": target: row " + number(row) + " holds " +
                              number(target[row]) + "; accepted are 0 to " + number(classes - 1) +
                              " and ignore_index " + number(ignore_index));
}

}  // namespace

void launch(const LayerNormForward& p, int64_t threads) { dispatch(p, threads); }
void launch(const LayerNormBackward& p, int64_t threads) { dispatch(p, threads); }
void launch(const RmsNormForward& p, int64_t threads) { dispatch(p, threads); }
void launch(const RmsNormBackward& p, int64_t threads) { dispatch(p, threads); }
void launch(const GeluForward& p, int64_t threads) { dispatch(p, threads); }
void launch(const GeluBackward& p, int64_t threads) { dispatch(p, threads); }
void launch(const Dropout& p, int64_t threads) { dispatch(p, threads); }

void launch(const CrossEntropyForward& p, int64_t threads) {
  check_targets("cross_entropy", p.target, p.rows, p.classes, p.options.ignore_index);
  dispatch(p, threads);
}
void launch(const CrossEntropyBackward& p, int64_t threads) {
  check_targets("cross_entropy", p.target, p.rows, p.classes, p.options.ignore_index);
  dispatch(p, threads);
}

void launch(const LinearCrossEntropy& p, int64_t threads) {
  check_targets("linear_cross_entropy", p.target, p.rows, p.classes, p.options.ignore_index);
  dispatch(p, threads);
}

void launch(const AttentionForward& p, int64_t threads) {
  const AttentionShape& s = p.shape;
  for (int64_t b = 0; s.seqlens_k && b < s.batch; ++b)
    if (s.seqlens_k[b] < 0 || s.seqlens_k[b] > s.keys)
      throw std::out_of_range("attention: sequence " + number(b) + " has " +
                              number(s.seqlens_k[b]) + " keys in use; accepted are 0 to " +
                              number(s.keys));
  dispatch(p, threads);
}
void launch(const AttentionBackward& p, int64_t threads) { dispatch(p, threads); }
void launch(const Linear& p, int64_t threads) { dispatch(p, threads); }
void launch(const Bandwidth& p, int64_t threads) { dispatch(p, threads); }

void launch(const CacheAppend& p, int64_t threads) {
  for (int64_t b = 0; b < p.batch; ++b)
    if (p.seqlens[b] < 0 || p.seqlens[b] + p.length > p.capacity)
      throw std::out_of_range("attention_with_kvcache: cache_seqlens: sequence " + number(b) +
                              " holds " + number(p.seqlens[b]) + " keys and gets " +
                              number(p.length) + "; the cache has room for " + number(p.capacity));
  dispatch(p, threads);
}

}  // namespace fastlm::cpu
