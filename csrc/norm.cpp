// rms_norm and layer_norm of x, or of z = x + residual rounded to residual_out's dtype; and their gradient.
//
//   xhat = (z - mean) * rstd        rstd = (mean((z - mean)^2) + eps)^-1/2        rms_norm: mean = 0
//   y = xhat * (weight + offset) + bias
//
//   g = dy * (weight + offset)      dz = rstd * (g - xhat * mean(g * xhat) - mean(g)) + dresidual    rms_norm: without mean(g)
//   dweight = sum over rows of dy * xhat        dbias = sum over rows of dy
#include <cmath>

#include "rows.h"

namespace {

ONEPASS_INLINE float element(const void* data, int64_t dtype, int64_t i) {
  switch (dtype) {
    case ONEPASS_F32: return to_float(((const float*)data)[i]);
    case ONEPASS_F16: return to_float(((const f16*)data)[i]);
    default: return to_float(((const bf16*)data)[i]);
  }
}

// A parameter as fp32 plus `offset`, in `memory` unless it is there already. Null stays null.
const float* widened(const void* data, int64_t dtype, float offset, int64_t columns, float* memory) {
  if (!data || (dtype == ONEPASS_F32 && offset == 0.f)) return (const float*)data;
  for (int64_t i = 0; i < columns; i++) memory[i] = element(data, dtype, i) + offset;
  return memory;
}

// The mean of a piece of a row, and the sum of squared differences from it; rms_norm has mean = 0.
struct Moments { float mean, squares; };

template <class X, class R, bool RESIDUAL, bool CENTER>
struct Forward : RowOperation {
  typedef Moments Partial;
  struct Totals { float mean, rstd; };
  const NormArgs& a;
  const float *scale, *bias;
  Output<X> y;
  Output<R> residual_out;

  Forward(const NormArgs& args, const float* scale_, const float* bias_)
      : a(args), scale(scale_), bias(bias_), y(args.y, args.rows, args.columns),
        residual_out(args.residual_out, args.rows, args.columns) {}

  template <class Lane>
  __attribute__((always_inline)) vf z(int64_t row, int64_t i, Lane lane) const {
    const vf x = load((const X*)a.x.data + row * a.x.stride + i, lane);
    if constexpr (!RESIDUAL) return x;
    return rounded((const R*)nullptr, x + load((const R*)a.residual.data + row * a.residual.stride + i, lane));
  }

  __attribute__((always_inline)) Moments reduce(int64_t row, int64_t begin, int64_t end, float*) const {
    vf sums[SUMS] = {}, squares[SUMS] = {};
    float mean = 0.f;
    if constexpr (CENTER) {
      for_vectors<SUMS>(begin, end, [&](int64_t i, int u, auto lane) __attribute__((always_inline)) { sums[u] += z(row, i, lane); });
      mean = total(sums) / (float)(end - begin);
    }
    for_vectors<SUMS>(begin, end, [&](int64_t i, int u, auto lane) __attribute__((always_inline)) {
      const vf difference = CENTER ? only(z(row, i, lane) - broadcast(mean), lane) : z(row, i, lane);
      squares[u] += difference * difference;
      if (CENTER && !y.past_caches) __builtin_prefetch(y.data + row * a.columns + i, 1, 3);  // this pass leaves memory idle
    });
    return {mean, total(squares)};
  }

  // Means and squares of pieces are merged as Chan, Golub and LeVeque (1979) do, which cancels nothing.
  __attribute__((always_inline)) Totals combine(int64_t row, const Moments* pieces, int64_t count) const {
    float mean = pieces[0].mean, squares = pieces[0].squares;
    for (int64_t s = 1; s < count; s++) {
      squares += pieces[s].squares;
      if constexpr (CENTER) {
        const float before = (float)(s * SEGMENT), added = (float)(min_of(a.columns, (s + 1) * SEGMENT) - s * SEGMENT);
        const float step = pieces[s].mean - mean;
        mean += step * (added / (before + added));
        squares += step * step * (before * added / (before + added));
      }
    }
    const float rstd = 1.f / sqrtf(squares / (float)a.columns + (float)a.eps);
    if (a.rstd) a.rstd[row] = rstd;
    if (CENTER && a.mean) a.mean[row] = mean;
    return {mean, rstd};
  }

  __attribute__((always_inline)) void finish(int64_t row, int64_t begin, int64_t end, Totals t, const float*, float*) const {
    const vf mean = broadcast(t.mean), rstd = broadcast(t.rstd);
    for_vectors<4>(begin, end, [&](int64_t i, int u, auto lane) __attribute__((always_inline)) {
      const vf v = z(row, i, lane);
      fetch((const X*)a.x.data + (row + 1) * a.x.stride + i, u);
      if constexpr (RESIDUAL) fetch((const R*)a.residual.data + (row + 1) * a.residual.stride + i, u);
      if constexpr (RESIDUAL) residual_out.put(row * a.columns + i, v, lane);
      vf result = (CENTER ? v - mean : v) * rstd;
      if (scale) result = result * load(scale + i, lane);
      if (bias) result = result + load(bias + i, lane);
      y.put(row * a.columns + i, result, lane);
    });
  }
};

template <class X, class R, bool RESIDUAL>
int forward(const NormArgs& a, const float* scale, const float* bias) {
  if (a.center) return for_rows(Forward<X, R, RESIDUAL, true>(a, scale, bias), a.rows, a.columns, a.num_threads);
  return for_rows(Forward<X, R, RESIDUAL, false>(a, scale, bias), a.rows, a.columns, a.num_threads);
}

template <class DY, class X, bool CENTER>
struct Backward : RowOperation {
  // For each column the sums for dweight and dbias over the last rows, then over the rows before them: the first stay short, so both stay accurate.
  static constexpr int64_t column_sums = 4;
  struct Partial { float gx, g; };
  typedef Partial Totals;
  const NormBwdArgs& a;
  const float* scale;
  Output<X> dx;

  Backward(const NormBwdArgs& args, const float* scale_) : a(args), scale(scale_), dx(args.dx, args.rows, args.columns) {}

  struct Vectors { vf dy, g, xhat; };
  template <class Lane>
  __attribute__((always_inline)) Vectors vectors(int64_t row, int64_t i, Lane lane) const {
    const vf dy = load((const DY*)a.dy.data + row * a.dy.stride + i, lane);
    const vf x = load((const X*)a.x.data + row * a.x.stride + i, lane);
    const vf xhat = (CENTER ? x - broadcast(a.mean[row]) : x) * broadcast(a.rstd[row]);
    return {dy, scale ? dy * load(scale + i, lane) : dy, xhat};
  }

  __attribute__((always_inline)) Partial reduce(int64_t row, int64_t begin, int64_t end, float*) const {
    if (!a.dx) return {};
    vf gx[SUMS] = {}, g[SUMS] = {};
    for_vectors<SUMS>(begin, end, [&](int64_t i, int u, auto lane) __attribute__((always_inline)) {
      const Vectors v = vectors(row, i, lane);
      gx[u] += v.g * v.xhat;
      if (CENTER) g[u] += v.g;
    });
    return {total(gx), CENTER ? total(g) : 0.f};
  }

  __attribute__((always_inline)) Totals combine(int64_t, const Partial* pieces, int64_t count) const {
    Totals t = {};
    for (int64_t s = 0; s < count; s++) {
      t.gx += pieces[s].gx;
      t.g += pieces[s].g;
    }
    return {t.gx / (float)a.columns, t.g / (float)a.columns};
  }

  __attribute__((always_inline)) void finish(int64_t row, int64_t begin, int64_t end, Totals t, const float*, float* sums) const {
    const vf rstd = broadcast(a.rstd[row]), mean_gx = broadcast(t.gx), mean_g = broadcast(t.g);
    float *weight_sum = sums, *bias_sum = sums + a.columns;
    for_vectors<4>(begin, end, [&](int64_t i, int u, auto lane) __attribute__((always_inline)) {
      const Vectors v = vectors(row, i, lane);
      if (dx.past_caches) {  // smaller rows are in the caches already
        fetch((const X*)a.x.data + (row + 1) * a.x.stride + i, u);
        fetch((const DY*)a.dy.data + (row + 1) * a.dy.stride + i, u);
      }
      if (a.dx) {
        vf result = v.g - v.xhat * mean_gx;
        if (CENTER) result = result - mean_g;
        result = result * rstd;
        if (a.dresidual.data) result = result + load((const X*)a.dresidual.data + row * a.dresidual.stride + i, lane);
        dx.put(row * a.columns + i, result, lane);
      }
      if (a.dweight) store(weight_sum + i, load(weight_sum + i, lane) + v.dy * v.xhat, lane);
      if (a.dbias) store(bias_sum + i, load(bias_sum + i, lane) + v.dy, lane);
    });
  }

  // Moves the sums over the last rows to those before them.
  void flush(float* sums) const {
    for (int64_t i = 0; i < 2 * a.columns; i++) {
      sums[2 * a.columns + i] += sums[i];
      sums[i] = 0.f;
    }
  }

  void add_sums(const float* sums, int64_t threads, int64_t size, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; i++) {
      float weight = 0.f, bias = 0.f;
      for (int64_t n = 0; n < threads; n++) {
        const float* of_thread = sums + n * size + i;
        weight += of_thread[0] + of_thread[2 * a.columns];
        bias += of_thread[a.columns] + of_thread[3 * a.columns];
      }
      if (a.dweight) set(a.dweight, a.weight_dtype, i, weight);
      if (a.dbias) set(a.dbias, a.bias_dtype, i, bias);
    }
  }
  static void set(void* data, int64_t dtype, int64_t i, float value) {
    switch (dtype) {
      case ONEPASS_F32: return from_float(value, (float*)data + i);
      case ONEPASS_F16: return from_float(value, (f16*)data + i);
      default: return from_float(value, (bf16*)data + i);
    }
  }
};

template <class DY, class X>
int backward(const NormBwdArgs& a, const float* scale) {
  if (a.center) return for_rows(Backward<DY, X, true>(a, scale), a.rows, a.columns, a.num_threads);
  return for_rows(Backward<DY, X, false>(a, scale), a.rows, a.columns, a.num_threads);
}

// x and residual have one dtype, or residual has fp32; so have dy and x.
constexpr int64_t both(int64_t narrow, int64_t wide) { return narrow * 3 + wide; }

}  // namespace

extern "C" int ONEPASS_KERNEL(norm_fwd)(const NormArgs* args) {
  const NormArgs& a = *args;
  Workspace w;
  w.take<float>(a.columns), w.take<float>(a.columns);
  if (!w.allocate()) return ONEPASS_OUT_OF_MEMORY;
  const float* scale = widened(a.weight, a.weight_dtype, (float)a.offset, a.columns, w.take<float>(a.columns));
  const float* bias = widened(a.bias, a.bias_dtype, 0.f, a.columns, w.take<float>(a.columns));
  if (!a.residual.data) {
#define FORWARD(T) forward<T, T, false>(a, scale, bias)
    ONEPASS_BY_DTYPE(a.dtype, FORWARD)
  }
  switch (both(a.dtype, a.residual_dtype)) {
    case both(ONEPASS_BF16, ONEPASS_F32): return forward<bf16, float, true>(a, scale, bias);
    case both(ONEPASS_F16, ONEPASS_F32): return forward<f16, float, true>(a, scale, bias);
    case both(ONEPASS_BF16, ONEPASS_BF16): return forward<bf16, bf16, true>(a, scale, bias);
    case both(ONEPASS_F16, ONEPASS_F16): return forward<f16, f16, true>(a, scale, bias);
    default: return forward<float, float, true>(a, scale, bias);
  }
}

extern "C" int ONEPASS_KERNEL(norm_bwd)(const NormBwdArgs* args) {
  const NormBwdArgs& a = *args;
  Workspace w;
  w.take<float>(a.columns);
  if (!w.allocate()) return ONEPASS_OUT_OF_MEMORY;
  const float* scale = widened(a.weight, a.weight_dtype, (float)a.offset, a.columns, w.take<float>(a.columns));
  switch (both(a.dy_dtype, a.dtype)) {
    case both(ONEPASS_BF16, ONEPASS_F32): return backward<bf16, float>(a, scale);
    case both(ONEPASS_F16, ONEPASS_F32): return backward<f16, float>(a, scale);
    case both(ONEPASS_BF16, ONEPASS_BF16): return backward<bf16, bf16>(a, scale);
    case both(ONEPASS_F16, ONEPASS_F16): return backward<f16, f16>(a, scale);
    default: return backward<float, float>(a, scale);
  }
}
