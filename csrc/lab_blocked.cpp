// Step 2, blocked: the two matrix products go tile by tile; the softmax between them is still on its own.
//
// A tile of block_k keys stays in the first-level cache while block_q queries pass over it, so K and V come from further away
// block_q times less often, and four queries at a time share what is loaded from there. At the edges a tile is simply smaller.
// What is left is the matrix of scores: as large as before, and still streamed through memory by every loop.
#include "lab_rows.h"

extern "C" int ONEPASS_KERNEL(lab_blocked)(const LabAttentionArgs* a) {
  const int64_t heads = a->batch * a->nheads_q, block_q = a->block_q, block_k = a->block_k;
  const int64_t tiles_q = ceil_div(a->seqlen_q, block_q), tiles_k = ceil_div(a->seqlen_k, block_k);
  // A matrix of scores for one head at a time, or for as many heads as keep every thread busy.
  const int64_t together = min_of(heads, ceil_div(a->num_threads, max_of(1, tiles_q)));
  const int64_t row_floats = round_up(a->seqlen_k, VW);
  float* matrix = allocate(a, together * a->seqlen_q * row_floats);
  if (!matrix) return ONEPASS_OUT_OF_MEMORY;

#pragma omp parallel num_threads(team_size(a, together * tiles_q * max_of(1, tiles_k)))
  for (int64_t first = 0; first < heads; first += together) {
    const int64_t last = min_of(first + together, heads);

    // S = scale * Q K^T: every tile of S is a task.
#pragma omp for collapse(3) schedule(dynamic)
    for (int64_t h = first; h < last; h++)
      for (int64_t tile_q = 0; tile_q < tiles_q; tile_q++)
        for (int64_t tile_k = 0; tile_k < tiles_k; tile_k++) {
          const Head head = head_of(a, h);
          const int64_t i = tile_q * block_q, rows = min_of(block_q, a->seqlen_q - i);
          const int64_t j = tile_k * block_k, keys = min_of(block_k, visible_keys(a, i + rows - 1) - j);
          score_rows(rows, head.q + i * head.q_stride, head.q_stride, head.k + j * head.k_stride, head.k_stride, keys,
                     a->head_dim, (float)a->softmax_scale, matrix + ((h - first) * a->seqlen_q + i) * row_floats + j, row_floats);
        }

    // P = softmax(S)
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t h = first; h < last; h++)
      for (int64_t i = 0; i < a->seqlen_q; i++)
        softmax_row(matrix + ((h - first) * a->seqlen_q + i) * row_floats, visible_keys(a, i), a->seqlen_k);

    // O = P V: a task owns a tile of O and adds the products with one tile of V after the other.
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t h = first; h < last; h++)
      for (int64_t tile_q = 0; tile_q < tiles_q; tile_q++) {
        const Head head = head_of(a, h);
        const int64_t i = tile_q * block_q, rows = min_of(block_q, a->seqlen_q - i), visible = visible_keys(a, i + rows - 1);
        float* out = head.out + i * head.out_stride;
        clear_rows(rows, a->head_dim_v, out, head.out_stride);
        for (int64_t j = 0; j < visible; j += block_k)
          value_rows(rows, matrix + ((h - first) * a->seqlen_q + i) * row_floats + j, row_floats, head.v + j * head.v_stride,
                     head.v_stride, min_of(block_k, visible - j), a->head_dim_v, out, head.out_stride);
      }
  }
  free(matrix);
  return ONEPASS_OK;
}
