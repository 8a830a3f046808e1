// The inner loops of the first three steps, all along rows: score_rows, softmax_row, value_rows. Naive, blocked and fused call
// these same three functions; they differ in how many rows a call gets, in the order of the calls, and in where the scores live.
#pragma once
#include "lab.h"

// 2 * HALF vectors to one, by halves: each fold adds two vectors into one that holds half as many partial sums of each. For
// HALF = VW / 2, lane i of the result is the sum over the lanes of sums[i]; VW - 1 folds do what separate sums would take
// VW * log2(VW) for.
template <int HALF>
ONEPASS_INLINE vf fold_sums(vf (&sums)[VW]) {
#pragma GCC unroll 16
  for (int i = 0; i < HALF; i++) sums[i] = interleave_low(sums[i], sums[i + HALF]) + interleave_high(sums[i], sums[i + HALF]);
  if constexpr (HALF > 1) return fold_sums<HALF / 2>(sums);
  return sums[0];
}

// scores[r][j] = scale * dot(q_r, k_j): vectors run along the features, and VW sums (of ROWS rows, VW / ROWS keys each) are in
// the making at a time. A feature vector of k is loaded once for all rows.
template <int ROWS>
static void score_few_rows(const float* q, int64_t q_stride, const float* k, int64_t k_stride, int64_t keys, int64_t head_dim,
                       float scale, float* scores, int64_t scores_stride) {
  constexpr int KEYS = VW / ROWS;
  const int64_t whole = head_dim / VW * VW;
  int64_t j = 0;
  for (; j + KEYS <= keys; j += KEYS) {
    const float* kj = k + j * k_stride;
    vf sums[VW];
#pragma GCC unroll 16
    for (int i = 0; i < VW; i++) sums[i] = (vf){};
    for (int64_t d = 0; d < whole; d += VW)
#pragma GCC unroll 16
      for (int i = 0; i < KEYS; i++) {
        const vf feature = load(kj + i * k_stride + d);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) sums[r * KEYS + i] += load(q + r * q_stride + d) * feature;
      }
    const vf folded = fold_sums<VW / 2>(sums) * scale;
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) memcpy(scores + r * scores_stride + j, (const float*)&folded + r * KEYS, KEYS * sizeof(float));
    for (int64_t d = whole; d < head_dim; d++)
      for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < KEYS; i++) scores[r * scores_stride + j + i] += q[r * q_stride + d] * scale * kj[i * k_stride + d];
  }
  for (; j < keys; j++)
    for (int r = 0; r < ROWS; r++) {
      const float *qr = q + r * q_stride, *kj = k + j * k_stride;
      vf sum = {};
      for (int64_t d = 0; d < whole; d += VW) sum += load(qr + d) * load(kj + d);
      float total = horizontal_sum(sum);
      for (int64_t d = whole; d < head_dim; d++) total += qr[d] * kj[d];
      scores[r * scores_stride + j] = total * scale;
    }
}

// Four rows at a time, then the rest one by one.
static void score_rows(int64_t rows, const float* q, int64_t q_stride, const float* k, int64_t k_stride, int64_t keys,
                       int64_t head_dim, float scale, float* scores, int64_t scores_stride) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4)
    score_few_rows<4>(q + r * q_stride, q_stride, k, k_stride, keys, head_dim, scale, scores + r * scores_stride, scores_stride);
  for (; r < rows; r++)
    score_few_rows<1>(q + r * q_stride, q_stride, k, k_stride, keys, head_dim, scale, scores + r * scores_stride, scores_stride);
}

// Turns a row of scores into weights that sum to one; the weights of the keys past the visible ones are 0. Subtracting the
// row's maximum first keeps every exponential at or below 1, however large the scores are. The row's memory is a whole
// number of vectors.
static void softmax_row(float* scores, int64_t visible, int64_t keys) {
  const int64_t padded = round_up(visible, VW);
  for (int64_t j = visible; j < padded; j++) scores[j] = NEG_INF;
  vf highest = broadcast(NEG_INF), sum = {};
  for (int64_t j = 0; j < padded; j += VW) highest = vmax(load(scores + j), highest);
  const float top = horizontal_max(highest), row_max = top == NEG_INF ? 0.0f : top;  // no -inf - -inf
  for (int64_t j = 0; j < padded; j += VW) {
    const vf p = vexp2((load(scores + j) - row_max) * LOG2E);
    store(scores + j, p);
    sum += p;
  }
  const float total = horizontal_sum(sum), inverse = total == 0.0f ? 0.0f : 1.0f / total;
  for (int64_t j = 0; j < padded; j += VW) store(scores + j, load(scores + j) * inverse);
  for (int64_t j = padded; j < keys; j++) scores[j] = 0.0f;
}

// out (ROWS x WIDTH vectors) += weights (ROWS x keys) v (keys x WIDTH vectors). Each vector of v is loaded once for all rows.
// Four rows, or four chains of keys where there is only one, keep the multipliers busy.
template <int ROWS, int WIDTH>
ONEPASS_INLINE void add_values(const float* weights, int64_t weights_stride, const float* v, int64_t v_stride, int64_t keys,
                               float* out, int64_t out_stride) {
  constexpr int CHAINS = 4 / ROWS;
  vf sums[CHAINS][ROWS][WIDTH] = {};
  int64_t j = 0;
  for (; j + CHAINS <= keys; j += CHAINS)
#pragma GCC unroll 16
    for (int c = 0; c < CHAINS; c++)
#pragma GCC unroll 16
      for (int w = 0; w < WIDTH; w++) {
        const vf value = load(v + (j + c) * v_stride + w * VW);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) sums[c][r][w] += weights[r * weights_stride + j + c] * value;
      }
  for (; j < keys; j++)
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
      for (int w = 0; w < WIDTH; w++) sums[0][r][w] += weights[r * weights_stride + j] * load(v + j * v_stride + w * VW);
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
    for (int w = 0; w < WIDTH; w++) {
      vf sum = sums[0][r][w];
#pragma GCC unroll 16
      for (int c = 1; c < CHAINS; c++) sum += sums[c][r][w];
      float* to = out + r * out_stride + w * VW;
      store(to, load(to) + sum);
    }
}

// out (ROWS x head_dim) += weights (ROWS x keys) v (keys x head_dim): vectors run along the features, so v is read in place.
template <int ROWS>
static void value_few_rows(const float* weights, int64_t weights_stride, const float* v, int64_t v_stride, int64_t keys,
                       int64_t head_dim, float* out, int64_t out_stride) {
  constexpr int64_t SPAN = 256;  // keys summed before they are added to out: a long sum in two short levels rounds less
  for (; keys > 0; keys -= SPAN, weights += SPAN, v += SPAN * v_stride) {
    const int64_t span = min_of(SPAN, keys);
    int64_t d = 0;
    for (; d + 2 * VW <= head_dim; d += 2 * VW)
      add_values<ROWS, 2>(weights, weights_stride, v + d, v_stride, span, out + d, out_stride);
    for (; d + VW <= head_dim; d += VW)
      add_values<ROWS, 1>(weights, weights_stride, v + d, v_stride, span, out + d, out_stride);
    for (; d < head_dim; d++)
      for (int r = 0; r < ROWS; r++) {
        float sum = 0.0f;
        for (int64_t j = 0; j < span; j++) sum += weights[r * weights_stride + j] * v[j * v_stride + d];
        out[r * out_stride + d] += sum;
      }
  }
}

// Four rows at a time, then the rest one by one.
static void value_rows(int64_t rows, const float* weights, int64_t weights_stride, const float* v, int64_t v_stride,
                       int64_t keys, int64_t head_dim, float* out, int64_t out_stride) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4)
    value_few_rows<4>(weights + r * weights_stride, weights_stride, v, v_stride, keys, head_dim, out + r * out_stride, out_stride);
  for (; r < rows; r++)
    value_few_rows<1>(weights + r * weights_stride, weights_stride, v, v_stride, keys, head_dim, out + r * out_stride, out_stride);
}

static void clear_rows(int64_t rows, int64_t head_dim, float* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; r++) memset(out + r * out_stride, 0, (size_t)head_dim * sizeof(float));
}
