// The Python functions of one device's module: checks in the user's language, then one launch.
// Compiled once with FASTLM_DEVICE = cpu and once with cuda. Outputs come first and are allocated
// by the caller; CurrentDevice, which module.cpp defines, makes a device the current one; `where`
// is the thread count on the CPU and the stream's handle on CUDA. Nothing here knows of torch
// beyond TensorView. Longer than 400 lines: a checked function for each operation, and no more.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "attention.h"
#include "checks.h"
#include "cross_entropy.h"
#include "elementwise.h"
#include "layer_norm.h"
#include "rms_norm.h"

namespace fastlm::FASTLM_DEVICE {

template <class Params> void launch_on(const TensorView& x, const Params& p, int64_t where) {
  const py::gil_scoped_release unlocked;
  const CurrentDevice device(x.device_id);
  launch(p, where);
}

// weight and bias share a dtype: x's, or float32 under a narrower x.
inline DType parameter_dtype(const OptionalView& weight, const OptionalView& bias,
                             const TensorView& x, const char* op) {
  const OptionalView& any = weight ? weight : bias;
  const DType dtype = any ? any->dtype : x.dtype;
  if (dtype != x.dtype && dtype != statistics_dtype(x))
    refuse(std::string(op) + ": weight", "x's dtype or float32", *any);
  check_size(weight, cols_of(x), dtype, (std::string(op) + ": weight").c_str());
  check_size(bias, cols_of(x), dtype, (std::string(op) + ": bias").c_str());
  return dtype;
}

inline const int64_t* seed_of(const OptionalView& seed, double p, const char* op) {
  if (p == 0) return nullptr;
  if (!seed) throw py::value_error(std::string(op) + ": seed: dropout needs one, got None");
  check_size(*seed, 1, DType::i64, "seed");
  return static_cast<const int64_t*>(seed->data);
}

// ---- layer_norm ----

inline void add_layer_norm_forward(const TensorView& y, const OptionalView& z,
                                   const TensorView& mean, const TensorView& rstd,
                                   const TensorView& x, const OptionalView& residual,
                                   const OptionalView& weight, const OptionalView& bias,
                                   const OptionalView& seed, double eps, double dropout_p,
                                   int64_t where) {
  check_floating(x, "layer_norm: x");
  check_like(y, x, "layer_norm: y");
  check_like(residual, x, "add_layer_norm: residual");
  check_like(z, x, "add_layer_norm: residual_out");
  check_size(mean, rows_of(x), statistics_dtype(x), "layer_norm: mean");
  check_size(rstd, rows_of(x), statistics_dtype(x), "layer_norm: rstd");
  const DType weight_dtype = parameter_dtype(weight, bias, x, "layer_norm");
  const LayerNormForward p{x.data,
                           data(residual),
                           data(weight),
                           data(bias),
                           seed_of(seed, dropout_p, "add_layer_norm"),
                           y.data,
                           data(z),
                           mean.data,
                           rstd.data,
                           rows_of(x),
                           cols_of(x),
                           eps,
                           dropout_p,
                           x.dtype,
                           weight_dtype};
  launch_on(x, p, where);
}

inline void layer_norm_forward(const TensorView& y, const TensorView& mean, const TensorView& rstd,
                               const TensorView& x, const OptionalView& weight,
                               const OptionalView& bias, double eps, int64_t where) {
  add_layer_norm_forward(y, std::nullopt, mean, rstd, x, std::nullopt, weight, bias, std::nullopt,
                         eps, 0.0, where);
}

inline void add_layer_norm_backward(const OptionalView& dx, const TensorView& dz,
                                    const OptionalView& dweight, const OptionalView& dbias,
                                    const TensorView& dy, const OptionalView& dz_out,
                                    const TensorView& z, const OptionalView& weight,
                                    const TensorView& mean, const TensorView& rstd,
                                    const OptionalView& seed, double dropout_p, int64_t where) {
  check_floating(z, "layer_norm: x");
  check_like(dx, z, "layer_norm: dx");
  check_like(dz, z, "layer_norm: dx");
  check_like(dy, z, "layer_norm: dy");
  check_like(dz_out, z, "add_layer_norm: gradient of residual_out");
  check_size(mean, rows_of(z), statistics_dtype(z), "layer_norm: mean");
  check_size(rstd, rows_of(z), statistics_dtype(z), "layer_norm: rstd");
  const DType weight_dtype = parameter_dtype(weight, dweight ? dweight : dbias, z, "layer_norm");
  check_size(dbias, cols_of(z), weight_dtype, "layer_norm: dbias");
  const LayerNormBackward p{dy.data,
                            data(dz_out),
                            z.data,
                            data(weight),
                            mean.data,
                            rstd.data,
                            seed_of(seed, dropout_p, "add_layer_norm"),
                            dz.data,
                            data(dx),
                            data(dweight),
                            data(dbias),
                            rows_of(z),
                            cols_of(z),
                            dropout_p,
                            z.dtype,
                            weight_dtype};
  launch_on(z, p, where);
}

inline void layer_norm_backward(const TensorView& dx, const OptionalView& dweight,
                                const OptionalView& dbias, const TensorView& dy,
                                const TensorView& x, const OptionalView& weight,
                                const TensorView& mean, const TensorView& rstd, int64_t where) {
  add_layer_norm_backward(std::nullopt, dx, dweight, dbias, dy, std::nullopt, x, weight, mean, rstd,
                          std::nullopt, 0.0, where);
}

// ---- rms_norm ----

inline void rms_norm_forward(const TensorView& y, const TensorView& rstd, const TensorView& x,
                             const OptionalView& weight, double eps, int64_t where) {
  check_floating(x, "rms_norm: x");
  check_like(y, x, "rms_norm: y");
  check_size(rstd, rows_of(x), statistics_dtype(x), "rms_norm: rstd");
  const DType weight_dtype = parameter_dtype(weight, std::nullopt, x, "rms_norm");
  const RmsNormForward p{x.data,     data(weight), y.data,  rstd.data,   rows_of(x),
                         cols_of(x), eps,          x.dtype, weight_dtype};
  launch_on(x, p, where);
}

inline void rms_norm_backward(const TensorView& dx, const OptionalView& dweight,
                              const TensorView& dy, const TensorView& x, const OptionalView& weight,
                              const TensorView& rstd, int64_t where) {
  check_floating(x, "rms_norm: x");
  check_like(dx, x, "rms_norm: dx");
  check_like(dy, x, "rms_norm: dy");
  check_size(rstd, rows_of(x), statistics_dtype(x), "rms_norm: rstd");
  const DType weight_dtype = parameter_dtype(weight, dweight, x, "rms_norm");
  const RmsNormBackward p{dy.data,       x.data,     data(weight), rstd.data, dx.data,
                          data(dweight), rows_of(x), cols_of(x),   x.dtype,   weight_dtype};
  launch_on(x, p, where);
}

// ---- gelu, dropout ----

inline void gelu_forward(const TensorView& y, const TensorView& x, const OptionalView& bias,
                         bool tanh_form, int64_t where) {
  check_floating(x, "gelu: input");
  check_like(y, x, "gelu: output");
  check_size(bias, cols_of(x), x.dtype, "gelu: bias");
  const GeluForward p{x.data, data(bias), y.data, rows_of(x), cols_of(x), tanh_form, x.dtype};
  launch_on(x, p, where);
}

inline void gelu_backward(const TensorView& dx, const OptionalView& dbias, const TensorView& dy,
                          const TensorView& x, const OptionalView& bias, bool tanh_form,
                          int64_t where) {
  check_floating(x, "gelu: input");
  check_like(dx, x, "gelu: dx");
  check_like(dy, x, "gelu: dy");
  check_size(bias, cols_of(x), x.dtype, "gelu: bias");
  check_size(dbias, cols_of(x), x.dtype, "gelu: dbias");
  const GeluBackward p{dy.data,    x.data,     data(bias), dx.data, data(dbias),
                       rows_of(x), cols_of(x), tanh_form,  x.dtype};
  launch_on(x, p, where);
}

inline void dropout(const TensorView& y, const TensorView& x, const TensorView& seed,
                    double probability, int64_t where) {
  check_floating(x, "dropout: input");
  check_like(y, x, "dropout: output");
  const Dropout p{x.data, seed_of(seed, 1, "dropout"), y.data, rows_of(x), cols_of(x), probability,
                  x.dtype};
  launch_on(x, p, where);
}

// ---- cross_entropy ----

inline void check_rows(const TensorView& logits, const TensorView& target,
                       const OptionalView& weight) {
  check_floating(logits, "cross_entropy: input");
  if (logits.dims != 2) refuse("cross_entropy: input", "(rows, classes)", logits);
  check_size(target, logits.shape[0], DType::i64, "cross_entropy: target");
  check_size(weight, logits.shape[1], statistics_dtype(logits), "cross_entropy: weight");
}

inline void cross_entropy_forward(const TensorView& loss, const TensorView& lse,
                                  const OptionalView& dlogits, const TensorView& logits,
                                  const TensorView& target, const OptionalView& weight,
                                  int64_t ignore_index, double label_smoothing,
                                  double lse_square_scale, double softcap, double dloss,
                                  int64_t where) {
  check_rows(logits, target, weight);
  check_size(loss, logits.shape[0], statistics_dtype(logits), "cross_entropy: loss");
  check_size(lse, logits.shape[0], DType::f64, "cross_entropy: lse");
  check_like(dlogits, logits, "cross_entropy: dlogits");
  const CrossEntropyForward p{
      logits.data,     static_cast<const int64_t*>(target.data),
      data(weight),    loss.data,
      lse.data,        data(dlogits),
      dloss,           logits.shape[0],
      logits.shape[1], {ignore_index, label_smoothing, lse_square_scale, softcap},
      logits.dtype};
  launch_on(logits, p, where);
}

inline void cross_entropy_backward(const TensorView& dlogits, const TensorView& dloss,
                                   const TensorView& logits, const TensorView& target,
                                   const OptionalView& weight, const TensorView& lse,
                                   int64_t ignore_index, double label_smoothing,
                                   double lse_square_scale, double softcap, int64_t where) {
  check_rows(logits, target, weight);
  check_like(dlogits, logits, "cross_entropy: dlogits");
  check_size(dloss, logits.shape[0], statistics_dtype(logits),
             "cross_entropy: gradient of the losses");
  check_size(lse, logits.shape[0], DType::f64, "cross_entropy: lse");
  const CrossEntropyBackward p{
      dloss.data,      logits.data,     static_cast<const int64_t*>(target.data),
      data(weight),    lse.data,        dlogits.data,
      logits.shape[0], logits.shape[1], {ignore_index, label_smoothing, lse_square_scale, softcap},
      logits.dtype};
  launch_on(logits, p, where);
}

// ---- attention ----

struct AttentionOptions {  // everything of a call that is not q, k or v
  OptionalView cu_seqlens_q, cu_seqlens_k, seqlens_k, attn_mask, alibi_slopes, seed;
  int64_t max_queries, max_keys;
  double softmax_scale, softcap;
  int64_t window_left, window_right;
  double dropout_p;
};

inline Bshd bshd(const TensorView& t, const TensorView& q, const char* argument) {
  if (t.device_type != kDeviceType) refuse(argument, "a tensor on this module's device", t);
  if (t.dtype != q.dtype || t.dims != q.dims)
    refuse(argument, "the dtype and number of dimensions of " + describe(q), t);
  if (t.dims != 3 && t.dims != 4)
    refuse(argument, "(batch, sequence, heads, head_dim) or (tokens, heads, head_dim)", t);
  // Strides of a tensor without elements mean nothing.
  if (t.strides[t.dims - 1] != 1 && t.shape[t.dims - 1] != 1 && t.count() != 0)
    refuse(argument, "a contiguous last dimension", t);
  return {t.data, t.dims == 4 ? t.strides[0] : 0, t.strides[t.dims - 3], t.strides[t.dims - 2]};
}

inline void set_mask(ScoreBias& bias, const OptionalView& mask, const TensorView& q, int64_t batch,
                     int64_t heads, int64_t queries, int64_t keys) {
  if (!mask) return;
  const TensorView& m = *mask;
  const bool fits = m.dims == 4 && m.shape[0] == batch && m.shape[1] == heads &&
                    m.shape[2] == queries && m.shape[3] == keys;
  if (!fits || m.device_type != kDeviceType)
    refuse("attention: attn_mask", "(batch, heads, queries, keys) on this module's device", m);
  if (m.dtype != DType::u8 && m.dtype != DType::f32 && m.dtype != q.dtype)
    refuse("attention: attn_mask", "uint8, float32 or q's dtype", m);
  bias.mask = m.data;
  bias.mask_dtype = m.dtype;
  bias.mask_batch_stride = m.strides[0];
  bias.mask_head_stride = m.strides[1];
  bias.mask_query_stride = m.strides[2];
  bias.mask_key_stride = m.strides[3];
}

inline void set_slopes(ScoreBias& bias, const OptionalView& slopes, int64_t batch, int64_t heads) {
  if (!slopes) return;
  const bool by_batch = slopes->count() == batch * heads && slopes->dims == 2;
  check_size(slopes, by_batch ? batch * heads : heads, DType::f32, "attention: alibi_slopes");
  bias.alibi_slopes = static_cast<const float*>(slopes->data);
  bias.alibi_batch_stride = by_batch ? heads : 0;
}

inline AttentionShape attention_shape(const TensorView& q, const TensorView& k, const TensorView& v,
                                      const TensorView& lse, const AttentionOptions& o) {
  check_size(lse, rows_of(q), DType::f64, "attention: lse");
  const bool packed = q.dims == 3;
  if (packed != o.cu_seqlens_q.has_value() || packed != o.cu_seqlens_k.has_value())
    refuse("attention: q",
           packed ? "cu_seqlens_q and cu_seqlens_k with (tokens, heads, head_dim)"
                  : "no cu_seqlens with 4 dimensions",
           q);
  if (packed && o.attn_mask) refuse("attention: attn_mask", "none with cu_seqlens", *o.attn_mask);
  const int s = q.dims - 3, h = q.dims - 2, d = q.dims - 1;  // sequence, heads, head_dim
  const bool heads_fit = k.shape[h] > 0 && q.shape[h] % k.shape[h] == 0 && k.shape[h] == v.shape[h];
  if (!heads_fit)
    refuse("attention: k", "as many heads as v, a divisor of q's in " + describe(q), k);
  if (q.shape[d] != k.shape[d]) refuse("attention: k", "q's head_dim in " + describe(q), k);
  if (k.shape[s] != v.shape[s] || (!packed && k.shape[0] != q.shape[0]))
    refuse("attention: k, v", "equal lengths and q's batch", k);
  const int64_t batch = packed ? o.cu_seqlens_q->count() - 1 : q.shape[0];
  check_size(o.cu_seqlens_q, batch + 1, DType::i32, "attention: cu_seqlens_q");
  check_size(o.cu_seqlens_k, batch + 1, DType::i32, "attention: cu_seqlens_k");
  check_size(o.seqlens_k, batch, DType::i32, "attention: cache_seqlens");
  AttentionShape shape{};
  shape.batch = batch;
  shape.queries = packed ? o.max_queries : q.shape[s];
  shape.keys = packed ? o.max_keys : k.shape[s];
  shape.heads = q.shape[h];
  shape.kv_heads = k.shape[h];
  shape.head_dim = q.shape[d];
  shape.value_head_dim = v.shape[d];
  shape.cu_seqlens_q = static_cast<const int32_t*>(data(o.cu_seqlens_q));
  shape.cu_seqlens_k = static_cast<const int32_t*>(data(o.cu_seqlens_k));
  shape.seqlens_k = static_cast<const int32_t*>(data(o.seqlens_k));
  shape.lse_batch_stride = packed ? 0 : q.shape[h] * q.shape[s];
  shape.lse_head_stride = q.shape[s];
  shape.softmax_scale = o.softmax_scale;
  shape.softcap = o.softcap;
  shape.window_left = o.window_left;
  shape.window_right = o.window_right;
  set_mask(shape.bias, o.attn_mask, q, batch, shape.heads, shape.queries, shape.keys);
  set_slopes(shape.bias, o.alibi_slopes, batch, shape.heads);
  shape.dropout_p = o.dropout_p;
  shape.seed = seed_of(o.seed, o.dropout_p, "attention");
  shape.dtype = q.dtype;
  return shape;
}

// Of a tensor with the queries' rows and the values' columns.
inline Bshd output_bshd(const TensorView& t, const TensorView& q, const TensorView& v,
                        const char* argument) {
  const int last = q.dims - 1;
  bool fits = t.dims == q.dims && t.shape[last] == v.shape[last];
  for (int d = 0; fits && d < last; ++d) fits = t.shape[d] == q.shape[d];
  if (!fits) refuse(argument, "q's shape with v's head_dim: q " + describe(q), t);
  return bshd(t, q, argument);
}

inline void attention_forward(const TensorView& o, const TensorView& lse, const TensorView& q,
                              const TensorView& k, const TensorView& v,
                              const AttentionOptions& options, int64_t where) {
  const AttentionForward p{attention_shape(q, k, v, lse, options),
                           bshd(q, q, "attention: q"),
                           bshd(k, q, "attention: k"),
                           bshd(v, q, "attention: v"),
                           output_bshd(o, q, v, "attention: output"),
                           static_cast<double*>(lse.data)};
  launch_on(q, p, where);
}

inline void attention_backward(const TensorView& dq, const TensorView& dk, const TensorView& dv,
                               const TensorView& dout, const OptionalView& dlse,
                               const TensorView& q, const TensorView& k, const TensorView& v,
                               const TensorView& o, const TensorView& lse,
                               const AttentionOptions& options, int64_t where) {
  check_size(dlse, lse.count(), DType::f64, "attention: gradient of lse");
  const AttentionBackward p{attention_shape(q, k, v, lse, options),
                            output_bshd(dout, q, v, "attention: gradient of the output"),
                            bshd(q, q, "attention: q"),
                            bshd(k, q, "attention: k"),
                            bshd(v, q, "attention: v"),
                            output_bshd(o, q, v, "attention: output"),
                            bshd(dq, q, "attention: dq"),
                            bshd(dk, q, "attention: dk"),
                            bshd(dv, q, "attention: dv"),
                            static_cast<const double*>(lse.data),
                            static_cast<const double*>(data(dlse))};
  launch_on(q, p, where);
}

inline void cache_append(const TensorView& k_cache, const TensorView& v_cache, const TensorView& k,
                         const TensorView& v, const TensorView& seqlens, int64_t where) {
  if (k.dims != 4 || k_cache.dims != 4)
    refuse("attention_with_kvcache: k", "(batch, sequence, heads, head_dim)", k);
  for (const TensorView* t : {&k_cache, &v_cache, &v})
    for (int d : {0, 2})
      if (t->dims != 4 || t->shape[d] != k.shape[d])
        refuse("attention_with_kvcache: k_cache, v_cache, v", "k's batch and heads", *t);
  if (k_cache.shape[3] != k.shape[3]) refuse("attention_with_kvcache: k_cache", "k's head_dim", k);
  if (v_cache.shape[3] != v.shape[3]) refuse("attention_with_kvcache: v_cache", "v's head_dim", v);
  if (v.shape[1] != k.shape[1] || v_cache.shape[1] != k_cache.shape[1])
    refuse("attention_with_kvcache: v, v_cache", "the lengths of k and k_cache", v);
  check_size(seqlens, k.shape[0], DType::i32, "attention_with_kvcache: cache_seqlens");
  const CacheAppend p{bshd(k, k, "k"),
                      bshd(v, k, "v"),
                      bshd(k_cache, k, "k_cache"),
                      bshd(v_cache, k, "v_cache"),
                      static_cast<const int32_t*>(seqlens.data),
                      k.shape[0],
                      k.shape[1],
                      k_cache.shape[1],
                      k.shape[2],
                      k.shape[3],
                      v.shape[3],
                      k.dtype};
  launch_on(k, p, where);
}

inline void bind(py::module_& m) {
  py::class_<AttentionOptions>(m, "AttentionOptions", py::module_local())
      .def(py::init<OptionalView, OptionalView, OptionalView, OptionalView, OptionalView,
                    OptionalView, int64_t, int64_t, double, double, int64_t, int64_t, double>());
  m.def("layer_norm_forward", &layer_norm_forward);
  m.def("layer_norm_backward", &layer_norm_backward);
  m.def("add_layer_norm_forward", &add_layer_norm_forward);
  m.def("add_layer_norm_backward", &add_layer_norm_backward);
  m.def("rms_norm_forward", &rms_norm_forward);
  m.def("rms_norm_backward", &rms_norm_backward);
  m.def("gelu_forward", &gelu_forward);
  m.def("gelu_backward", &gelu_backward);
  m.def("dropout", &dropout);
  m.def("cross_entropy_forward", &cross_entropy_forward);
  m.def("cross_entropy_backward", &cross_entropy_backward);
  m.def("attention_forward", &attention_forward);
  m.def("attention_backward", &attention_backward);
  m.def("cache_append", &cache_append);
}

}  // namespace fastlm::FASTLM_DEVICE
