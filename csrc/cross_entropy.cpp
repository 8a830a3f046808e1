// Cross entropy of rows of logits, and its gradient. With x' = softcap * tanh(x / softcap) (or x), e = label smoothing:
//
//   lse = log sum exp(x')     loss = lse - (1 - e) * x'[target] - e * mean(x') + z_loss * lse^2
//   dx' = (dloss * (1 + 2 * z_loss * lse) + dlse) * exp(x' - lse) - dloss * (e / columns + (1 - e at the target))
//
// Rows whose target is ignore_index: loss 0, and no gradient from it. The logits are read from memory once.
#include <cmath>

#include "functions.h"
#include "rows.h"

namespace {

bool targets_in_range(const CrossEntropyArgs& a, int64_t classes) {
  for (int64_t row = 0; row < a.rows; row++) {
    const int64_t target = a.target[row];
    if ((target < 0 || target >= classes) && target != a.ignore_index) return false;
  }
  return true;
}

template <class T, bool SOFTCAP>
struct Forward : RowOperation {
  static constexpr int64_t scratch = SOFTCAP;  // the capped logits
  struct Partial { float top, sum, logits; };
  struct Totals {};
  const CrossEntropyArgs& a;

  __attribute__((always_inline)) Partial reduce(int64_t row, int64_t begin, int64_t end, float* capped) const {
    const T* x = (const T*)a.logits.data + row * a.logits.stride;
    const auto logit = [&](int64_t i, auto lane) __attribute__((always_inline)) {
      if constexpr (SOFTCAP) return load(capped + i, lane, NEG_INF);
      return load(x + i, lane, NEG_INF);
    };
    vf tops[SUMS], sums[SUMS] = {}, logits[SUMS] = {};
#pragma GCC unroll 4
    for (int u = 0; u < SUMS; u++) tops[u] = broadcast(NEG_INF);
    if constexpr (SOFTCAP)
      for_vectors<2>(begin, end, [&](int64_t i, int, auto lane) __attribute__((always_inline)) {
        store(capped + i, vtanh(load(x + i, lane) * broadcast((float)(1. / a.softcap))) * broadcast((float)a.softcap), lane);
      });
    for_vectors<SUMS>(begin, end, [&](int64_t i, int u, auto lane) __attribute__((always_inline)) { tops[u] = vmax(tops[u], logit(i, lane)); });
    const float top = horizontal_max(vmax(vmax(tops[0], tops[1]), vmax(tops[2], tops[3])));
    const vf subtracted = broadcast(top == NEG_INF ? 0.f : top);
    if (a.label_smoothing == 0.)
      for_vectors<SUMS>(begin, end, [&](int64_t i, int u, auto lane) __attribute__((always_inline)) {
        sums[u] += vexp_one(logit(i, lane) - subtracted);
        fetch(x + a.logits.stride + i, u);
      });
    else
      for_vectors<SUMS>(begin, end, [&](int64_t i, int u, auto lane) __attribute__((always_inline)) {
        const vf v = logit(i, lane);
        sums[u] += vexp_one(v - subtracted);
        logits[u] += only(v, lane);
      });
    return {top, total(sums), total(logits)};
  }

  __attribute__((always_inline)) Totals combine(int64_t row, const Partial* segments, int64_t count) const {
    float top = NEG_INF, sum = 0.f, logits = 0.f;
    for (int64_t s = 0; s < count; s++) top = segments[s].top > top ? segments[s].top : top;
    for (int64_t s = 0; s < count; s++) {
      sum += segments[s].top == top ? segments[s].sum : segments[s].sum * expf(segments[s].top - top);
      logits += segments[s].logits;
    }
    const float lse = top + logf(sum);
    a.lse[row] = lse;
    const int64_t target = a.target[row];
    if (target == a.ignore_index) {
      a.loss[row] = 0.f;
      return {};
    }
    const float x = to_float(((const T*)a.logits.data)[row * a.logits.stride + target]), e = (float)a.label_smoothing;
    const float at_target = SOFTCAP ? (float)a.softcap * tanhf(x * (float)(1. / a.softcap)) : x;
    // What is alike is subtracted first; without smoothing the mean may be infinite and is not looked at.
    float loss = e == 0.f ? lse - at_target : (1.f - e) * (lse - at_target) + e * (lse - logits / (float)a.columns);
    if (a.z_loss != 0.) loss += (float)a.z_loss * lse * lse;
    a.loss[row] = loss;
    return {};
  }

  void finish(int64_t, int64_t, int64_t, Totals, const float*, float*) const {}
};

template <class T, bool SOFTCAP>
int backward(const CrossEntropyBwdArgs& args) {
  const CrossEntropyArgs& a = args.forward;
  const int64_t stride = args.dlogits.stride;
  const Output<T> dlogits(args.dlogits.data, a.rows, stride);
  for_segments(a.rows, a.columns, a.num_threads, [&](int64_t row, int64_t begin, int64_t end) __attribute__((always_inline)) {
    const T* x = (const T*)a.logits.data + row * a.logits.stride;
    const bool ignored = a.target[row] == a.ignore_index;
    const float dloss = ignored ? 0.f : args.dloss[row * args.stride_dloss], lse = a.lse[row], e = (float)a.label_smoothing;
    const float dlse = args.dlse ? args.dlse[row * args.stride_dlse] : 0.f;
    const float of_softmax = dloss * (1.f + 2.f * (float)a.z_loss * lse) + dlse;
    const vf factor = broadcast(of_softmax), everywhere = broadcast(dloss * e / (float)args.classes);
    const float at_target = dloss * (1.f - e);
    const int64_t target = ignored ? -1 : a.target[row] - args.first_class, target_vector = begin + (target - begin) / VW * VW;
    if (ignored && dlse == 0.f) {
      for_vectors<1>(begin, end, [&](int64_t i, int, auto lane) __attribute__((always_inline)) { dlogits.put(row * stride + i, (vf){}, lane); });
      return;
    }
    for_vectors<2>(begin, end, [&](int64_t i, int, auto lane) __attribute__((always_inline)) {
      vf v = load(x + i, lane), slope = {};
      if constexpr (SOFTCAP) {
        const vf tanh = vtanh(v * broadcast((float)(1. / a.softcap)));
        slope = broadcast(1.f) - tanh * tanh;
        v = tanh * broadcast((float)a.softcap);
      }
      vf d = vexp_one(v - broadcast(lse)) * factor - everywhere;
      if (i == target_vector) {
        const vi at = lanes() == broadcast_int((int32_t)(target - i));
        d = at ? d - broadcast(at_target) : d;
      }
      if constexpr (SOFTCAP) d = d * slope;
      dlogits.put(row * stride + i, d, lane);
    });
  });
  return ONEPASS_OK;
}

}  // namespace

extern "C" int ONEPASS_KERNEL(cross_entropy_fwd)(const CrossEntropyArgs* args) {
  const CrossEntropyArgs& a = *args;
  if (!targets_in_range(a, a.columns)) return ONEPASS_BAD_INDEX;
#define CAPPED(T) for_rows(Forward<T, true>{{}, a}, a.rows, a.columns, a.num_threads)
#define PLAIN(T) for_rows(Forward<T, false>{{}, a}, a.rows, a.columns, a.num_threads)
  if (a.softcap != 0.) ONEPASS_BY_DTYPE(a.dtype, CAPPED)
  ONEPASS_BY_DTYPE(a.dtype, PLAIN)
}

extern "C" int ONEPASS_KERNEL(cross_entropy_bwd)(const CrossEntropyBwdArgs* args) {
  const CrossEntropyArgs& a = args->forward;
  if (!targets_in_range(a, args->classes)) return ONEPASS_BAD_INDEX;
#define CAPPED_BWD(T) backward<T, true>(*args)
#define PLAIN_BWD(T) backward<T, false>(*args)
  if (a.softcap != 0.) ONEPASS_BY_DTYPE(a.dtype, CAPPED_BWD)
  ONEPASS_BY_DTYPE(a.dtype, PLAIN_BWD)
}
