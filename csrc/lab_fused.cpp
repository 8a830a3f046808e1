// Step 3, fused: one loop over the rows does all three things, so the matrix of scores is never there.
//
// A query's output needs only its own row of S. Each thread therefore keeps block_q rows of seqlen_k scores (four, or just
// one), few enough to stay in its cache, and turns them into weights and then into outputs before it takes the next queries.
// Working memory falls from seqlen_q x seqlen_k to threads x block_q x seqlen_k; it still grows with the length, and K and V
// are still read once for every few queries.
#include "lab_rows.h"

extern "C" int ONEPASS_KERNEL(lab_fused)(const LabAttentionArgs* a) {
  const int64_t heads = a->batch * a->nheads_q, block_q = min_of(a->block_q, max_of(1, a->seqlen_q));
  const int64_t blocks = ceil_div(a->seqlen_q, block_q), row_floats = round_up(a->seqlen_k, VW);
  const int threads = team_size(a, heads * blocks);
  float* buffers = allocate(a, threads * block_q * row_floats);
  if (!buffers) return ONEPASS_OUT_OF_MEMORY;

#pragma omp parallel num_threads(threads)
  {
    float* scores = buffers + omp_get_thread_num() * block_q * row_floats;
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t h = 0; h < heads; h++)
      for (int64_t block = 0; block < blocks; block++) {
        const Head head = head_of(a, h);
        const int64_t i = block * block_q, rows = min_of(block_q, a->seqlen_q - i), keys = visible_keys(a, i + rows - 1);
        float* out = head.out + i * head.out_stride;
        score_rows(rows, head.q + i * head.q_stride, head.q_stride, head.k, head.k_stride, keys, a->head_dim,
                   (float)a->softmax_scale, scores, row_floats);
        for (int64_t r = 0; r < rows; r++) softmax_row(scores + r * row_floats, visible_keys(a, i + r), keys);
        clear_rows(rows, a->head_dim_v, out, head.out_stride);
        value_rows(rows, scores, row_floats, head.v, head.v_stride, keys, a->head_dim_v, out, head.out_stride);
      }
  }
  free(buffers);
  return ONEPASS_OK;
}
