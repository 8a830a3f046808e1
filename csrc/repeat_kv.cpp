// Every KV head repeated n_rep times in a row; and its gradient, the sum over each group of repeated heads.
#include "rows.h"

namespace {

template <class T>
ONEPASS_INLINE const T* head_of(const Tensor4& x, int64_t b, int64_t s, int64_t h) {
  return (const T*)x.data + b * x.stride_b + s * x.stride_s + h * x.stride_h;
}

// fp32 holds every 16-bit float, so that going through it copies.
template <class T>
int repeat(const RepeatKvArgs& a) {
  const int64_t rows = a.batch * a.seqlen * a.nheads_kv;
  const Output<T> out(a.out, rows * a.n_rep, a.head_dim);
  in_parallel(threads_for(rows * a.n_rep * a.head_dim, a.num_threads), [&] {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++) {
      const int64_t h = row % a.nheads_kv, s = row / a.nheads_kv % a.seqlen, b = row / a.nheads_kv / a.seqlen;
      const T* x = head_of<T>(a.x, b, s, h);
      for (int64_t r = 0; r < a.n_rep; r++) {
        const int64_t at = (row * a.n_rep + r) * a.head_dim;
        if (a.x.stride_d != 1)
          for (int64_t d = 0; d < a.head_dim; d++) out.data[at + d] = x[d * a.x.stride_d];
        else
          for_vectors<4>(0, a.head_dim, [&](int64_t i, int, auto lane) __attribute__((always_inline)) { out.put(at + i, load(x + i, lane), lane); });
      }
    }
    finish_stores();
  });
  return ONEPASS_OK;
}

template <class T>
int sum_groups(const RepeatKvArgs& a) {
  const int64_t rows = a.batch * a.seqlen * a.nheads_kv;
  const Output<T> dx(a.out, rows, a.head_dim);
  in_parallel(threads_for(rows * a.n_rep * a.head_dim, a.num_threads), [&] {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++) {
      const int64_t h = row % a.nheads_kv, s = row / a.nheads_kv % a.seqlen, b = row / a.nheads_kv / a.seqlen;
      const T* dout = head_of<T>(a.x, b, s, h * a.n_rep);
      if (a.x.stride_d != 1)
        for (int64_t d = 0; d < a.head_dim; d++) {
          float sum = 0.f;
          for (int64_t r = 0; r < a.n_rep; r++) sum += to_float(dout[r * a.x.stride_h + d * a.x.stride_d]);
          from_float(sum, dx.data + row * a.head_dim + d);
        }
      else
        for_vectors<4>(0, a.head_dim, [&](int64_t i, int, auto lane) __attribute__((always_inline)) {
          vf sum = {};
          for (int64_t r = 0; r < a.n_rep; r++) sum += load(dout + r * a.x.stride_h + i, lane);
          dx.put(row * a.head_dim + i, sum, lane);
        });
    }
    finish_stores();
  });
  return ONEPASS_OK;
}

}  // namespace

extern "C" int ONEPASS_KERNEL(repeat_kv_fwd)(const RepeatKvArgs* args) {
#define REPEAT(T) repeat<T>(*args)
  ONEPASS_BY_DTYPE(args->dtype, REPEAT)
}

extern "C" int ONEPASS_KERNEL(repeat_kv_bwd)(const RepeatKvArgs* args) {
#define SUM_GROUPS(T) sum_groups<T>(*args)
  ONEPASS_BY_DTYPE(args->dtype, SUM_GROUPS)
}
