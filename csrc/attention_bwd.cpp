// Attention backward (FlashAttention-2, Dao 2023, turned for vector lanes). With P = exp(scores - lse), recomputed tile by tile,
//
//   dV = P^T dO      dP = dO V^T      dS = P * (dP - delta)      dQ = scale * dS K      dK = scale * dS^T Q
//
// where delta = rowsum(dO * O) - dlse. Five products a tile, all on transposed tiles (keys x queries).
//
// One piece of work is a KV head and a range of its keys, against all queries of all heads that share it: dK and dV of the
// range are complete at its end, with no atomics. Where heads alone do not keep all cores busy the keys are cut into
// several ranges; each then leaves its own part of dQ, and the parts are added in order, so results repeat bit for bit.
// A bias that several sequences or heads share makes one piece of them: it has the sum of their dS to itself.
//
// With the options (attention_scores.h) P is what was summed in lse, Z P with dropout's factors Z what met V; dS is the bias's
// gradient, and times softcap's slope that of the scaled products. The sink's is - sum of exp(sink - lse) * delta.
#include "attention_bias_gradient.h"
#include "workspace.h"

namespace {

constexpr int64_t MAX_RANGES = 8;

struct Plan {
  int64_t ranges;      // key ranges a head
  int64_t range_keys;  // keys in each, a multiple of BLOCK_K
  Owners owners;       // of the pieces of a range
  int64_t dq_part;     // elements of one
  float* dq_parts;     // (ranges, batch, nheads_q, seqlen_q, head_dim) or (ranges, nheads_q, total_q, head_dim) when ranges > 1
};

template <class Compute>
struct Scratch {
  typedef typename Compute::Elem Elem;
  // Of the key range: its dK and dV so far, and K and V in the layouts of the products.
  float *dK, *dV;
  Elem *K, *V, *K_pairs;
  // Of the query block.
  Elem *Qt, *dOt, *Q_rows, *dO_rows;
  float *dQt, *lse, *delta;
  // Of the tile: scores and dP; then weights and dS by rows of keys, and dS as the dQ product reads it.
  float *S, *dP;
  Elem *P_rows, *dS_rows, *dS;
  float *slope, *keep, *dbias;  // tiles of the options
  int64_t ld, ld_v;              // row length of dK and dV: whole vectors
  int64_t key_depth, val_depth;  // head_dim and head_dim_v padded to TILE_M

  Scratch(Workspace& w, const AttentionProblem& p, int64_t keys) {
    ld = round_up(p.head_dim, VW * Compute::STEP);
    ld_v = round_up(p.head_dim_v, VW * Compute::STEP);
    key_depth = round_up(p.head_dim, TILE_M);
    val_depth = round_up(p.head_dim_v, TILE_M);
    dK = w.take<float>(keys * ld);
    dV = w.take<float>(keys * ld_v);
    K = w.take<Elem>(keys * key_depth);
    V = w.take<Elem>(keys * val_depth);
    K_pairs = Compute::STEP == 1 ? K : w.take<Elem>(keys * key_depth);
    Qt = w.take<Elem>(key_depth * BLOCK_Q);
    dOt = w.take<Elem>(val_depth * BLOCK_Q);
    Q_rows = w.take<Elem>(ld * BLOCK_Q);
    dO_rows = w.take<Elem>(ld_v * BLOCK_Q);
    dQt = w.take<float>(key_depth * BLOCK_Q);
    lse = w.take<float>(BLOCK_Q);
    delta = w.take<float>(BLOCK_Q);
    S = w.take<float>(BLOCK_K * BLOCK_Q);
    dP = w.take<float>(BLOCK_K * BLOCK_Q);
    P_rows = Compute::STEP == 1 ? (Elem*)S : w.take<Elem>(BLOCK_K * BLOCK_Q);
    dS_rows = Compute::STEP == 1 ? (Elem*)dP : w.take<Elem>(BLOCK_K * BLOCK_Q);
    dS = Compute::STEP == 1 ? (Elem*)dP : w.take<Elem>(BLOCK_K * BLOCK_Q);
    const ScoreOptions& o = p.options;
    dbias = o.attn_bias ? w.take<float>(BLOCK_K * BLOCK_Q) : nullptr;
    slope = o.softcap != 0 ? w.take<float>(BLOCK_K * BLOCK_Q) : nullptr;
    keep = o.dropout_p != 0 ? w.take<float>(BLOCK_K * BLOCK_Q) : nullptr;
  }
};

// The query block's rows, for the products that sum over queries; in place where the layout allows.
template <class T>
ONEPASS_INLINE Tile<float> query_rows(Fp32, float* scratch, int64_t ld, const T* src, int64_t stride_s, int64_t stride_d, int64_t rows,
                                      int64_t depth) {
  if (is_float(src) && stride_d == 1 && depth == ld) return {(const float*)src, stride_s};
  pack_rows(scratch, ld, rows, src, stride_s, stride_d, rows, depth, KeyMask{});
  return {scratch, ld};
}
#if ONEPASS_BF16_DOT
ONEPASS_INLINE Tile<bf16> query_rows(Bf16Pairs, bf16* scratch, int64_t ld, const bf16* src, int64_t stride_s, int64_t stride_d,
                                     int64_t rows, int64_t depth) {
  pack_row_pairs(scratch, ld, src, stride_s, stride_d, rows, depth, KeyMask{});
  return {scratch, 2 * ld};
}
#endif

// K for dQ^T = K^T dS: the rows themselves (Fp32), or pairs of keys with features padded to TILE_M.
template <class T>
ONEPASS_INLINE Tile<float> keys_by_feature(Fp32, float*, Tile<float> K, int64_t, const T*, int64_t, int64_t, int64_t, int64_t, KeyMask) {
  return K;
}
#if ONEPASS_BF16_DOT
ONEPASS_INLINE Tile<bf16> keys_by_feature(Bf16Pairs, bf16* scratch, Tile<bf16>, int64_t ld, const bf16* src, int64_t stride_s,
                                          int64_t stride_d, int64_t keys, int64_t depth, KeyMask mask) {
  pack_row_pairs(scratch, ld, src, stride_s, stride_d, keys, depth, mask);
  return {scratch, 2 * ld};
}
#endif

// Rows of a key range: in place, or copied with padding (whole groups of TILE_M keys, `ld` features: a multiple of TILE_M).
template <class Compute, class T>
ONEPASS_INLINE Tile<typename Compute::Elem> range_rows(Compute, typename Compute::Elem* scratch, int64_t ld, const T* src,
                                                       const Tensor4& layout, int64_t keys, int64_t depth, KeyMask mask) {
  if (depth == ld && rows_usable(Compute{}, src, layout.stride_d, keys, mask)) return {(const typename Compute::Elem*)src, layout.stride_s};
  pack_rows(scratch, ld, round_up(keys, TILE_M), src, layout.stride_s, layout.stride_d, keys, depth, mask);
  return {scratch, ld};
}

// acc (keys x depth) += A^T (keys x queries, by rows of keys) x B (queries x depth), in register tiles M keys by N vectors.
template <class Compute, int M, int N>
ONEPASS_INLINE void add_columns(float* acc, int64_t ld, int64_t keys, const typename Compute::Elem* A, int64_t lda,
                                Tile<typename Compute::Elem> B, int64_t d, int64_t queries) {
  for (int64_t j = 0; j < keys; j += M)
    multiply_tile<Compute, M, N, Into::ADD>(ceil_div(queries, Compute::STEP), A + j * lda, lda, Compute::STEP,
                                            B.data + d * Compute::STEP, B.stride, acc + j * ld + d, ld);
}
template <class Compute>
ONEPASS_OUTLINED void add_product(float* acc, int64_t ld, int64_t keys, const typename Compute::Elem* A, int64_t lda,
                                Tile<typename Compute::Elem> B, int64_t queries, int64_t depth) {
#if ONEPASS_VW == 16
  constexpr int WIDE = 4, WIDE_M = 4;  // 4 x 4 accumulators
#else
  constexpr int WIDE = 3, WIDE_M = TILE_M;
#endif
  const int64_t vectors = ceil_div(depth, VW);
  for (int64_t n = 0; n < vectors;) {
    const int64_t left = vectors - n, d = n * VW;
    if (left == WIDE || left > 2 * TILE_N) {
      add_columns<Compute, WIDE_M, WIDE>(acc, ld, keys, A, lda, B, d, queries);
      n += WIDE;
    } else if (left >= 3) {
      add_columns<Compute, TILE_M, 3>(acc, ld, keys, A, lda, B, d, queries);
      n += 3;
    } else if (left == 2) {
      add_columns<Compute, TILE_M, 2>(acc, ld, keys, A, lda, B, d, queries);
      n += 2;
    } else {
      add_columns<Compute, TILE_M, 1>(acc, ld, keys, A, lda, B, d, queries);
      n += 1;
    }
  }
}

ONEPASS_INLINE void store_tile_rows(float* P, float* dS, float*, int64_t j, int n, const vf (&p)[2], const vf (&ds)[2]) {
#pragma GCC unroll 2
  for (int x = 0; x < 2; x++) {
    store(P + (j + x) * BLOCK_Q + n * VW, p[x]);
    store(dS + (j + x) * BLOCK_Q + n * VW, ds[x]);
  }
}
#if ONEPASS_BF16_DOT
ONEPASS_INLINE void store_tile_rows(bf16* P, bf16* dS, bf16* dS_pairs, int64_t j, int n, const vf (&p)[2], const vf (&ds)[2]) {
  const __m512i dh = (__m512i)_mm512_cvtne2ps_pbh((__m512)ds[1], (__m512)ds[0]);
  bf16 *p_row = P + j * BLOCK_Q + n * VW, *d_row = dS + j * BLOCK_Q + n * VW;
  store(p_row, p[0]);
  store(p_row + BLOCK_Q, p[1]);
  _mm256_storeu_si256((__m256i*)d_row, _mm512_castsi512_si256(dh));
  _mm256_storeu_si256((__m256i*)(d_row + BLOCK_Q), _mm512_extracti64x4_epi64(dh, 1));
  store_words(dS_pairs + (j / 2 * BLOCK_Q + n * VW) * 2, pair_halves(dh));
}
#endif

// Scores and dP to P and dS, N vectors from `first` on. MASKED: unseen scores (-inf) give 0 whatever lse, dP and delta
// are: a NaN stays with the keys that its query sees.
template <class Compute, int N, bool MASKED>
ONEPASS_INLINE void gradient_tile(Scratch<Compute>& t, int first, TileRows rows, float scale) {
  const vf factor = broadcast(scale);
#pragma GCC unroll 4
  for (int n = first; n < first + N; n++) {
    const vf lse = load(t.lse + n * VW), delta = load(t.delta + n * VW);
#pragma GCC unroll 2
    for (int64_t j = rows.begin; j < rows.end; j += 2) {
      vf p[2], ds[2];
#pragma GCC unroll 2
      for (int x = 0; x < 2; x++) {
        const vf score = load(t.S + (j + x) * BLOCK_Q + n * VW);
        p[x] = vexp(Compute::STEP == 1 ? score - lse : score * factor - lse);
        ds[x] = p[x] * (load(t.dP + (j + x) * BLOCK_Q + n * VW) - delta);
        if (MASKED) {
          p[x] = score == broadcast(NEG_INF) ? (vf){} : p[x];
          ds[x] = score == broadcast(NEG_INF) ? (vf){} : ds[x];
        }
      }
      store_tile_rows(t.P_rows, t.dS_rows, t.dS, j, n, p, ds);
    }
  }
}

// The same with options: scores are what lse sums, and unseen ones give 0 whatever they are. dbias: where dS is added, or null.
template <class Compute, int N>
ONEPASS_INLINE void gradient_tile(Scratch<Compute>& t, int first, TileRows rows, const HeadOptions& options, BiasTile dbias, int64_t queries) {
  const float *keep = options.keep(), *slope = options.slope();
#pragma GCC unroll 4
  for (int n = first; n < first + N; n++) {
    const vf lse = load(t.lse + n * VW), delta = load(t.delta + n * VW);
    const vi exists = lanes() + n * VW < broadcast_int((int32_t)queries);
    for (int64_t j = rows.begin; j < rows.end; j += 2) {
      vf p[2], ds[2];
#pragma GCC unroll 2
      for (int x = 0; x < 2; x++) {
        const int64_t place = (j + x) * BLOCK_Q + n * VW;
        const vf score = load(t.S + place);
        const vi unseen = score == broadcast(NEG_INF);
        p[x] = vexp(score - lse);
        vf dp = load(t.dP + place), weight = p[x];
        if (keep) {
          const vf factor = load(keep + place);
          dp *= factor;
          weight *= factor;
        }
        ds[x] = unseen ? (vf){} : p[x] * (dp - delta);
        p[x] = unseen ? (vf){} : weight;
        if (dbias.data) {
          float* sum = dbias.data + (j + x) * dbias.stride + n * VW;
          store(sum, load(sum) + (exists ? ds[x] : (vf){}));
        }
        if (slope) ds[x] *= load(slope + place);
      }
      store_tile_rows(t.P_rows, t.dS_rows, t.dS, j, n, p, ds);
    }
  }
}

template <class Compute, class T, bool OPTIONS>
struct Range {  // a KV head of a sequence, and a range of its keys
  typedef typename Compute::Elem Elem;
  Scratch<Compute>& t;
  const AttentionBwdArgs& a;
  const Sequence s;
  const AttentionProblem& p;
  const int64_t h_kv, j_begin, keys;
  const KeyMask mask;
  const ScoreScale scale;
  const BiasGradient& bias_gradient;
  double* const dsink_parts;  // (batch, nheads_q), or null
  HeadOptions options;        // of the query head at work
  float* dq_part;
  Tile<Elem> K, V, K_pairs;

  Range(Scratch<Compute>& scratch, const AttentionBwdArgs& args, const Sequence& sequence, int64_t head, int64_t begin, int64_t count,
        const BiasGradient& dbias, double* dsink)
      : t(scratch), a(args), s(sequence), p(s.p), h_kv(head), j_begin(begin), keys(count), mask(key_mask_of(p, 0)),
        scale(score_scale(Compute{}, p.softmax_scale)), bias_gradient(dbias), dsink_parts(dsink) {
    const T* k = s.key<const T>(a.k, h_kv, j_begin);
    const T* v = s.key<const T>(a.v, h_kv, j_begin);
    const KeyMask range_mask = mask.from(j_begin);
    K = range_rows(Compute{}, t.K, t.key_depth, k, a.k, keys, p.head_dim, range_mask);
    V = range_rows(Compute{}, t.V, t.val_depth, v, a.v, keys, p.head_dim_v, range_mask);
    K_pairs = keys_by_feature(Compute{}, t.K_pairs, K, t.key_depth, k, a.k.stride_s, a.k.stride_d, keys, p.head_dim, range_mask);
    memset(t.dK, 0, sizeof(float) * (size_t)(round_up(keys, TILE_M) * t.ld));
    memset(t.dV, 0, sizeof(float) * (size_t)(round_up(keys, TILE_M) * t.ld_v));
  }

  // lse (+inf where the query saw nothing or does not exist, so that P is 0) and delta of the block.
  void load_statistics(int64_t h, int64_t i0, int64_t queries) {
    const int64_t row = s.row(h, i0);
    for (int64_t i = 0; i < BLOCK_Q; i++) {
      const float lse = i < queries ? a.lse[row + i] : NEG_INF;
      t.lse[i] = lse == NEG_INF ? -NEG_INF : lse;
      t.delta[i] = i < queries && a.dlse ? -a.dlse[row + i] : 0.f;
    }
    for (int64_t i = 0; i < queries; i++) {
      if (t.lse[i] == -NEG_INF) {
        t.delta[i] = 0.f;
        continue;
      }
      const T *o = s.query<const T>(a.out, h, i0 + i), *g = s.query<const T>(a.dout, h, i0 + i);
      vf sum = {};
      int64_t d = 0;
      if (a.out.stride_d == 1 && a.dout.stride_d == 1)
        for (; d + VW <= p.head_dim_v; d += VW) sum += load(o + d) * load(g + d);
      float tail = 0.f;
      for (; d < p.head_dim_v; d++) tail += to_float(o[d * a.out.stride_d]) * to_float(g[d * a.dout.stride_d]);
      t.delta[i] += horizontal_sum(sum) + tail;
    }
  }

  // The first range adds up the sink's gradient: what its share exp(sink - lse) of each query took.
  void add_sink_gradient(int64_t h, int64_t queries) const {
    if (!dsink_parts || j_begin != 0) return;
    const float sink = sink_of(p.options, h);
    double sum = 0;
    for (int64_t i = 0; i < queries; i++)
      if (t.lse[i] != -NEG_INF) sum -= (double)expf(sink - t.lse[i]) * t.delta[i];
    dsink_parts[s.b * p.nheads_q + h] += sum;
  }

  static Tile<Elem> from_query(Tile<Elem> rows, int64_t i) {
    return {rows.data + i / Compute::STEP * rows.stride, rows.stride};
  }

  // Some rows of the tile that begins r keys into the range, against N vectors of queries from the block's vector n on
  // (i0 is the first of these queries): P and dS, and what they add to dQ.
  template <int N>
  __attribute__((always_inline)) void tile_part(int n, TilePlace at, int64_t r, int64_t count, TileRows rows, bool masked, BiasTile dbias) {
    constexpr int STEP = Compute::STEP;
    const int64_t lane = n * VW, steps = ceil_div(min_of(rows.end, count) - rows.begin, STEP);
    const Tile<Elem> tile_K = {K.data + r * K.stride, K.stride}, tile_V = {V.data + r * V.stride, V.stride};
    score_tile<Compute, N, false>(t.S + lane, tile_K, rows, p.head_dim, t.Qt + lane * STEP, nullptr);
    score_tile<Compute, N, false>(t.dP + lane, tile_V, rows, p.head_dim_v, t.dOt + lane * STEP, nullptr);
    if constexpr (OPTIONS) {
      options.template modify<N>(t.S, at, rows, lane);
      if (options.keep()) options.template draw<N>(at, rows, lane);
      if (masked) mask_tile<N>(t.S + lane, p, mask, at.i0, at.j0, count, rows);
      gradient_tile<Compute, N>(t, n, rows, options, dbias, lane + at.queries);
    } else if (masked) {
      mask_tile<N>(t.S + lane, p, mask, at.i0, at.j0, count, rows);
      gradient_tile<Compute, N, true>(t, n, rows, scale.after);
    } else {
      gradient_tile<Compute, N, false>(t, n, rows, scale.after);
    }
    if (a.dq.data) {
      const Elem* keys_from = K_pairs.data + (r + rows.begin) / STEP * K_pairs.stride;
      const Elem* dS = t.dS + rows.begin * BLOCK_Q + lane * STEP;
      multiply_rows<Compute, N, Into::ADD>(t.key_depth, steps, keys_from, STEP, K_pairs.stride, dS, BLOCK_Q * STEP,
                                           t.dQt + lane, BLOCK_Q);
    }
  }

  template <int N>
  __attribute__((always_inline)) void query_block(int64_t h, int64_t i0, int64_t queries) {
    const T *q = s.query<const T>(a.q, h, i0), *g = s.query<const T>(a.dout, h, i0);
    pack_transposed(t.Qt, q, a.q.stride_s, a.q.stride_d, queries, p.head_dim, scale.into_q);
    pack_transposed(t.dOt, g, a.dout.stride_s, a.dout.stride_d, queries, p.head_dim_v, 1.f);
    const auto Q_rows = query_rows(Compute{}, t.Q_rows, t.ld, q, a.q.stride_s, a.q.stride_d, queries, p.head_dim);
    const auto dO_rows = query_rows(Compute{}, t.dO_rows, t.ld_v, g, a.dout.stride_s, a.dout.stride_d, queries, p.head_dim_v);
    load_statistics(h, i0, queries);
    add_sink_gradient(h, queries);
    memset(t.dQt, 0, sizeof(float) * (size_t)(t.key_depth * BLOCK_Q));

    const int64_t last = min_of(j_begin + keys, end_key(p, i0 + queries - 1));
    const int64_t first = max_of(0, first_key(p, i0) - j_begin) / BLOCK_K * BLOCK_K + j_begin;
    for (int64_t j0 = first; j0 < last; j0 += BLOCK_K) {
      const int64_t r = j0 - j_begin, count = min_of(BLOCK_K, keys - r), rows = round_up(count, TILE_M);
      const TileParts<N> parts(p, mask, i0, queries, j0, count);
      if (parts.seen == Visible::NONE) continue;
      const TilePlace at = {i0, queries, j0, count};
      const BiasTile dbias = OPTIONS ? bias_gradient.tile(s.b, h, i0, j0, j_begin, t.dbias) : BiasTile{};
      if (parts.by_vector) {
        for (int n = 0; n < N; n++)
          if (!parts.rows[n].empty())
            tile_part<1>(n, {i0 + n * VW, min_of(VW, queries - n * VW), j0, count}, r, count, parts.rows[n], true, dbias);
      } else {
        tile_part<N>(0, at, r, count, {0, rows}, parts.seen == Visible::SOME, dbias);
      }
      if (OPTIONS) bias_gradient.store(s.b, h, at, dbias);
      if (!a.dk.data) continue;
      for (int64_t begin = 0, end; begin < rows; begin = end) {  // runs of rows that the same vectors of queries see
        const Vectors seeing = parts.vectors_seeing(begin);
        for (end = begin + TILE_M; end < rows && parts.vectors_seeing(end) == seeing;) end += TILE_M;
        const int64_t lane = seeing.begin * VW, summed = min_of(queries, seeing.end * VW) - lane, key = r + begin;
        if (summed <= 0) continue;
        const Elem *P = t.P_rows + begin * BLOCK_Q + lane, *dS = t.dS_rows + begin * BLOCK_Q + lane;
        add_product<Compute>(t.dV + key * t.ld_v, t.ld_v, end - begin, P, BLOCK_Q, from_query(dO_rows, lane), summed,
                             p.head_dim_v);
        add_product<Compute>(t.dK + key * t.ld, t.ld, end - begin, dS, BLOCK_Q, from_query(Q_rows, lane), summed,
                             p.head_dim);
      }
    }
    if (!a.dq.data) return;
    float factor[BLOCK_Q];
    for (int i = 0; i < BLOCK_Q; i++) factor[i] = (float)p.softmax_scale;
    if (dq_part)
      store_transposed(dq_part + s.row(h, i0) * p.head_dim, p.head_dim, t.dQt, factor, queries, p.head_dim);
    else
      store_transposed(s.query<T>(a.dq, h, i0), a.dq.stride_s, t.dQt, factor, queries, p.head_dim);
  }

  void run(float* dq_part_of_range) {
    const int64_t group = p.nheads_q / p.nheads_kv;
    dq_part = dq_part_of_range;
    for (int64_t h = h_kv * group; h < (h_kv + 1) * group; h++) {
      if (OPTIONS) options = HeadOptions(s, h, scale.after, t.slope, t.keep);
      for (int64_t i0 = 0; i0 < p.seqlen_q; i0 += BLOCK_Q) {
        const int64_t queries = min_of(BLOCK_Q, p.seqlen_q - i0);
        ONEPASS_WITH_VECTORS(queries, (query_block<N>(h, i0, queries)));
      }
    }
    if (a.dk.data) {
      for (int64_t r = 0; r < keys; r++) {
        store_row(s.key<T>(a.dk, h_kv, j_begin + r), t.dK + r * t.ld, (float)p.softmax_scale, p.head_dim);
        store_row(s.key<T>(a.dv, h_kv, j_begin + r), t.dV + r * t.ld_v, 1.f, p.head_dim_v);
      }
    }
  }

  __attribute__((always_inline)) static void store_row(T* dst, const float* src, float factor, int64_t depth) {
    int64_t d = 0;
    for (; d + VW <= depth; d += VW) store(dst + d, load(src + d) * broadcast(factor));
    for (; d < depth; d++) from_float(src[d] * factor, dst + d);
  }
};

// The dq of a block of queries of one head = the parts, added in the order of the ranges.
template <class T>
void add_dq_parts(const AttentionBwdArgs& a, const Plan& plan, const Sequence& s, int64_t h, int64_t i0) {
  const int64_t head_dim = s.p.head_dim, ranges = ceil_div(s.p.seqlen_k, plan.range_keys);
  for (int64_t i = i0; i < min_of(i0 + BLOCK_Q, s.p.seqlen_q) && ranges > 0; i++) {
    T* dq = s.query<T>(a.dq, h, i);
    const float* parts = plan.dq_parts + s.row(h, i) * head_dim;
    int64_t d = 0;
    for (; d + VW <= head_dim; d += VW) {
      vf sum = load(parts + d);
      for (int64_t r = 1; r < ranges; r++) sum += load(parts + r * plan.dq_part + d);
      store(dq + d, sum);
    }
    for (; d < head_dim; d++) {
      float sum = parts[d];
      for (int64_t r = 1; r < ranges; r++) sum += parts[r * plan.dq_part + d];
      from_float(sum, dq + d);
    }
  }
}

// Heads alone fill the cores when there are plenty of them or they divide evenly; else up to four pieces of work a thread.
// A range leaves a dQ of its own, so their number is a matter of memory: past MAX_RANGES it follows the threads alone.
Plan make_plan(const AttentionBwdArgs& a, const AttentionProblem& p) {
  const Owners owners = owners_of(a);
  const int64_t heads = owners.count(), tiles = max_of(1, ceil_div(p.seqlen_k, BLOCK_K));
  const bool even = heads >= 4 * p.num_threads || heads % p.num_threads == 0;
  int64_t ranges = even ? 1 : max_of(min_of(MAX_RANGES, ceil_div(4 * p.num_threads, heads)), ceil_div(p.num_threads, heads));
  const int64_t range_keys = BLOCK_K * ceil_div(tiles, min_of(ranges, tiles));
  ranges = max_of(1, ceil_div(p.seqlen_k, range_keys));
  const int64_t rows = a.packed.cu_seqlens_q ? p.nheads_q * a.packed.total_q : p.batch * p.nheads_q * p.seqlen_q;
  return {ranges, range_keys, owners, rows * p.head_dim, nullptr};
}

// One piece of work: the sequences and KV heads of an owner, and a range of their keys.
template <class Compute, class T, bool OPTIONS>
void run_piece(Scratch<Compute>& t, const AttentionBwdArgs& a, const AttentionProblem& p, const Plan& plan, int64_t piece,
               const BiasGradient& dbias, double* dsink_parts) {
  const int64_t owners = plan.owners.count(), owner = piece % owners, j0 = piece / owners * plan.range_keys;
  float* dq_part = plan.dq_parts ? plan.dq_parts + piece / owners * plan.dq_part : nullptr;
  for (int64_t b = plan.owners.first_b(owner); b < plan.owners.end_b(owner); b++) {
    const Sequence s = sequence_of(p, a.packed, b);
    if (j0 >= s.p.seqlen_k) continue;
    for (int64_t h_kv = plan.owners.first_h(owner); h_kv < plan.owners.end_h(owner); h_kv++)
      Range<Compute, T, OPTIONS>(t, a, s, h_kv, j0, min_of(plan.range_keys, s.p.seqlen_k - j0), dbias, dsink_parts).run(dq_part);
  }
}

template <class Compute, class T, bool OPTIONS>
int backward(const AttentionBwdArgs& a) {
  AttentionProblem p = a.problem;
  if (!take_lengths(p, a.packed, PageTable{})) return ONEPASS_BAD_INDEX;
  Plan plan = make_plan(a, p);
  const int64_t pieces = plan.owners.count() * plan.ranges, heads = p.batch * p.nheads_q, blocks = ceil_div(p.seqlen_q, BLOCK_Q);
  Workspace shared;
  BiasGradient dbias(a, p, plan.ranges, plan.range_keys);
  double* dsink_parts;
  const auto take_shared = [&] {
    dbias.take(shared);
    plan.dq_parts = plan.ranges > 1 && a.dq.data ? shared.take<float>(plan.ranges * plan.dq_part) : nullptr;
    dsink_parts = a.dsink ? shared.take<double>(heads) : nullptr;
  };
  take_shared();
  if (!shared.allocate()) return ONEPASS_OUT_OF_MEMORY;
  take_shared();
  for (int64_t i = 0; dsink_parts && i < heads; i++) dsink_parts[i] = 0;
  const double work = 2.5 * p.batch * p.nheads_q * p.seqlen_q * p.seqlen_k * (p.head_dim + p.head_dim_v);
  const int threads = work < 5e4 ? 1 : (int)min_of(p.num_threads, pieces);
  int status = ONEPASS_OK;
  const auto work_share = [&] {
    Workspace w;
    Scratch<Compute>(w, p, min_of(plan.range_keys, round_up(p.seqlen_k, BLOCK_K)));
    if (!w.allocate()) {
#pragma omp atomic write
      status = ONEPASS_OUT_OF_MEMORY;
    }
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < dbias.tiles(); tile++) dbias.clear(tile);
    if (status == ONEPASS_OK) {
      const FlushDenormals flush(OPTIONS);
      Scratch<Compute> t(w, p, min_of(plan.range_keys, round_up(p.seqlen_k, BLOCK_K)));
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t piece = 0; piece < pieces; piece++)  // causal: the first keys, seen by the most queries, first
        run_piece<Compute, T, OPTIONS>(t, a, p, plan, piece, dbias, dsink_parts);
    }
#pragma omp barrier
    if (plan.dq_parts && status == ONEPASS_OK) {
#pragma omp for schedule(static) nowait
      for (int64_t block = 0; block < heads * blocks; block++) {
        const int64_t head = block / blocks;
        add_dq_parts<T>(a, plan, sequence_of(p, a.packed, head / p.nheads_q), head % p.nheads_q, block % blocks * BLOCK_Q);
      }
    }
    if (OPTIONS && status == ONEPASS_OK) {
#pragma omp for schedule(static) nowait
      for (int64_t part = 0; part < dbias.parts(); part++) dbias.finish(part);
    }
  };
  in_parallel(threads, work_share);
  if (status == ONEPASS_OK && a.dsink) finish_sink_gradient(a, p, dsink_parts);
  return status;
}

template <class Compute, class T>
int backward(const AttentionBwdArgs& a) {
  return changes_tiles(a.problem.options) ? backward<Compute, T, true>(a) : backward<Compute, T, false>(a);
}

}  // namespace

// With no queries or no keys the caller fills the gradients with zeros.
extern "C" int ONEPASS_KERNEL(attention_bwd)(const AttentionBwdArgs* args) {
  switch (args->problem.dtype) {
    case ONEPASS_F32: return backward<Fp32, float>(*args);
    case ONEPASS_F16: return backward<Fp32, f16>(*args);
#if ONEPASS_BF16_DOT
    default: return backward<Bf16Pairs, bf16>(*args);
#else
    default: return backward<Fp32, bf16>(*args);
#endif
  }
}
