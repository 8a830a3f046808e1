// Attention forward (FlashAttention-2, Dao 2023, turned for vector lanes): a block of queries stays, tiles of keys and values stream
// past, and softmax is computed online: each query keeps a reference score (m) and the sum of exponentials relative to it (l).
// m follows the largest score so far, but only once that has grown by SLACK: exponentials up to e^SLACK lose nothing in
// floating point, and most tiles then leave the output as it is instead of rescaling it by e^(m_old - m_new).
#include "attention_scores.h"
#include "workspace.h"

namespace {

constexpr float SLACK = 6.f;
constexpr int MAX_BLOCKS = 4;  // query blocks that share one packing of a key/value tile

// One thread's scratch.
template <class Compute>
struct Scratch {
  typename Compute::Elem *Qt, *K, *V, *P;  // P: the weights as the second product reads them (Fp32: S itself)
  float *Ot, *S, *m, *l, *rescale, *tile_max;
  float* keep;  // what dropout multiplies a tile's weights by, or null
  typename Compute::Elem *k_pages, *v_pages;  // a tile's rows out of pages; of the inputs' type, which is no wider
  int64_t q_size, o_size;

  Scratch(Workspace& w, const AttentionProblem& p, int64_t blocks, bool paged) {
    q_size = round_up(p.head_dim, 2) * BLOCK_Q;
    o_size = round_up(p.head_dim_v, TILE_M) * BLOCK_Q;
    Qt = w.take<typename Compute::Elem>(blocks * q_size);
    Ot = w.take<float>(blocks * o_size);
    S = w.take<float>(BLOCK_K * BLOCK_Q);
    P = Compute::STEP == 1 ? (typename Compute::Elem*)S : w.take<typename Compute::Elem>(BLOCK_K * BLOCK_Q);
    K = w.take<typename Compute::Elem>(BLOCK_K * round_up(p.head_dim, 2));
    V = w.take<typename Compute::Elem>(BLOCK_K * round_up(p.head_dim_v, TILE_M));
    m = w.take<float>(blocks * BLOCK_Q);
    l = w.take<float>(blocks * BLOCK_Q);
    rescale = w.take<float>(BLOCK_Q);
    tile_max = w.take<float>(BLOCK_Q);
    keep = p.options.dropout_p != 0 ? w.take<float>(BLOCK_K * BLOCK_Q) : nullptr;
    k_pages = paged ? w.take<typename Compute::Elem>(BLOCK_K * p.head_dim) : nullptr;
    v_pages = paged ? w.take<typename Compute::Elem>(BLOCK_K * p.head_dim_v) : nullptr;
  }
};

// Four rows of weights, stored as the second product reads them.
ONEPASS_INLINE void store_weights(float* P, int64_t j, int n, const vf (&p)[4]) {
#pragma GCC unroll 4
  for (int x = 0; x < 4; x++) store(P + (j + x) * BLOCK_Q + n * VW, p[x]);
}
#if ONEPASS_BF16_DOT
ONEPASS_INLINE void store_weights(bf16* P, int64_t j, int n, const vf (&p)[4]) {
#pragma GCC unroll 2
  for (int x = 0; x < 4; x += 2) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)p[x + 1], (__m512)p[x]);
    store_words(P + ((j + x) / 2 * BLOCK_Q + n * VW) * 2, pair_halves(halves));
  }
}
#endif

// Scores to weights: m and l of the queries take in these rows, e^(m_old - m_new) is left in rescale. False if that is
// 1 for all. keep: what dropout multiplies the weights by, after they are summed; or null.
template <class Compute, int N, bool OPTIONS>
ONEPASS_INLINE bool softmax_tile(Scratch<Compute>& t, float* m, float* l, TileRows rows, float scale, const float* keep) {
  const vf factor = broadcast(scale);
  bool any_rescaled = false;
#pragma GCC unroll 4
  for (int n = 0; n < N; n++) {
    const vf m_old = load(m + n * VW), top = load(t.tile_max + n * VW) * factor;
    const vi grown = top > m_old + broadcast(SLACK);
    const vf m_new = grown ? top : m_old;
    any_rescaled |= any(grown);
    // A query that has seen no key yet has m = -inf; 0 in its place keeps -inf - m from being NaN.
    const vf m_finite = m_new == broadcast(NEG_INF) ? (vf){} : m_new;
    const vf rescale = grown ? vexp(m_old - m_finite) : broadcast(1.f);  // exactly 1: vexp(0) is 1 - 7e-8, which would add up
    vf sum[4] = {};
    const float* s = t.S + n * VW;
    for (int64_t j = rows.begin; j < rows.end; j += 4) {
      vf p[4];
#pragma GCC unroll 4
      for (int x = 0; x < 4; x++) {
        const vf score = load(s + (j + x) * BLOCK_Q);
        p[x] = vexp(Compute::STEP == 1 ? score - m_finite : score * factor - m_finite);
        sum[x] += p[x];
      }
      if (OPTIONS && keep)
#pragma GCC unroll 4
        for (int x = 0; x < 4; x++) p[x] *= load(keep + (j + x) * BLOCK_Q + n * VW);
      store_weights(t.P, j, n, p);
    }
    store(l + n * VW, load(l + n * VW) * rescale + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
    store(m + n * VW, m_new);
    store(t.rescale + n * VW, rescale);
  }
  return any_rescaled;
}

// What a head's tiles have in common.
template <bool OPTIONS>
struct Head {
  const AttentionProblem& p;
  KeyMask mask;
  float scale;  // of products that become scores; with OPTIONS these apply it
  const HeadOptions* options;
};

// Some rows of a tile of keys against N vectors of a block's queries, of which the place's first is at `lane`.
template <class Compute, int N, bool OPTIONS>
ONEPASS_INLINE void attend_part(Scratch<Compute>& t, const Head<OPTIONS>& head, int64_t block, int64_t lane, TilePlace at,
                                TileRows rows, bool masked, Tile<typename Compute::Elem> K, Tile<typename Compute::Elem> V) {
  constexpr int STEP = Compute::STEP;
  const AttentionProblem& p = head.p;
  const auto* Qt = t.Qt + block * t.q_size + lane * STEP;
  if (OPTIONS) {
    score_tile<Compute, N, false>(t.S, K, rows, p.head_dim, Qt, nullptr);
    head.options->template modify<N>(t.S, at, rows, 0);
  } else {
    score_tile<Compute, N, true>(t.S, K, rows, p.head_dim, Qt, t.tile_max);
  }
  if (OPTIONS && t.keep) head.options->template draw<N>(at, rows, 0);
  if (masked) mask_tile<N>(t.S, p, head.mask, at.i0, at.j0, at.keys, rows);
  if (masked || OPTIONS) {
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      vf top = broadcast(NEG_INF);
      for (int64_t j = rows.begin; j < rows.end; j++) top = vmax(load(t.S + j * BLOCK_Q + n * VW), top);
      store(t.tile_max + n * VW, top);
    }
  }
  const int64_t statistics = block * BLOCK_Q + lane;
  const bool rescaled =
      softmax_tile<Compute, N, OPTIONS>(t, t.m + statistics, t.l + statistics, rows, OPTIONS ? 1.f : head.scale, t.keep);
  const auto* values = V.data + rows.begin / STEP * V.stride;
  const auto* weights = t.P + rows.begin * BLOCK_Q;
  const int64_t steps = ceil_div(min_of(rows.end, at.keys) - rows.begin, STEP), depth = round_up(p.head_dim_v, TILE_M);
  float* Ot = t.Ot + block * t.o_size + lane;
  if (rescaled)
    multiply_rows<Compute, N, Into::RESCALE_AND_ADD>(depth, steps, values, STEP, V.stride, weights, BLOCK_Q * STEP, Ot,
                                                     BLOCK_Q, t.rescale);
  else
    multiply_rows<Compute, N, Into::ADD>(depth, steps, values, STEP, V.stride, weights, BLOCK_Q * STEP, Ot, BLOCK_Q);
}

// One tile of keys against one block of up to N vectors of queries.
template <class Compute, int N, bool OPTIONS>
ONEPASS_INLINE void attend_tile(Scratch<Compute>& t, const Head<OPTIONS>& head, int64_t block, TilePlace at,
                                Tile<typename Compute::Elem> K, Tile<typename Compute::Elem> V) {
  const TileParts<N> parts(head.p, head.mask, at.i0, at.queries, at.j0, at.keys);
  if (parts.seen == Visible::NONE) return;
  if (!parts.by_vector)
    return attend_part<Compute, N>(t, head, block, 0, at, {0, round_up(at.keys, TILE_M)}, parts.seen == Visible::SOME, K, V);
  for (int n = 0; n < N; n++)
    if (!parts.rows[n].empty()) {
      const int64_t lane = n * VW;
      const TilePlace vector = {at.i0 + lane, min_of(VW, at.queries - lane), at.j0, at.keys};
      attend_part<Compute, 1>(t, head, block, lane, vector, parts.rows[n], true, K, V);
    }
}

template <class Compute, class T>
ONEPASS_INLINE void begin_block(Scratch<Compute>& t, const AttentionProblem& p, int64_t block, const T* q, const Tensor4& layout,
                                int64_t queries, float into_q) {
  pack_transposed(t.Qt + block * t.q_size, q, layout.stride_s, layout.stride_d, queries, p.head_dim, into_q);
  memset(t.Ot + block * t.o_size, 0, sizeof(float) * (size_t)t.o_size);
  for (int i = 0; i < BLOCK_Q; i++) {
    t.m[block * BLOCK_Q + i] = NEG_INF;
    t.l[block * BLOCK_Q + i] = 0.f;
  }
}

// out[i][d] = Ot[d][i] / l[i], lse = m + log(l), with the sink added to l; a query that saw neither gives 0 and -inf.
template <class Compute, class T>
ONEPASS_INLINE void end_block(Scratch<Compute>& t, const AttentionProblem& p, int64_t block, T* out, int64_t stride_s, float* lse,
                              int64_t queries, float sink) {
  const float *Ot = t.Ot + block * t.o_size, *m = t.m + block * BLOCK_Q, *l = t.l + block * BLOCK_Q;
  float inverse[BLOCK_Q];
  for (int64_t i = 0; i < queries; i++) {
    const Normalizer normal = normalizer(m[i], l[i], sink);
    inverse[i] = normal.inverse;
    if (lse) lse[i] = normal.lse;
  }
  store_transposed(out, stride_s, Ot, inverse, queries, p.head_dim_v);
}

// `blocks` consecutive query blocks of one head.
template <class Compute, class T, bool OPTIONS>
void attend_head(Scratch<Compute>& t, const AttentionFwdArgs& a, const Sequence& s, int64_t h, int64_t first_query, int64_t queries,
                 int64_t block_q) {
  const AttentionProblem& p = s.p;
  const int64_t h_kv = h / (p.nheads_q / p.nheads_kv);
  const KeyMask mask = key_mask_of(p, 0);
  const ScoreScale scale = score_scale(Compute{}, p.softmax_scale);
  const HeadOptions options = OPTIONS ? HeadOptions(s, h, scale.after, nullptr, t.keep) : HeadOptions();
  const Head<OPTIONS> head = {p, mask, scale.after, &options};
  const float sink = sink_of(p.options, h);
  const int64_t end = first_query + queries;

  for (int64_t i0 = first_query, block = 0; i0 < end; i0 += block_q, block++)
    begin_block<Compute>(t, p, block, s.query<const T>(a.q, h, i0), a.q, min_of(block_q, end - i0), scale.into_q);
  const int64_t keys_end = end_key(p, end - 1);
  for (int64_t j0 = first_key(p, first_query) / BLOCK_K * BLOCK_K; j0 < keys_end; j0 += BLOCK_K) {
    const int64_t keys = min_of(BLOCK_K, keys_end - j0);
    const KeyMask tile_mask = mask.from(j0);
    KeyRows<T> k = {s.key<const T>(a.k, h_kv, j0), a.k.stride_s, a.k.stride_d}, v = {s.key<const T>(a.v, h_kv, j0), a.v.stride_s, a.v.stride_d};
    if (a.pages.table) {
      k = gather_pages((T*)t.k_pages, a.pages, a.k, s.b, h_kv, j0, keys, p.head_dim);
      v = gather_pages((T*)t.v_pages, a.pages, a.v, s.b, h_kv, j0, keys, p.head_dim_v);
    }
    const auto K = key_tile(Compute{}, t.K, k.data, k.stride_s, k.stride_d, keys, p.head_dim, tile_mask);
    const auto V = value_tile(Compute{}, t.V, v.data, v.stride_s, v.stride_d, keys, p.head_dim_v, tile_mask);
    for (int64_t i0 = first_query, block = 0; i0 < end; i0 += block_q, block++) {
      const int64_t count = min_of(block_q, end - i0);
      ONEPASS_WITH_VECTORS(count, (attend_tile<Compute, N>(t, head, block, {i0, count, j0, keys}, K, V)));
    }
  }
  for (int64_t i0 = first_query, block = 0; i0 < end; i0 += block_q, block++) {
    const int64_t count = min_of(block_q, end - i0);
    end_block(t, p, block, s.query<T>(a.out, h, i0), a.out.stride_s, a.lse ? a.lse + s.row(h, i0) : nullptr, count, sink);
  }
}

template <class Compute, class T, bool OPTIONS>
int forward(const AttentionFwdArgs& a) {
  AttentionProblem p = a.problem;
  if (!take_lengths(p, a.packed, a.pages)) return ONEPASS_BAD_INDEX;
  const bool paged = a.pages.table != nullptr;
  const int64_t heads = p.batch * p.nheads_q;
  if (heads == 0 || p.seqlen_q == 0) return ONEPASS_OK;
  // Too few heads and blocks for the cores: smaller blocks, which use the multiply-add units less well but all of them.
  int64_t block_q = BLOCK_Q;
  while (block_q > VW && heads * ceil_div(p.seqlen_q, block_q) < p.num_threads) block_q -= VW;
  const int64_t query_blocks = ceil_div(p.seqlen_q, block_q);
  // Blocks that share a packed tile save packing; fewer, larger pieces of work balance worse. Four pieces a thread are enough.
  int64_t blocks = 1;
  while (blocks < MAX_BLOCKS && heads * ceil_div(query_blocks, 2 * blocks) >= 4 * p.num_threads) blocks *= 2;
  const int64_t chunks = ceil_div(query_blocks, blocks), pieces = heads * chunks;
  const double work = 1.0 * heads * p.seqlen_q * p.seqlen_k * (p.head_dim + p.head_dim_v);
  const int threads = work < 5e4 ? 1 : (int)min_of(p.num_threads, pieces);
  int status = ONEPASS_OK;
  const auto work_share = [&] {
    Workspace w;
    Scratch<Compute>(w, p, blocks, paged);
    if (!w.allocate()) {
#pragma omp atomic write
      status = ONEPASS_OUT_OF_MEMORY;
    }
#pragma omp barrier
    if (status == ONEPASS_OK) {
      Scratch<Compute> t(w, p, blocks, paged);
      const FlushDenormals flush(OPTIONS);
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t piece = 0; piece < pieces; piece++) {
        const int64_t head = piece / chunks, chunk = chunks - 1 - piece % chunks;  // causal: the longest first
        const int64_t i0 = chunk * blocks * block_q;
        const Sequence s = sequence_of(p, a.packed, head / p.nheads_q);
        if (i0 < s.p.seqlen_q)
          attend_head<Compute, T, OPTIONS>(t, a, s, head % p.nheads_q, i0, min_of(blocks * block_q, s.p.seqlen_q - i0), block_q);
      }
    }
  };
  in_parallel(threads, work_share);
  return status;
}

// Up to so many queries a KV head the decode kernel is faster: it fills vectors with features, not with queries. It also
// shares one head's keys among the threads: with fewer KV heads than threads the limit is as many times higher.
bool has_few_queries(const AttentionProblem& p) {
  return p.seqlen_q * p.nheads_q * p.batch <= 8 * max_of(p.nheads_kv * p.batch, p.num_threads);
}

bool decode_can(const AttentionFwdArgs& a) {
  return !a.packed.cu_seqlens_q && !a.problem.options.attn_bias && a.problem.options.dropout_p == 0;
}

template <class Compute, class T>
int forward(const AttentionFwdArgs& a) {
  return changes_tiles(a.problem.options) ? forward<Compute, T, true>(a) : forward<Compute, T, false>(a);
}

}  // namespace

extern "C" int ONEPASS_KERNEL(attention_decode)(const AttentionDecodeArgs*);

extern "C" int ONEPASS_KERNEL(attention_fwd)(const AttentionFwdArgs* args) {
  if (has_few_queries(args->problem) && decode_can(*args)) {
    AttentionDecodeArgs few = {};
    few.problem = args->problem;
    few.q = args->q;
    few.k = args->k;
    few.v = args->v;
    few.out = args->out;
    few.lse = args->lse;
    return ONEPASS_KERNEL(attention_decode)(&few);
  }
  switch (args->problem.dtype) {
    case ONEPASS_F32: return forward<Fp32, float>(*args);
    case ONEPASS_F16: return forward<Fp32, f16>(*args);
#if ONEPASS_BF16_DOT
    default: return forward<Bf16Pairs, bf16>(*args);
#else
    default: return forward<Fp32, bf16>(*args);
#endif
  }
}
