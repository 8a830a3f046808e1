// Step 2, blocked: the two matrix products go tile by tile; the softmax between them is still on its own.
//
// The naive loops read all of K and all of V for every single query. Here a tile of block_k keys stays in the first-level
// cache while block_q queries pass over it, so K and V come from further away block_q times less often. At the edges a
// tile is simply smaller. What is left is the matrix of scores: as large as before, and still streamed four times.
#include "lab_rows.h"

extern "C" int ONEPASS_KERNEL(lab_blocked)(const LabAttentionArgs* a) {
  const int64_t heads = a->batch * a->nheads_q, block_q = a->block_q, block_k = a->block_k;
  const int64_t tiles_q = ceil_div(a->seqlen_q, block_q), tiles_k = ceil_div(a->seqlen_k, block_k);
  // A matrix of scores for one head at a time, or for as many heads as keep every thread busy.
  const int64_t together = min_of(heads, ceil_div(a->num_threads, max_of(1, tiles_q)));
  const int64_t row_floats = round_up(a->seqlen_k, VW);
  float* matrix = allocate(a, together * a->seqlen_q * row_floats);
  if (!matrix) return ONEPASS_OUT_OF_MEMORY;

#pragma omp parallel num_threads(team_size(a, together * max_of(tiles_q, tiles_q * tiles_k)))
  for (int64_t first = 0; first < heads; first += together) {
    const int64_t last = min_of(first + together, heads);

    // S = scale * Q K^T: every tile of S is a task of its own.
#pragma omp for collapse(3) schedule(dynamic)
    for (int64_t h = first; h < last; h++)
      for (int64_t tile_q = 0; tile_q < tiles_q; tile_q++)
        for (int64_t tile_k = 0; tile_k < tiles_k; tile_k++) {
          const Head head = head_of(a, h);
          const int64_t i_end = min_of((tile_q + 1) * block_q, a->seqlen_q), j = tile_k * block_k;
          for (int64_t i = tile_q * block_q; i < i_end; i++) {
            const int64_t keys = min_of(block_k, visible_keys(a, i) - j);
            score_row(head.q + i * head.q_stride, head.k + j * head.k_stride, head.k_stride, keys, a->head_dim,
                      (float)a->softmax_scale, matrix + ((h - first) * a->seqlen_q + i) * row_floats + j);
          }
        }

    // P = softmax(S)
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t h = first; h < last; h++)
      for (int64_t i = 0; i < a->seqlen_q; i++)
        softmax_row(matrix + ((h - first) * a->seqlen_q + i) * row_floats, visible_keys(a, i));

    // O = P V: a task owns a tile of O and adds one tile product after the other to it.
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t h = first; h < last; h++)
      for (int64_t tile_q = 0; tile_q < tiles_q; tile_q++) {
        const Head head = head_of(a, h);
        const int64_t i_begin = tile_q * block_q, i_end = min_of(i_begin + block_q, a->seqlen_q);
        for (int64_t i = i_begin; i < i_end; i++) clear_row(head.out + i * head.out_stride, a->head_dim_v);
        for (int64_t j = 0; j < a->seqlen_k; j += block_k)
          for (int64_t i = i_begin; i < i_end; i++) {
            const int64_t keys = min_of(block_k, visible_keys(a, i) - j);
            value_row(matrix + ((h - first) * a->seqlen_q + i) * row_floats + j, head.v + j * head.v_stride, head.v_stride,
                      keys, a->head_dim_v, head.out + i * head.out_stride);
          }
      }
  }
  free(matrix);
  return ONEPASS_OK;
}
