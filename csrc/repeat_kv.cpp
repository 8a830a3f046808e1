// Every KV head repeated n_rep times in a row; and its gradient, the sum over each group of repeated heads.
#include "rows.h"

namespace {

// The heads of x (or groups of heads of dout) in order of (b, s, h).
template <class T>
struct Heads {
  const T* data;
  int64_t count, seqlen, nheads, stride_b, stride_s, stride_h;
  bool even;  // one stride leads from each to the next, and no division is needed

  Heads(const RepeatKvArgs& a, int64_t group)
      : data((const T*)a.x.data), count(a.batch * a.seqlen * a.nheads_kv), seqlen(a.seqlen), nheads(a.nheads_kv),
        stride_b(a.x.stride_b), stride_s(a.x.stride_s), stride_h(a.x.stride_h * group) {
    even = (a.seqlen == 1 || stride_s == nheads * stride_h) && (a.batch == 1 || stride_b == seqlen * nheads * stride_h);
  }
  __attribute__((always_inline)) const T* at(int64_t i) const {
    if (even) return data + i * stride_h;
    return data + i / nheads / seqlen * stride_b + i / nheads % seqlen * stride_s + i % nheads * stride_h;
  }
};

template <class T>
int repeat(const RepeatKvArgs& a) {
  const Heads<T> heads(a, 1);
  const Output<T> out(a.out, heads.count * a.n_rep, a.head_dim);
  in_parallel(threads_for(heads.count * a.n_rep * a.head_dim, a.num_threads), [&] {
#pragma omp for schedule(static) nowait
    for (int64_t head = 0; head < heads.count; head++) {
      const T* x = heads.at(head);
      const int64_t at = head * a.n_rep * a.head_dim;
      if (a.x.stride_d != 1)
        for (int64_t r = 0; r < a.n_rep; r++)
          for (int64_t d = 0; d < a.head_dim; d++) out.data[at + r * a.head_dim + d] = x[d * a.x.stride_d];
      else
        for_vectors<2>(0, a.head_dim, [&](int64_t i, int, auto lane) __attribute__((always_inline)) {
          const vf v = load(x + i, lane);
          for (int64_t r = 0; r < a.n_rep; r++) out.put(at + r * a.head_dim + i, v, lane);
        });
    }
    finish_stores();
  });
  return ONEPASS_OK;
}

// 16-bit floats are copied in pairs, as if each were one of 32 bits; where pairs do not fit, through fp32, which holds every one of them.
bool come_in_pairs(const RepeatKvArgs& a) {
  return a.dtype != ONEPASS_F32 && a.x.stride_d == 1 && (uintptr_t)a.x.data % 4 == 0 &&
         (a.head_dim | a.x.stride_b | a.x.stride_s | a.x.stride_h) % 2 == 0;
}

RepeatKvArgs in_pairs(const RepeatKvArgs& args) {
  RepeatKvArgs a = args;
  a.dtype = ONEPASS_F32;
  a.head_dim /= 2;
  a.x.stride_b /= 2, a.x.stride_s /= 2, a.x.stride_h /= 2;
  return a;
}

template <class T>
int sum_groups(const RepeatKvArgs& a) {
  const Heads<T> groups(a, a.n_rep);
  const Output<T> dx(a.out, groups.count, a.head_dim);
  in_parallel(threads_for(groups.count * a.n_rep * a.head_dim, a.num_threads), [&] {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < groups.count; row++) {
      const T* dout = groups.at(row);
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
  if (come_in_pairs(*args)) return repeat<float>(in_pairs(*args));
  ONEPASS_BY_DTYPE(args->dtype, REPEAT)
}

extern "C" int ONEPASS_KERNEL(repeat_kv_bwd)(const RepeatKvArgs* args) {
#define SUM_GROUPS(T) sum_groups<T>(*args)
  ONEPASS_BY_DTYPE(args->dtype, SUM_GROUPS)
}
