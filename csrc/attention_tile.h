// What forward and backward share: which keys a query sees, the masks on a tile of scores, and the packing of inputs into
// the layouts that the micro-kernels read.
//
// A tile of scores is transposed: S^T (keys x queries), keys in rows, queries in the vector lanes. Everything softmax does
// (maximum, sum, rescaling) is then done on whole vectors, one query a lane, with no reduction across lanes.
#pragma once
#include "micro_kernels.h"

constexpr int BLOCK_K = 64;             // keys in a tile
constexpr int BLOCK_Q = TILE_N * VW;    // queries in a tile, and its row length: 48 with AVX-512, 24 with AVX2

// ---- which keys a query sees

ONEPASS_INLINE int64_t first_key(const AttentionProblem& p, int64_t i) {
  return p.window_left < 0 ? 0 : max_of(0, i + p.shift - p.window_left);
}
ONEPASS_INLINE int64_t end_key(const AttentionProblem& p, int64_t i) {
  return p.window_right < 0 ? p.seqlen_k : max_of(0, min_of(p.seqlen_k, i + p.shift + p.window_right + 1));
}

struct KeyMask {  // one batch's row of key_mask; data null: every key is seen
  const uint8_t* data;
  int64_t stride;
  bool sees(int64_t j) const { return !data || data[j * stride]; }
  KeyMask from(int64_t j) const { return {data ? data + j * stride : nullptr, stride}; }
};
ONEPASS_INLINE KeyMask key_mask_of(const AttentionProblem& p, int64_t b) {
  return {p.key_mask ? p.key_mask + b * p.key_mask_stride_b : nullptr, p.key_mask_stride_s};
}

// Whether the mask hides one of the keys.
ONEPASS_INLINE bool hides(KeyMask mask, int64_t keys) {
  for (int64_t j = 0; mask.data && j < keys; j++)
    if (!mask.sees(j)) return true;
  return false;
}

enum class Visible { NONE, SOME, ALL };

ONEPASS_INLINE Visible visible(const AttentionProblem& p, KeyMask mask, int64_t i0, int64_t queries, int64_t j0, int64_t keys) {
  const int64_t i1 = i0 + queries - 1;
  if (j0 >= end_key(p, i1) || j0 + keys <= first_key(p, i0)) return Visible::NONE;
  int64_t seen = keys;
  if (mask.data) {
    seen = 0;
    for (int64_t j = j0; j < j0 + keys; j++) seen += mask.sees(j);
    if (seen == 0) return Visible::NONE;
  }
  const bool all = seen == keys && keys % TILE_M == 0 && first_key(p, i1) <= j0 && j0 + keys <= end_key(p, i0);
  return all ? Visible::ALL : Visible::SOME;
}

namespace {  // of this instruction set alone: a function that is not inlined must not be shared with another's

// Rows of a tile, in whole groups of TILE_M.
struct TileRows {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
  bool has(int64_t r) const { return begin <= r && r < end; }
};

// The rows that hold every key that one of the queries sees, as far as their positions tell (a key mask is not asked).
ONEPASS_INLINE TileRows rows_seen(const AttentionProblem& p, int64_t i0, int64_t queries, int64_t j0, int64_t keys) {
  const int64_t first = max_of(0, first_key(p, i0) - j0), end = min_of(keys, end_key(p, i0 + queries - 1) - j0);
  return first < end ? TileRows{first / TILE_M * TILE_M, round_up(end, TILE_M)} : TileRows{0, 0};
}

struct Vectors {  // of a block's queries
  int begin, end;
  bool operator==(Vectors other) const { return begin == other.begin && end == other.end; }
};

// How a tile of scores is worked on: all vectors of queries together; or, where positions hide a whole group of rows
// from one of them (on the causal diagonal, at the edges of a window), one vector at a time, each with the rows it sees.
template <int N>
struct TileParts {
  const Visible seen;
  bool by_vector = false;
  TileRows rows[N];  // of each vector

  TileParts(const AttentionProblem& p, KeyMask mask, int64_t i0, int64_t queries, int64_t j0, int64_t keys)
      : seen(visible(p, mask, i0, queries, j0, keys)) {
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      const int64_t lane = n * VW, count = min_of(VW, queries - lane);
      rows[n] = seen == Visible::ALL ? TileRows{0, keys} : rows_seen(p, i0 + lane, count, j0, keys);
      by_vector |= rows[n].begin > 0 || rows[n].end < keys;
    }
  }

  // The vectors that have row r; adjacent ones, because both ends of what a query sees grow with the query.
  Vectors vectors_seeing(int64_t r) const {
    Vectors v = {0, N};
    while (v.begin < N && !rows[v.begin].has(r)) v.begin++;
    while (v.end > v.begin && !rows[v.end - 1].has(r)) v.end--;
    return v;
  }
};

}  // namespace

// Sets the unseen scores of these rows to -inf, rows that only pad the tile's keys included; i0 is the first lane's
// query.
template <int N>
ONEPASS_INLINE void mask_tile(float* S, const AttentionProblem& p, KeyMask mask, int64_t i0, int64_t j0, int64_t keys,
                              TileRows rows) {
  constexpr int LANES = N * VW;
  for (int64_t r = rows.begin; r < rows.end; r++) {
    const int64_t j = j0 + r;
    // Key j is seen by the queries i0 + lane with low <= lane <= high.
    int64_t low = p.window_right < 0 ? 0 : j - p.shift - p.window_right - i0;
    int64_t high = p.window_left < 0 ? LANES : j - p.shift + p.window_left - i0;
    if (r >= keys || !mask.sees(j)) low = LANES;
    if (low <= 0 && high >= LANES - 1) continue;
    const vi lo = broadcast_int((int32_t)max_of(0, min_of(low, LANES)));
    const vi hi = broadcast_int((int32_t)max_of(-1, min_of(high, LANES)));
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      const vi lane = lanes() + n * VW;
      float* s = S + r * BLOCK_Q + n * VW;
      store(s, (lane >= lo) & (lane <= hi) ? load(s) : broadcast(NEG_INF));
    }
  }
}

// ---- packing

// dst[d][i] = src[i][d] * scale for i < rows, 0 up to whole vectors; d < depth.
template <class T>
ONEPASS_OUTLINED void pack_transposed(float* dst, const T* src, int64_t stride_s, int64_t stride_d, int64_t rows, int64_t depth,
                                    float scale) {
  const vf factor = broadcast(scale);
  for (int64_t i = 0; i < rows; i += VW) {
    int64_t d = 0;
    if (stride_d == 1)
      for (; d + VW <= depth; d += VW) {
        vf block[VW];
#pragma GCC unroll 16
        for (int x = 0; x < VW; x++) block[x] = i + x < rows ? load(src + (i + x) * stride_s + d) * factor : (vf){};
        transpose(block);
#pragma GCC unroll 16
        for (int x = 0; x < VW; x++) store(dst + (d + x) * BLOCK_Q + i, block[x]);
      }
    for (; d < depth; d++)
      for (int x = 0; x < VW; x++)
        dst[d * BLOCK_Q + i + x] = i + x < rows ? to_float(src[(i + x) * stride_s + d * stride_d]) * scale : 0.f;
  }
}

// dst[r][d] = src[r][d], widened to fp32 and padded with zeros to `padded_rows` rows of `ld`. Hidden rows become zeros,
// so that NaN in them cannot come back as 0 * NaN.
template <class T>
ONEPASS_OUTLINED void pack_rows(float* dst, int64_t ld, int64_t padded_rows, const T* src, int64_t stride_s, int64_t stride_d,
                              int64_t rows, int64_t depth, KeyMask mask) {
  for (int64_t r = 0; r < padded_rows; r++) {
    int64_t d = 0;
    if (r < rows && mask.sees(r)) {
      if (stride_d == 1)
        for (; d + VW <= depth; d += VW) store(dst + r * ld + d, load(src + r * stride_s + d));
      for (; d < depth; d++) dst[r * ld + d] = to_float(src[r * stride_s + d * stride_d]);
    }
    for (; d < ld; d++) dst[r * ld + d] = 0.f;
  }
}

#if ONEPASS_BF16_DOT
ONEPASS_INLINE __m512i load_words(const bf16* p) { return _mm512_loadu_si512(p); }
ONEPASS_INLINE void store_words(bf16* p, __m512i v) { _mm512_storeu_si512(p, v); }
// The first `count` of 32, then zeros; nothing past them is touched.
ONEPASS_INLINE __m512i load_words(const bf16* p, int64_t count) {
  return count >= 2 * VW ? load_words(p) : _mm512_maskz_loadu_epi16(((__mmask32)1 << count) - 1, p);
}

// (a0 b0 a1 b1 ...) of the lower and of the upper 16 of 32 bf16.
ONEPASS_INLINE __m512i pair_low(__m512i a, __m512i b) {
  const __m512i index = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36,
                                         4, 35, 3, 34, 2, 33, 1, 32, 0);
  return _mm512_permutex2var_epi16(a, index, b);
}
ONEPASS_INLINE __m512i pair_high(__m512i a, __m512i b) {
  const __m512i index = _mm512_set_epi16(63, 31, 62, 30, 61, 29, 60, 28, 59, 27, 58, 26, 57, 25, 56, 24, 55, 23, 54, 22, 53, 21,
                                         52, 20, 51, 19, 50, 18, 49, 17, 48, 16);
  return _mm512_permutex2var_epi16(a, index, b);
}

// (a0 b0 a1 b1 ...) of the 32 bf16 a0 ... a15 b0 ... b15.
ONEPASS_INLINE __m512i pair_halves(__m512i a_then_b) {
  const __m512i index = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(index, a_then_b);
}

// dst[d / 2][i][d % 2] = src[i][d] * sign for i < rows, 0 up to whole vectors; an odd depth is padded with zeros. sign
// is 1, -1 or 0.
ONEPASS_OUTLINED void pack_transposed(bf16* dst, const bf16* src, int64_t stride_s, int64_t stride_d, int64_t rows, int64_t depth,
                                    float sign) {
  const __m512i flip = _mm512_set1_epi32(sign < 0 ? (int)0x80008000 : 0);
  for (int64_t i = 0; i < rows; i += VW) {
    int64_t d = 0;
    if (stride_d == 1 && sign != 0)
      for (; d < depth; d += 2 * VW) {
        vf block[VW];
#pragma GCC unroll 16
        for (int x = 0; x < VW; x++) {
          const bf16* from = src + (i + x) * stride_s + d;
          block[x] = i + x < rows ? (vf)_mm512_xor_si512(load_words(from, depth - d), flip) : (vf){};
        }
        transpose(block);
#pragma GCC unroll 16
        for (int x = 0; x < VW; x++)
          if (d + 2 * x < depth) store_words(dst + ((d / 2 + x) * BLOCK_Q + i) * 2, (__m512i)block[x]);
      }
    for (; d < round_up(depth, 2); d++)
      for (int x = 0; x < VW; x++) {
        const bool inside = i + x < rows && d < depth;
        from_float(inside ? to_float(src[(i + x) * stride_s + d * stride_d]) * sign : 0.f,
                   dst + (d / 2 * BLOCK_Q + i + x) * 2 + d % 2);
      }
  }
}

// The same without widening.
ONEPASS_OUTLINED void pack_rows(bf16* dst, int64_t ld, int64_t padded_rows, const bf16* src, int64_t stride_s, int64_t stride_d,
                              int64_t rows, int64_t depth, KeyMask mask) {
  for (int64_t r = 0; r < padded_rows; r++) {
    const bool seen = r < rows && mask.sees(r);
    for (int64_t d = 0; d < ld; d++) dst[r * ld + d] = seen && d < depth ? src[r * stride_s + d * stride_d] : bf16{0};
  }
}

// dst[r / 2][d][r % 2] = src[r][d], padded with zeros to an even number of rows and to depth `ld`; hidden rows are zeros.
ONEPASS_OUTLINED void pack_row_pairs(bf16* dst, int64_t ld, const bf16* src, int64_t stride_s, int64_t stride_d, int64_t rows,
                                   int64_t depth, KeyMask mask) {
  const __m512i zero = _mm512_setzero_si512();
  for (int64_t r = 0; r < rows; r += 2) {
    const bf16 *a = src + r * stride_s, *b = a + stride_s;
    const bool first = mask.sees(r), second = r + 1 < rows && mask.sees(r + 1);
    bf16* out = dst + r * ld;
    int64_t d = 0;
    if (stride_d == 1) {
      for (; d + 2 * VW <= depth; d += 2 * VW) {
        const __m512i low = first ? load_words(a + d) : zero, high = second ? load_words(b + d) : zero;
        store_words(out + 2 * d, pair_low(low, high));
        store_words(out + 2 * d + 2 * VW, pair_high(low, high));
      }
      if (d < depth) {
        const __m512i low = first ? load_words(a + d, depth - d) : zero;
        const __m512i high = second ? load_words(b + d, depth - d) : zero;
        bf16 pairs[4 * VW];
        store_words(pairs, pair_low(low, high));
        store_words(pairs + 2 * VW, pair_high(low, high));
        memcpy(out + 2 * d, pairs, sizeof(bf16) * 2 * (size_t)min_of(2 * VW, ld - d));
        d += 2 * VW;
      }
    }
    for (; d < ld; d++) {
      out[2 * d] = first && d < depth ? a[d * stride_d] : bf16{0};
      out[2 * d + 1] = second && d < depth ? b[d * stride_d] : bf16{0};
    }
  }
}
#endif

// ---- unpacking

// dst[i][d] = src[d][i] * factor[i] for i < rows, d < depth; dst has any row stride and adjacent features.
template <class T>
ONEPASS_OUTLINED void store_transposed(T* dst, int64_t stride_s, const float* src, const float* factor, int64_t rows, int64_t depth) {
  for (int64_t i = 0; i < rows; i += VW) {
    const int64_t count = min_of(VW, rows - i);
    int64_t d = 0;
    for (; d + VW <= depth; d += VW) {
      vf block[VW];
#pragma GCC unroll 16
      for (int x = 0; x < VW; x++) block[x] = load(src + (d + x) * BLOCK_Q + i);
      transpose(block);
      for (int64_t x = 0; x < count; x++) store(dst + (i + x) * stride_s + d, block[x] * broadcast(factor[i + x]));
    }
    for (; d < depth; d++)
      for (int64_t x = 0; x < count; x++) from_float(src[d * BLOCK_Q + i + x] * factor[i + x], dst + (i + x) * stride_s + d);
  }
}

// ---- tiles of keys and values, in place where their layout allows it

template <class Elem>
struct Tile {
  const Elem* data;
  int64_t stride;  // between keys (Fp32 and key tiles), between pairs of keys (value tiles of Bf16Pairs)
};

ONEPASS_INLINE bool is_float(const float*) { return true; }
template <class T>
ONEPASS_INLINE bool is_float(const T*) { return false; }

// Whether rows of keys can be read where they lie: the products' own dtype, adjacent features, whole groups of TILE_M keys.
template <class T>
ONEPASS_INLINE bool rows_usable(Fp32, const T* src, int64_t stride_d, int64_t keys, KeyMask mask) {
  return is_float(src) && stride_d == 1 && keys % TILE_M == 0 && !hides(mask, keys);
}
#if ONEPASS_BF16_DOT
ONEPASS_INLINE bool rows_usable(Bf16Pairs, const bf16*, int64_t stride_d, int64_t keys, KeyMask mask) {
  return stride_d == 1 && keys % TILE_M == 0 && !hides(mask, keys);
}
#endif

// Keys for the product with Q^T: rows of head_dim, a multiple of TILE_M of them, features padded to whole steps.
template <class Compute, class T>
ONEPASS_INLINE Tile<typename Compute::Elem> key_tile(Compute, typename Compute::Elem* scratch, const T* src, int64_t stride_s,
                                                     int64_t stride_d, int64_t keys, int64_t depth, KeyMask mask) {
  if (depth % Compute::STEP == 0 && rows_usable(Compute{}, src, stride_d, keys, mask))
    return {(const typename Compute::Elem*)src, stride_s};
  const int64_t ld = round_up(depth, Compute::STEP);
  pack_rows(scratch, ld, round_up(keys, TILE_M), src, stride_s, stride_d, keys, depth, mask);
  return {scratch, ld};
}

// Values for the product with P^T: rows (Fp32) or pairs of rows, padded to a multiple of TILE_M features.
template <class T>
ONEPASS_INLINE Tile<float> value_tile(Fp32, float* scratch, const T* src, int64_t stride_s, int64_t stride_d, int64_t keys, int64_t depth,
                                      KeyMask mask) {
  if (is_float(src) && stride_d == 1 && depth % TILE_M == 0 && !hides(mask, keys)) return {(const float*)src, stride_s};
  pack_rows(scratch, round_up(depth, TILE_M), keys, src, stride_s, stride_d, keys, depth, mask);
  return {scratch, round_up(depth, TILE_M)};
}
#if ONEPASS_BF16_DOT
ONEPASS_INLINE Tile<bf16> value_tile(Bf16Pairs, bf16* scratch, const bf16* src, int64_t stride_s, int64_t stride_d, int64_t keys,
                                     int64_t depth, KeyMask mask) {
  const int64_t ld = round_up(depth, TILE_M);
  pack_row_pairs(scratch, ld, src, stride_s, stride_d, keys, depth, mask);
  return {scratch, 2 * ld};
}
#endif

// ---- the score product

// S^T = K x Q^T for some rows of a tile. With COLUMN_MAX also the largest score of each query (valid if nothing is
// masked).
template <class Compute, int N, bool COLUMN_MAX>
ONEPASS_INLINE void score_tile(float* S, Tile<typename Compute::Elem> K, TileRows rows, int64_t depth,
                               const typename Compute::Elem* Qt, float* tile_max) {
  constexpr int STEP = Compute::STEP;
  for (int n = 0; COLUMN_MAX && n < N * VW; n++) tile_max[n] = NEG_INF;
  multiply_rows<Compute, N, Into::OVERWRITE, COLUMN_MAX>(
      rows.end - rows.begin, ceil_div(depth, STEP), K.data + rows.begin * K.stride, K.stride, STEP, Qt, BLOCK_Q * STEP,
      S + rows.begin * BLOCK_Q, BLOCK_Q, nullptr, tile_max);
}

// softmax_scale goes into Q where that costs no precision to speak of; bf16 takes its sign (exactly), the magnitude comes after.
struct ScoreScale {
  float into_q, after;
};
ONEPASS_INLINE ScoreScale score_scale(Fp32, double softmax_scale) { return {(float)softmax_scale, 1.f}; }
#if ONEPASS_BF16_DOT
ONEPASS_INLINE ScoreScale score_scale(Bf16Pairs, double softmax_scale) {
  const float scale = (float)softmax_scale;
  if (scale == 0.f) return {0.f, 1.f};
  return scale < 0.f ? ScoreScale{-1.f, -scale} : ScoreScale{1.f, scale};
}
#endif

// Runs CALL with a constant N, the fewest vectors that hold QUERIES (1 to BLOCK_Q of them).
#define ONEPASS_WITH_VECTORS(QUERIES, CALL)                      \
  do {                                                           \
    if ((QUERIES) <= VW) {                                       \
      constexpr int N = 1;                                       \
      CALL;                                                      \
    } else if ((QUERIES) <= 2 * VW) {                            \
      constexpr int N = 2;                                       \
      CALL;                                                      \
    } else {                                                     \
      constexpr int N = 3;                                       \
      CALL;                                                      \
    }                                                            \
  } while (0)
