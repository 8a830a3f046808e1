// softmax over rows, and its gradient dx = y * (dy - sum(dy * y)).
//
// x is read from memory once: a segment's exponentials are taken relative to the segment's own maximum and kept, and the
// last pass scales them by exp(segment's maximum - row's maximum) / sum. A row of -inf gives NaN.
#include <cmath>

#include "functions.h"
#include "rows.h"

namespace {

template <class T>
struct Forward : RowOperation {
  static constexpr int64_t scratch = 1;  // the exponentials
  struct Partial { float top, sum; };
  struct Totals { float top, inverse; const Partial* segments; };
  const SoftmaxArgs& a;
  Output<T> y;

  explicit Forward(const SoftmaxArgs& args) : a(args), y(args.y, args.rows, args.columns) {}

  __attribute__((always_inline)) Partial reduce(int64_t row, int64_t begin, int64_t end, float* exponentials) const {
    const T* x = (const T*)a.x.data + row * a.x.stride;
    vf tops[SUMS], sums[SUMS] = {};
#pragma GCC unroll 4
    for (int u = 0; u < SUMS; u++) tops[u] = broadcast(NEG_INF);
    for_vectors<SUMS>(begin, end, [&](int64_t i, int u, auto lane) __attribute__((always_inline)) {
      tops[u] = vmax(tops[u], load(x + i, lane, NEG_INF));
    });
    const float top = horizontal_max(vmax(vmax(tops[0], tops[1]), vmax(tops[2], tops[3])));
    const vf subtracted = broadcast(top == NEG_INF ? 0.f : top);
    for_vectors<SUMS>(begin, end, [&](int64_t i, int u, auto lane) __attribute__((always_inline)) {
      const vf e = vexp_one(load(x + i, lane, NEG_INF) - subtracted);
      fetch(x + a.x.stride + i, u);
      sums[u] += e;
      store(exponentials + i, e, lane);
    });
    return {top, total(sums)};
  }

  __attribute__((always_inline)) Totals combine(int64_t, const Partial* segments, int64_t count) const {
    if (count == 1) return {segments[0].top, 1.f / segments[0].sum, segments};
    float top = NEG_INF, sum = 0.f;
    for (int64_t s = 0; s < count; s++) top = segments[s].top > top ? segments[s].top : top;
    for (int64_t s = 0; s < count; s++) sum += segments[s].sum * expf(segments[s].top - top);
    return {top, 1.f / sum, segments};
  }

  __attribute__((always_inline)) void finish(int64_t row, int64_t begin, int64_t end, Totals t, const float* exponentials, float*) const {
    const float segment_top = t.segments[begin / SEGMENT].top;
    const vf scale = broadcast(segment_top == t.top ? t.inverse : t.inverse * expf(segment_top - t.top));
    for_vectors<4>(begin, end, [&](int64_t i, int, auto lane) __attribute__((always_inline)) {
      y.put(row * a.columns + i, load(exponentials + i, lane) * scale, lane);
    });
  }
};

template <class T>
struct Backward : RowOperation {
  typedef float Partial, Totals;
  const SoftmaxBwdArgs& a;
  Output<T> dx;

  explicit Backward(const SoftmaxBwdArgs& args) : a(args), dx(args.dx, args.rows, args.columns) {}

  const T* y(int64_t row) const { return (const T*)a.y.data + row * a.y.stride; }
  const T* dy(int64_t row) const { return (const T*)a.dy.data + row * a.dy.stride; }

  __attribute__((always_inline)) float reduce(int64_t row, int64_t begin, int64_t end, float*) const {
    vf sums[SUMS] = {};
    for_vectors<SUMS>(begin, end, [&](int64_t i, int u, auto lane) __attribute__((always_inline)) {
      sums[u] += load(y(row) + i, lane) * load(dy(row) + i, lane);
    });
    return total(sums);
  }
  __attribute__((always_inline)) float combine(int64_t, const float* segments, int64_t count) const {
    float sum = 0.f;
    for (int64_t s = 0; s < count; s++) sum += segments[s];
    return sum;
  }
  __attribute__((always_inline)) void finish(int64_t row, int64_t begin, int64_t end, float sum, const float*, float*) const {
    for_vectors<4>(begin, end, [&](int64_t i, int u, auto lane) __attribute__((always_inline)) {
      if (dx.past_caches) {  // smaller rows are in the caches already
        fetch(y(row + 1) + i, u);
        fetch(dy(row + 1) + i, u);
      }
      dx.put(row * a.columns + i, load(y(row) + i, lane) * (load(dy(row) + i, lane) - broadcast(sum)), lane);
    });
  }
};

}  // namespace

extern "C" int ONEPASS_KERNEL(softmax_fwd)(const SoftmaxArgs* args) {
#define FORWARD(T) for_rows(Forward<T>(*args), args->rows, args->columns, args->num_threads)
  ONEPASS_BY_DTYPE(args->dtype, FORWARD)
}

extern "C" int ONEPASS_KERNEL(softmax_bwd)(const SoftmaxBwdArgs* args) {
#define BACKWARD(T) for_rows(Backward<T>(*args), args->rows, args->columns, args->num_threads)
  ONEPASS_BY_DTYPE(args->dtype, BACKWARD)
}
