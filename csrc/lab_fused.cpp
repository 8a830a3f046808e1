// Step 3, fused: one loop over the rows does all three things, so the matrix of scores is never there.
//
// A query's output needs only its own row of S. Each thread therefore keeps one row of seqlen_k scores, small enough to
// stay in its cache, and turns it into weights and then into the output before it takes the next query. Working memory
// falls from seqlen_q x seqlen_k to threads x seqlen_k; the price is that K and V are again read once for every query.
#include "lab_rows.h"

extern "C" int ONEPASS_KERNEL(lab_fused)(const LabAttentionArgs* a) {
  const int64_t rows = a->batch * a->nheads_q * a->seqlen_q, row_floats = round_up(a->seqlen_k, VW);
  const int threads = team_size(a, rows);
  float* buffers = allocate(a, threads * row_floats);
  if (!buffers) return ONEPASS_OUT_OF_MEMORY;

#pragma omp parallel num_threads(threads)
  {
    float* scores = buffers + omp_get_thread_num() * row_floats;
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < rows; row++) {
      const int64_t i = row % a->seqlen_q, keys = visible_keys(a, i);
      const Head head = head_of(a, row / a->seqlen_q);
      float* out = head.out + i * head.out_stride;
      score_row(head.q + i * head.q_stride, head.k, head.k_stride, keys, a->head_dim, (float)a->softmax_scale, scores);
      softmax_row(scores, keys);
      clear_row(out, a->head_dim_v);
      value_row(scores, head.v, head.v_stride, keys, a->head_dim_v, out);
    }
  }
  free(buffers);
  return ONEPASS_OK;
}
