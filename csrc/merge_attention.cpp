// Merges results of attention over disjoint sets of keys: parts are weighted by exp(lse - max lse). And its gradient.
//
//   w[n] = exp(lse[n] - lse), lse = log sum exp(lse[n])        out = sum w[n] out[n]
//   d_out[n] = w[n] d_out                                        d_lse[n] = w[n] (d_lse + d_out . (out[n] - out))
#include <cmath>

#include "simd.h"

namespace {

struct Row {  // one query of one head
  int64_t out, lse;
};

ONEPASS_INLINE Row row_at(const MergeArgs& a, int64_t index) {
  const int64_t h = index % a.nheads, s = index / a.nheads % a.seqlen, b = index / a.nheads / a.seqlen;
  return {index * a.head_dim, (b * a.nheads + h) * a.seqlen + s};
}

ONEPASS_INLINE float merged_lse(const MergeArgs& a, int64_t row, int64_t rows) {
  float top = NEG_INF, sum = 0.f;
  for (int64_t n = 0; n < a.parts; n++) {
    const float lse = a.lses[n * rows + row];
    if (lse != lse) return lse;
    if (lse > top) top = lse;
  }
  if (top == NEG_INF || top == -NEG_INF) return top;
  for (int64_t n = 0; n < a.parts; n++) sum += expf(a.lses[n * rows + row] - top);
  return top + logf(sum);
}

// 0 for a part that saw no key, whatever its output holds.
ONEPASS_INLINE float weight(float part_lse, float lse) { return part_lse == NEG_INF ? 0.f : expf(part_lse - lse); }

template <class T>
int merge(const MergeArgs& a) {
  const int64_t rows = a.batch * a.seqlen * a.nheads, size = rows * a.head_dim;
#pragma omp parallel for num_threads((int)a.num_threads) schedule(static) if (size > 16384)
  for (int64_t index = 0; index < rows; index++) {
    const Row row = row_at(a, index);
    const float lse = merged_lse(a, row.lse, rows);
    a.lse[row.lse] = lse;
    T* out = (T*)a.out + row.out;
    for (int64_t d = 0; d < a.head_dim; d += VW) {
      const int64_t count = min_of(VW, a.head_dim - d);
      vf sum = {};
      for (int64_t n = 0; n < a.parts; n++) {
        const float w = weight(a.lses[n * rows + row.lse], lse);
        const T* part = (const T*)a.outs + n * size + row.out + d;
        if (w == 0.f) continue;
        if (count == VW)
          sum += load(part) * broadcast(w);
        else
          for (int64_t x = 0; x < count; x++) sum[x] += to_float(part[x]) * w;
      }
      if (count == VW)
        store(out + d, sum);
      else
        for (int64_t x = 0; x < count; x++) from_float(sum[x], out + d + x);
    }
  }
  return ONEPASS_OK;
}

template <class T>
int merge_bwd(const MergeBwdArgs& args) {
  const MergeArgs& a = args.merge;
  const int64_t rows = a.batch * a.seqlen * a.nheads, size = rows * a.head_dim;
#pragma omp parallel for num_threads((int)a.num_threads) schedule(static) if (size > 16384)
  for (int64_t index = 0; index < rows; index++) {
    const Row row = row_at(a, index);
    const float lse = a.lse[row.lse], d_lse = args.dlse ? args.dlse[row.lse] : 0.f;
    const T *out = (const T*)a.out + row.out, *d_out = (const T*)args.dout + row.out;
    for (int64_t n = 0; n < a.parts; n++) {
      const float w = weight(a.lses[n * rows + row.lse], lse);
      const T* part = (const T*)a.outs + n * size + row.out;
      T* d_part = (T*)args.douts + n * size + row.out;
      float dot = 0.f;
      for (int64_t d = 0; d < a.head_dim; d++) {
        if (w != 0.f) dot += to_float(d_out[d]) * (to_float(part[d]) - to_float(out[d]));
        from_float(w == 0.f ? 0.f : to_float(d_out[d]) * w, d_part + d);
      }
      args.dlses[n * rows + row.lse] = w == 0.f ? 0.f : w * (d_lse + dot);
    }
  }
  return ONEPASS_OK;
}

}  // namespace

extern "C" int ONEPASS_KERNEL(merge_attention)(const MergeArgs* args) {
  switch (args->dtype) {
    case ONEPASS_F32: return merge<float>(*args);
    case ONEPASS_F16: return merge<f16>(*args);
    default: return merge<bf16>(*args);
  }
}

extern "C" int ONEPASS_KERNEL(merge_attention_bwd)(const MergeBwdArgs* args) {
  switch (args->merge.dtype) {
    case ONEPASS_F32: return merge_bwd<float>(*args);
    case ONEPASS_F16: return merge_bwd<f16>(*args);
    default: return merge_bwd<bf16>(*args);
  }
}
