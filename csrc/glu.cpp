// Gated linear units: out = f(gate) * up, with f = silu, gelu, or gelu's approximation by tanh. And their gradient.
#include "functions.h"
#include "rows.h"

namespace {

struct Value { vf f, slope; };

// f(x) = x p(x). As 1 + tanh(y) = 2 sigmoid(2 y), gelu's approximation is a sigmoid too.
template <int64_t ACTIVATION>
ONEPASS_INLINE vf activation(vf x) {
  if constexpr (ACTIVATION == ONEPASS_GELU) return x * normal_distribution(x).below;
  if constexpr (ACTIVATION == ONEPASS_SILU) return x * vsigmoid(x);
  return x * vsigmoid(x * (broadcast(1.5957691216f) + broadcast(0.0713548163f) * (x * x)));
}
template <int64_t ACTIVATION>
ONEPASS_INLINE Value activation_and_slope(vf x) {
  const vf one = broadcast(1.f);
  if constexpr (ACTIVATION == ONEPASS_GELU) {
    const Normal n = normal_distribution(x);
    return {x * n.below, n.below + x * n.bell * broadcast(0.3989422804f)};
  }
  if constexpr (ACTIVATION == ONEPASS_SILU) {
    const vf p = vsigmoid(x);
    return {x * p, p * (one + x * (one - p))};
  }
  // 2 (2 / pi)^1/2, and that * 0.044715. Far from 0 the slope's second term is 0: there u must not become infinite.
  const vf linear = broadcast(1.5957691216f), cubic = broadcast(0.0713548163f), far = broadcast(400.f);
  const vf u = x * x < far ? x * x : far;
  const vf p = vsigmoid(x * (linear + cubic * u));
  return {x * p, p + x * p * (one - p) * (linear + broadcast(3.f) * cubic * u)};
}

// One long row where the tensors leave no gaps: segments then have one length whatever the columns are.
template <class Args>
ONEPASS_INLINE Args joined(const Args& args, bool contiguous) {
  Args a = args;
  if (contiguous) {
    a.columns *= a.rows;
    a.rows = 1;
  }
  return a;
}

template <class T, int64_t ACTIVATION>
int forward(const GluArgs& args) {
  const Output<T> out(args.out, args.rows, args.columns);
  const GluArgs a = joined(args, args.gate.stride == args.columns && args.up.stride == args.columns);
  for_segments(a.rows, a.columns, a.num_threads, [&](int64_t row, int64_t begin, int64_t end) __attribute__((always_inline)) {
    const T *gate = (const T*)a.gate.data + row * a.gate.stride, *up = (const T*)a.up.data + row * a.up.stride;
    for_vectors<2>(begin, end, [&](int64_t i, int, auto lane) __attribute__((always_inline)) {
      out.put(row * a.columns + i, activation<ACTIVATION>(load(gate + i, lane)) * load(up + i, lane), lane);
    });
  });
  return ONEPASS_OK;
}

template <class T, int64_t ACTIVATION>
int backward(const GluBwdArgs& args) {
  const Output<T> dgate(args.dgate, args.rows, args.columns), dup(args.dup, args.rows, args.columns);
  const GluBwdArgs a = joined(args, args.dout.stride == args.columns && args.gate.stride == args.columns && args.up.stride == args.columns);
  for_segments(a.rows, a.columns, a.num_threads, [&](int64_t row, int64_t begin, int64_t end) __attribute__((always_inline)) {
    const T* dout = (const T*)a.dout.data + row * a.dout.stride;
    const T *gate = (const T*)a.gate.data + row * a.gate.stride, *up = (const T*)a.up.data + row * a.up.stride;
    for_vectors<2>(begin, end, [&](int64_t i, int, auto lane) __attribute__((always_inline)) {
      const Value v = activation_and_slope<ACTIVATION>(load(gate + i, lane));
      const vf d = load(dout + i, lane);
      if (dgate.data) dgate.put(row * a.columns + i, d * load(up + i, lane) * v.slope, lane);
      if (dup.data) dup.put(row * a.columns + i, d * v.f, lane);
    });
  });
  return ONEPASS_OK;
}

template <class T>
int forward_of(const GluArgs& a) {
  switch (a.activation) {
    case ONEPASS_SILU: return forward<T, ONEPASS_SILU>(a);
    case ONEPASS_GELU: return forward<T, ONEPASS_GELU>(a);
    default: return forward<T, ONEPASS_GELU_TANH>(a);
  }
}
template <class T>
int backward_of(const GluBwdArgs& a) {
  switch (a.activation) {
    case ONEPASS_SILU: return backward<T, ONEPASS_SILU>(a);
    case ONEPASS_GELU: return backward<T, ONEPASS_GELU>(a);
    default: return backward<T, ONEPASS_GELU_TANH>(a);
  }
}

}  // namespace

extern "C" int ONEPASS_KERNEL(glu_fwd)(const GluArgs* args) {
#define FORWARD(T) forward_of<T>(*args)
  ONEPASS_BY_DTYPE(args->dtype, FORWARD)
}

extern "C" int ONEPASS_KERNEL(glu_bwd)(const GluBwdArgs* args) {
#define BACKWARD(T) backward_of<T>(*args)
  ONEPASS_BY_DTYPE(args->dtype, BACKWARD)
}
