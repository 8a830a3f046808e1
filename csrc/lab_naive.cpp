// Step 1, naive: attention as it is written down, in three loops over the whole matrix of scores.
//
//   S = scale * Q K^T        P = softmax(S), row by row        O = P V
//
// Every thread takes rows, and every row is SIMD inside. Yet all of K and all of V pass by for every single query, and each
// loop streams seqlen_q x seqlen_k floats through memory: written by the first, read and written by the second, read by the
// third. That matrix grows with the square of the length.
#include "lab_rows.h"

extern "C" int ONEPASS_KERNEL(lab_naive)(const LabAttentionArgs* a) {
  // The rows of all heads in one list; a matrix of scores for one head at a time (for more heads when each has few rows).
  const int64_t rows = a->batch * a->nheads_q * a->seqlen_q;
  const int64_t matrix_rows = min_of(rows, max_of(a->seqlen_q, a->num_threads));
  const int64_t row_floats = round_up(a->seqlen_k, VW);
  float* matrix = allocate(a, matrix_rows * row_floats);
  if (!matrix) return ONEPASS_OUT_OF_MEMORY;

#pragma omp parallel num_threads(team_size(a, matrix_rows))
  for (int64_t first = 0; first < rows; first += matrix_rows) {
    const int64_t last = min_of(first + matrix_rows, rows);

#pragma omp for schedule(dynamic)
    for (int64_t row = first; row < last; row++) {
      const int64_t i = row % a->seqlen_q;
      const Head head = head_of(a, row / a->seqlen_q);
      score_rows(1, head.q + i * head.q_stride, head.q_stride, head.k, head.k_stride, visible_keys(a, i), a->head_dim,
                 (float)a->softmax_scale, matrix + (row - first) * row_floats, row_floats);
    }

#pragma omp for schedule(dynamic)
    for (int64_t row = first; row < last; row++)
      softmax_row(matrix + (row - first) * row_floats, visible_keys(a, row % a->seqlen_q), a->seqlen_k);

#pragma omp for schedule(dynamic)
    for (int64_t row = first; row < last; row++) {
      const int64_t i = row % a->seqlen_q;
      const Head head = head_of(a, row / a->seqlen_q);
      float* out = head.out + i * head.out_stride;
      clear_rows(1, a->head_dim_v, out, head.out_stride);
      value_rows(1, matrix + (row - first) * row_floats, row_floats, head.v, head.v_stride, visible_keys(a, i), a->head_dim_v,
                 out, head.out_stride);
    }
  }
  free(matrix);
  return ONEPASS_OK;
}
