// What the four steps of attention share: where a head's data lies, which keys a query sees, memory that is counted.
#pragma once
#include <omp.h>

#include <cstdlib>

#include "abi.h"
#include "simd.h"

// One head's matrices: row i of q starts at q + i * q_stride, and its features are next to one another.
struct Head {
  const float *q, *k, *v;
  float* out;
  int64_t q_stride, k_stride, v_stride, out_stride;
};

ONEPASS_INLINE const float* head_data(const Tensor4& t, int64_t b, int64_t h) {
  return (const float*)t.data + b * t.stride_b + h * t.stride_h;
}

// batch_head counts the query heads of the whole batch; several of them may share one KV head.
ONEPASS_INLINE Head head_of(const LabAttentionArgs* a, int64_t batch_head) {
  const int64_t b = batch_head / a->nheads_q, h = batch_head % a->nheads_q, h_kv = h / (a->nheads_q / a->nheads_kv);
  return {head_data(a->q, b, h),       head_data(a->k, b, h_kv), head_data(a->v, b, h_kv), (float*)head_data(a->out, b, h),
          a->q.stride_s, a->k.stride_s, a->v.stride_s, a->out.stride_s};
}

// How many keys query i sees: all of them, or with the causal mask (aligned to the bottom right corner) the first few.
ONEPASS_INLINE int64_t visible_keys(const LabAttentionArgs* a, int64_t i) {
  if (!a->causal) return a->seqlen_k;
  return max_of(0, min_of(a->seqlen_k, i + 1 + a->seqlen_k - a->seqlen_q));
}

// The only memory a step takes beyond its inputs and output. It is counted where it is allocated.
ONEPASS_INLINE float* allocate(const LabAttentionArgs* a, int64_t floats) {
  const int64_t bytes = round_up(max_of(1, floats) * (int64_t)sizeof(float), 64);
  if (a->working_memory) *a->working_memory = bytes;
  return (float*)aligned_alloc(64, (size_t)bytes);
}

// As many threads as were asked for, but none without work.
ONEPASS_INLINE int team_size(const LabAttentionArgs* a, int64_t work_items) {
  return (int)max_of(1, min_of(a->num_threads, work_items));
}
