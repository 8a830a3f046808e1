// The inner loops of the first three steps, one row of scores at a time. Naive, blocked and fused call the same three
// functions; what differs between them, and all that differs, is the order of the calls and where the scores live meanwhile.
#pragma once
#include "lab.h"

// VW vectors to one: lane i of the result is the sum over the lanes of sums[i]. Each round folds two vectors into one, so
// VW - 1 folds do what separate reductions would take VW * log2(VW) for.
ONEPASS_INLINE vf transposed_sum(vf (&sums)[VW]) {
#pragma GCC unroll 4
  for (int half = VW / 2; half > 0; half /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < half; i++)
      sums[i] = interleave_low(sums[i], sums[i + half]) + interleave_high(sums[i], sums[i + half]);
  return sums[0];
}

// scores[j] = scale * dot(q, k_j): vectors run along the features, VW keys at a time.
static void score_row(const float* q, const float* k, int64_t k_stride, int64_t keys, int64_t head_dim, float scale,
                      float* scores) {
  const int64_t whole = head_dim / VW * VW;
  int64_t j = 0;
  for (; j + VW <= keys; j += VW) {
    const float* kj = k + j * k_stride;
    vf sums[VW] = {};
    for (int64_t d = 0; d < whole; d += VW) {
      const vf qd = load(q + d);
#pragma GCC unroll 16
      for (int i = 0; i < VW; i++) sums[i] += qd * load(kj + i * k_stride + d);
    }
    vf total = transposed_sum(sums);
    for (int64_t d = whole; d < head_dim; d++)
#pragma GCC unroll 16
      for (int i = 0; i < VW; i++) total[i] += q[d] * kj[i * k_stride + d];
    store(scores + j, total * scale);
  }
  for (; j < keys; j++) {
    const float* kj = k + j * k_stride;
    vf sum = {};
    for (int64_t d = 0; d < whole; d += VW) sum += load(q + d) * load(kj + d);
    float total = horizontal_sum(sum);
    for (int64_t d = whole; d < head_dim; d++) total += q[d] * kj[d];
    scores[j] = total * scale;
  }
}

// Turns scores into weights that sum to one. Subtracting the row's maximum first keeps every exponential at or below 1,
// however large the scores are. The row's memory is a whole number of vectors; its end is filled with weights of 0.
static void softmax_row(float* scores, int64_t keys) {
  if (keys == 0) return;
  const int64_t padded = round_up(keys, VW);
  for (int64_t j = keys; j < padded; j++) scores[j] = NEG_INF;
  vf highest = load(scores);
  for (int64_t j = VW; j < padded; j += VW) highest = vmax(load(scores + j), highest);
  const float row_max = horizontal_max(highest);
  vf sum = {};
  for (int64_t j = 0; j < padded; j += VW) {
    const vf p = vexp2((load(scores + j) - row_max) * LOG2E);
    store(scores + j, p);
    sum += p;
  }
  const float inverse = 1.0f / horizontal_sum(sum);
  for (int64_t j = 0; j < padded; j += VW) store(scores + j, load(scores + j) * inverse);
}

// out[0 .. WIDTH vectors) += sum over j of weights[j] * v_j, with four chains of additions in flight.
template <int WIDTH>
ONEPASS_INLINE void add_values(const float* weights, const float* v, int64_t v_stride, int64_t keys, float* out) {
  vf sums[4][WIDTH] = {};
  int64_t j = 0;
  for (; j + 4 <= keys; j += 4)
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++)
#pragma GCC unroll 16
      for (int w = 0; w < WIDTH; w++) sums[i][w] += weights[j + i] * load(v + (j + i) * v_stride + w * VW);
  for (; j < keys; j++)
#pragma GCC unroll 16
    for (int w = 0; w < WIDTH; w++) sums[0][w] += weights[j] * load(v + j * v_stride + w * VW);
#pragma GCC unroll 16
  for (int w = 0; w < WIDTH; w++)
    store(out + w * VW, load(out + w * VW) + ((sums[0][w] + sums[1][w]) + (sums[2][w] + sums[3][w])));
}

// out += sum over j of weights[j] * v_j: vectors run along the features, so v is read in place and in order.
static void value_row(const float* weights, const float* v, int64_t v_stride, int64_t keys, int64_t head_dim, float* out) {
  constexpr int64_t SPAN = 256;  // keys summed before they are added to out: a long sum in two short levels rounds less
  for (; keys > 0; keys -= SPAN, weights += SPAN, v += SPAN * v_stride) {
    const int64_t span = min_of(SPAN, keys);
    int64_t d = 0;
    for (; d + 2 * VW <= head_dim; d += 2 * VW) add_values<2>(weights, v + d, v_stride, span, out + d);
    for (; d + VW <= head_dim; d += VW) add_values<1>(weights, v + d, v_stride, span, out + d);
    for (; d < head_dim; d++) {
      float sum = 0.0f;
      for (int64_t j = 0; j < span; j++) sum += weights[j] * v[j * v_stride + d];
      out[d] += sum;
    }
  }
}

ONEPASS_INLINE void clear_row(float* out, int64_t head_dim) { memset(out, 0, (size_t)head_dim * sizeof(float)); }
