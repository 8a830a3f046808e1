// Attention of one to a few queries on a cache of keys and values. Every key and value is read once for all the queries and
// heads that share it, so the kernel runs at the speed of memory. Keys are cut into splits to keep all cores busy; each
// split leaves an unnormalised output with its m and l, and the parts are merged at the end (Flash-Decoding, Dao et al. 2023).
// A thread goes through the keys of a split once, all heads side by side, a strip of keys after the other: in a (batch, seqlen,
// nheads, head_dim) cache a strip is one stretch of memory, and only memory that is read in order comes at full speed.
//
// Here features lie in the vector lanes: there are too few queries to fill them.
//
// SPECIAL calls are compiled apart: softcap, ALiBi, caches in pages, quantized caches. Rows that cannot be read in place
// (quantized, or of pages shorter than a strip) are copied, a strip at a time, as numbers of the queries' type, or of fp32 where
// that would round them (int4).
#include <type_traits>

#include "attention_scores.h"
#include "cache_formats.h"
#include "workspace.h"

namespace {

constexpr int64_t CHUNK = 128;       // keys whose scores are held at a time
constexpr int64_t MIN_SPLIT = 64;    // fewer keys are not worth a split of their own
constexpr int64_t STRIP = 32 << 10;  // bytes of keys, or of values, that all heads go through before the next of them

// What is read next, fetched into the second-level cache meanwhile: one row of it for each key, in the order of addresses.
template <class T>
struct Ahead {
  const T* rows;
  int64_t stride;
  Ahead from(int64_t feature) const { return {rows + feature, stride}; }
  void fetch(int64_t key, int64_t feature) const { __builtin_prefetch(rows + key * stride + feature, 0, 2); }
};

// How features are multiplied: elements of a row widened to fp32, or pairs of bf16 as they are.
template <class T>
struct Widened {
  typedef T Row;
  typedef float Query;
  static constexpr int STEP = 1;
  ONEPASS_INLINE vf key(const T* row) { return load(row); }
  ONEPASS_INLINE vf dot(vf acc, vf key, const float* query) { return acc + key * load(query); }
};
#if ONEPASS_BF16_DOT
struct Paired {
  typedef bf16 Row;
  typedef bf16 Query;
  static constexpr int STEP = 2;
  ONEPASS_INLINE __m512bh key(const bf16* row) { return (__m512bh)load_words(row); }
  ONEPASS_INLINE vf dot(vf acc, __m512bh key, const bf16* query) {
    return (vf)_mm512_dpbf16_ps((__m512)acc, key, (__m512bh)load_words(query));
  }
};
#endif

typedef float f4 __attribute__((vector_size(16)));
typedef float f4u __attribute__((vector_size(16), aligned(4), may_alias));

// The sums of four vectors.
ONEPASS_INLINE f4 sum_each(vf a, vf b, vf c, vf d) {
#if ONEPASS_VW == 16
#define HALVES(X, Y) _mm512_add_ps(_mm512_shuffle_f32x4((__m512)X, (__m512)Y, 0x44), _mm512_shuffle_f32x4((__m512)X, (__m512)Y, 0xee))
  const __m512 ab = HALVES(a, b), cd = HALVES(c, d);
#undef HALVES
  __m512 s = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  s = _mm512_add_ps(s, _mm512_permute_ps(s, 0x4e));
  s = _mm512_add_ps(s, _mm512_permute_ps(s, 0xb1));
  return (f4)_mm512_castps512_ps128(_mm512_permutexvar_ps(_mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0), s));
#elif ONEPASS_VW == 8
  const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
  return (f4)_mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
#else
  vf rows[VW] = {a, b, c, d};
  transpose(rows);
  return (rows[0] + rows[1]) + (rows[2] + rows[3]);
#endif
}

// The most queries that are worked on at once, with four keys (scores) or four vectors of features (values) each.
constexpr int QUERIES = VW == 16 ? 4 : 2;

// S[r * CHUNK + j] = query r . key j for R queries, four keys at a time.
template <class Features, int R, class T>
ONEPASS_INLINE void score_keys(float* S, const T* k, int64_t stride, int64_t keys, const typename Features::Query* q, int64_t depth,
                               Ahead<T> ahead) {
  int64_t j = 0;
  for (; j + 4 <= keys; j += 4) {
    vf acc[R][4] = {};
    const T* row = k + j * stride;
    for (int64_t d = 0; d < depth; d += VW * Features::STEP)
#pragma GCC unroll 4
      for (int x = 0; x < 4; x++) {
        ahead.fetch(j + x, d);
        const auto key = Features::key(row + x * stride + d);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) acc[r][x] = Features::dot(acc[r][x], key, q + r * depth + d);
      }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) *(f4u*)(S + r * CHUNK + j) = sum_each(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
  }
  for (; j < keys; j++)
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      vf acc = {};
      for (int64_t d = 0; d < depth; d += VW * Features::STEP) acc = Features::dot(acc, Features::key(k + j * stride + d), q + r * depth + d);
      S[r * CHUNK + j] = horizontal_sum(acc);
    }
}

// O[r][d] = O[r][d] * rescale[r] + sum over keys of P[r][key] * value[key][d], for N vectors of features and R queries.
// With few accumulators several keys are summed apart, so that the sums do not wait for each other.
template <int R, int N, class T>
ONEPASS_INLINE void add_values(Widened<T>, float* O, int64_t ld, const T* v, int64_t stride, int64_t keys, const float* P,
                               const float* rescale, Ahead<T> ahead) {
  constexpr int APART = R * N <= 4 ? 4 : R * N <= 8 ? 2 : 1;
  constexpr int LINE = 64 / (int)sizeof(T) / VW;  // vectors in a cache line
  vf acc[APART][R][N] = {};
  int64_t j = 0;
  const auto add_key = [&](int64_t key, int x) __attribute__((always_inline)) {
    vf value[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n += LINE) ahead.fetch(key, n * VW);
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) value[n] = load(v + key * stride + n * VW);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) acc[x][r][n] += broadcast(P[r * CHUNK + key]) * value[n];
  };
  for (; j + APART <= keys; j += APART)
#pragma GCC unroll 4
    for (int x = 0; x < APART; x++) add_key(j + x, x);
  for (; j < keys; j++) add_key(j, 0);
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
#pragma GCC unroll 4
      for (int x = 1; x < APART; x++) acc[0][r][n] += acc[x][r][n];
      float* o = O + r * ld + n * VW;
      store(o, load(o) * broadcast(rescale[r]) + acc[0][r][n]);
    }
}
#if ONEPASS_BF16_DOT
template <int R, int N>
ONEPASS_INLINE void add_values(Paired, float* O, int64_t ld, const bf16* v, int64_t stride, int64_t keys, const bf16* P,
                               const float* rescale, Ahead<bf16> ahead) {
  vf acc[R][N];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) acc[r][n] = load(O + r * ld + n * VW) * broadcast(rescale[r]);
  for (int64_t j = 0; j < keys; j += 2) {
    __m512bh value[N];
    const bf16 *first = v + j * stride, *second = first + stride;
#pragma GCC unroll 8
    for (int n = 0; n < N; n += 2) ahead.fetch(j, n * VW), ahead.fetch(j + 1, n * VW);
#pragma GCC unroll 8
    for (int n = 0; n < N; n += 2) {
      const __m512i a = load_words(first + n * VW), b = j + 1 < keys ? load_words(second + n * VW) : _mm512_setzero_si512();
      value[n] = (__m512bh)pair_low(a, b);
      value[n + 1] = (__m512bh)pair_high(a, b);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const __m512bh p = Bf16Pairs::broadcast_step(P + r * CHUNK + j);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) acc[r][n] = Bf16Pairs::multiply_add(acc[r][n], p, value[n]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) store(O + r * ld + n * VW, acc[r][n]);
}
#endif

template <class Features, class T, bool SPECIAL>
struct Decode {
  typedef typename Features::Query Query;
  typedef typename Features::Row Row;  // T, of caches that are read in place; or what int4 becomes
  static constexpr int64_t FEATURES = VW * Features::STEP;  // in a vector

  struct Cache {
    const Tensor4& x;
    const CacheFormat& format;
    int64_t features, depth;  // head_dim, and that in whole vectors
    bool in_place;            // rows can be read where they are
  };

  const AttentionDecodeArgs& a;
  const AttentionProblem& p;
  int64_t depth, depth_v;   // head_dim and head_dim_v in whole vectors
  int64_t rows;             // queries that share a KV head: seqlen_q * group, the group running fastest
  int64_t longest;          // keys of the longest sequence
  int64_t splits, groups;   // of the keys, and of the KV heads
  int64_t strip;            // keys that all heads go through before the next of them
  Cache k, v;
  // Parts: (batch, nheads_kv, splits, rows), each an output of depth_v, m and l.
  float *part_out, *part_m, *part_l;

  struct Scratch {
    Query *q, *P;
    float *S, *rescale;
    Row *K, *V;
  };

  explicit Decode(const AttentionDecodeArgs& args)
      : a(args),
        p(args.problem),
        depth(round_up(p.head_dim, FEATURES)),
        depth_v(round_up(p.head_dim_v, FEATURES)),
        k{a.k, a.k_format, p.head_dim, depth, a.k.stride_d == 1 && depth == p.head_dim && !p.key_mask},
        v{a.v, a.v_format, p.head_dim_v, depth_v, a.v.stride_d == 1 && depth_v == p.head_dim_v && !p.key_mask} {
    rows = p.seqlen_q * (p.nheads_q / p.nheads_kv);
    longest = p.seqlen_k;
    if (a.cache_seqlens) {
      longest = 0;
      for (int64_t b = 0; b < p.batch; b++) longest = max_of(longest, a.cache_seqlens[b]);
    }
    splits = a.num_splits > 0 ? min_of(a.num_splits, longest) : min_of(ceil_div(4 * p.num_threads, max_of(1, p.batch)), longest / MIN_SPLIT);
    splits = max_of(1, splits);
    // Too few keys for every thread: the heads are shared out as well.
    groups = max_of(1, min_of(p.nheads_kv, p.num_threads / max_of(1, p.batch * splits)));
    const int64_t token = p.nheads_kv / groups * max_of(p.head_dim, p.head_dim_v) * (int64_t)sizeof(Row);
    strip = min_of(CHUNK, max_of(4, STRIP / token / 4 * 4));
    if (SPECIAL && a.pages.table && a.pages.page_size >= 8) strip = min_of(strip, a.pages.page_size / 4 * 4);
  }

  int64_t parts() const { return p.batch * p.nheads_kv * splits * rows; }

  void take_parts(Workspace& w) {
    part_out = w.take<float>(parts() * depth_v);
    part_m = w.take<float>(parts());
    part_l = w.take<float>(parts());
  }
  Scratch take_scratch(Workspace& w) const {
    Scratch t;
    t.q = w.take<Query>(p.nheads_kv * rows * depth);
    t.P = w.take<Query>(p.nheads_kv * rows * CHUNK);
    t.S = w.take<float>(p.nheads_kv * rows * CHUNK);
    t.rescale = w.take<float>(p.nheads_kv * rows);
    const bool copies = SPECIAL && (a.pages.table || k.format.code || v.format.code);
    t.K = k.in_place && !copies ? nullptr : w.take<Row>(strip * depth);
    t.V = v.in_place && !copies ? nullptr : w.take<Row>(strip * depth_v);
    return t;
  }

  // The problem of one sequence: with cache_seqlens its own number of keys, the queries at the bottom right of them.
  AttentionProblem sequence(int64_t b) const {
    AttentionProblem s = p;
    if (a.cache_seqlens) {
      s.seqlen_k = a.cache_seqlens[b];
      s.shift = s.seqlen_k - s.seqlen_q;
    }
    return s;
  }

  void pack_queries(Query* dst, int64_t b, int64_t h_kv) const {
    const int64_t group = p.nheads_q / p.nheads_kv;
    for (int64_t r = 0; r < rows; r++) {
      const T* src = (const T*)a.q.data + b * a.q.stride_b + r / group * a.q.stride_s + (h_kv * group + r % group) * a.q.stride_h;
      for (int64_t d = 0; d < depth; d++) from_float(d < p.head_dim ? to_float(src[d * a.q.stride_d]) : 0.f, dst + r * depth + d);
    }
  }

  // Padded to whole vectors of features; hidden rows become zeros, so that NaN in them cannot come back as 0 * NaN.
  static void copy_rows(Row* dst, int64_t ld, const Row* src, const Tensor4& layout, int64_t keys, int64_t features, KeyMask mask) {
    for (int64_t j = 0; j < keys; j++) {
      const bool seen = mask.sees(j);
      if (seen && features == ld && layout.stride_d == 1) {
        memcpy(dst + j * ld, src + j * layout.stride_s, sizeof(Row) * (size_t)ld);
        continue;
      }
      for (int64_t d = 0; d < ld; d++) dst[j * ld + d] = seen && d < features ? src[j * layout.stride_s + d * layout.stride_d] : Row{};
    }
  }

  // Scores of one row to weights; unseen keys and the rest of the last vector get weight 0.
  static void softmax_row(float* S, Query* P, int64_t keys, int64_t seen_begin, int64_t seen_end, KeyMask mask, float scale, float* m,
                          float* l, float* rescale) {
    for (int64_t j = 0; j < min_of(seen_begin, keys); j++) S[j] = NEG_INF;
    for (int64_t j = max_of(0, seen_end); j < keys; j++) S[j] = NEG_INF;
    for (int64_t j = keys; j < round_up(keys, VW); j++) S[j] = NEG_INF;
    if (mask.data)
      for (int64_t j = 0; j < keys; j++)
        if (!mask.sees(j)) S[j] = NEG_INF;
    const vf factor = broadcast(scale);
    vf top = broadcast(NEG_INF);
    for (int64_t j = 0; j < keys; j += VW) {
      // An unseen key stays at -inf whatever the scale's sign.
      const vf s = load(S + j), scaled = s == broadcast(NEG_INF) ? s : s * factor;
      store(S + j, scaled);
      top = vmax(scaled, top);
    }
    const float tile_max = horizontal_max(top), m_new = tile_max > *m ? tile_max : *m;
    const float m_finite = m_new == NEG_INF ? 0.f : m_new;
    vf sum = {};
    for (int64_t j = 0; j < keys; j += VW) {
      const vf weight = vexp(load(S + j) - broadcast(m_finite));
      sum += weight;
      store(P + j, weight);
    }
    *rescale = *m == NEG_INF ? 0.f : expf(*m - m_finite);
    *l = *l * *rescale + horizontal_sum(sum);
    *m = m_new;
  }

  // Where the rows of a strip's keys begin for one head, copied unless they can be read in place.
  struct Rows {
    const Row* data;
    int64_t stride;
  };
  Rows rows_of(const Cache& cache, Row* copy, int64_t b, int64_t h_kv, int64_t j0, int64_t keys) const {
    if (SPECIAL && (a.pages.table || cache.format.code)) return special_rows(cache, copy, b, h_kv, j0, keys);
    const Tensor4& x = cache.x;
    const Row* data = (const Row*)x.data + b * x.stride_b + h_kv * x.stride_h + j0 * x.stride_s;
    if (cache.in_place) return {data, x.stride_s};
    copy_rows(copy, cache.depth, data, x, keys, cache.features, key_mask_of(p, b).from(j0));
    return {copy, cache.depth};
  }

  // The same in pages or quantized.
  Rows special_rows(const Cache& cache, Row* copy, int64_t b, int64_t h_kv, int64_t j0, int64_t keys) const {
    const Tensor4& x = cache.x;
    for (int64_t j = 0; j < keys;) {
      const PagePlace place = place_of(x, b, j0 + j, keys - j);
      const int64_t offset = place.offset + h_kv * x.stride_h, count = min_of(place.keys, keys - j);
      Row* rows = copy + j * cache.depth;
      if constexpr (std::is_same<Row, float>::value)
        if (cache.format.code == ONEPASS_INT4) int4_rows(cache, rows, b, h_kv, j0 + j, offset, count);
      if constexpr (std::is_same<Row, T>::value) {
        if (cache.format.code == ONEPASS_PLAIN) {
          if (cache.in_place && count == keys) return {(const Row*)x.data + offset, x.stride_s};
          copy_rows(rows, cache.depth, (const Row*)x.data + offset, x, count, cache.features, KeyMask{});
        } else if (cache.format.code != ONEPASS_INT4) {
          for (int64_t r = 0; r < count; r++)
            dequantize(rows + r * cache.depth, cache.depth, (const uint8_t*)x.data + offset + r * x.stride_s, x.stride_d,
                       cache.features, cache.format.code);
        }
      }
      j += count;
    }
    return {copy, cache.depth};
  }

  // `count` rows from key j on, whose bytes begin at `offset`.
  void int4_rows(const Cache& cache, float* rows, int64_t b, int64_t h_kv, int64_t j, int64_t offset, int64_t count) const {
    const Tensor4 &x = cache.x, &of = cache.format.pairs;
    const f16* pairs = (const f16*)of.data + place_of(of, b, j, count).offset + h_kv * of.stride_h;
    for (int64_t r = 0; r < count; r++)
      dequantize_int4(rows + r * cache.depth, cache.depth, (const uint8_t*)x.data + offset + r * x.stride_s, x.stride_d, cache.features,
                      pairs + r * of.stride_s, of.stride_d, cache.format.groups);
  }

  // Where key j of a sequence begins in x, and how many of the next `keys` follow it in even steps.
  PagePlace place_of(const Tensor4& x, int64_t b, int64_t j, int64_t keys) const {
    return a.pages.table ? page_place(a.pages, x, b, j) : PagePlace{b * x.stride_b + j * x.stride_s, keys};
  }

  // What one head's share of a strip fetches of the strip after the next; of itself near the end. In a (batch, seqlen,
  // nheads, head_dim) cache the strip of all heads is one stretch of memory, and each head's share a stretch of that.
  Ahead<Row> strip_after_next(const Cache& cache, Rows rows, int64_t b, int64_t h_kv, int64_t j0) const {
    const Tensor4& x = cache.x;
    const int64_t next = j0 + 2 * strip < p.seqlen_k ? j0 + 2 * strip : j0, features = cache.features;
    if (SPECIAL && cache.format.code) return {rows.data, rows.stride};
    if (SPECIAL && a.pages.table) {
      const PagePlace place = page_place(a.pages, x, b, next < a.cache_seqlens[b] ? next : j0);
      return {(const Row*)x.data + place.offset + h_kv * x.stride_h, x.stride_s};
    }
    const Row* data = (const Row*)x.data + b * x.stride_b + next * x.stride_s;
    const bool together = groups == 1 && x.stride_h == features && x.stride_s == p.nheads_kv * features;
    if (together) return {data + h_kv * strip * features, features};
    return {data + h_kv * x.stride_h, x.stride_s};
  }

  // Calls f(R, r) with a constant R for rows r to r + R, until all are done.
  template <class F>
  __attribute__((always_inline)) void for_rows(const F& f) const {
    int64_t r = 0;
    if constexpr (QUERIES == 4)
      for (; r + 4 <= rows; r += 4) f(std::integral_constant<int, 4>{}, r);
    for (; r + 2 <= rows; r += 2) f(std::integral_constant<int, 2>{}, r);
    for (; r < rows; r++) f(std::integral_constant<int, 1>{}, r);
  }

  // Scores of one head's rows with the keys j0 to j0 + keys, which are the keys `at` and after of the chunk.
  void score_strip(Scratch& t, int64_t b, int64_t h_kv, int64_t j0, int64_t at, int64_t keys) const {
    const Rows key = rows_of(k, t.K, b, h_kv, j0, keys);
    const Ahead<Row> ahead = strip_after_next(k, key, b, h_kv, j0);
    for_rows([&](auto R, int64_t r) __attribute__((always_inline)) {
      const int64_t row = h_kv * rows + r;
      score_keys<Features, R>(t.S + row * CHUNK + at, key.data, key.stride, keys, t.q + row * depth, depth, ahead);
    });
  }

  static float descale(const CacheFormat& f, int64_t b, int64_t h_kv) {
    return f.descale ? f.descale[b * f.descale_stride_b + h_kv * f.descale_stride_h] : 1.f;
  }

  // Products to scores: what HeadOptions (attention_scores.h) does to a tile, for one query. behind: how far key 0 is behind it.
  void modify_row(float* S, const AttentionProblem& s, int64_t b, int64_t h, int64_t h_kv, int64_t behind, int64_t keys) const {
    const ScoreOptions& o = s.options;
    const float scale = (float)s.softmax_scale * descale(a.k_format, b, h_kv);
    const float softcap = (float)o.softcap, slope = o.alibi_slopes ? o.alibi_slopes[b * o.alibi_stride_b + h * o.alibi_stride_h] : 0.f;
    for (int64_t j = 0; j < keys; j += VW) {
      vf score = load(S + j) * broadcast(scale);
      if (softcap != 0.f) score = broadcast(softcap) * vtanh(score * broadcast(1.f / softcap));
      if (slope != 0.f) score -= broadcast(slope) * vabs(__builtin_convertvector(broadcast_int((int32_t)(behind - j)) - lanes(), vf));
      store(S + j, score);
    }
  }

  void softmax_chunk(Scratch& t, const AttentionProblem& s, int64_t b, int64_t h_kv, int64_t part, int64_t j0, int64_t keys) const {
    const int64_t group = p.nheads_q / p.nheads_kv;
    for (int64_t r = 0; r < rows; r++) {
      const int64_t row = h_kv * rows + r, i = r / group;
      float scale = (float)p.softmax_scale;
      if (SPECIAL) {
        modify_row(t.S + row * CHUNK, s, b, h_kv * group + r % group, h_kv, i + s.shift - j0, keys);
        scale = 1.f;
      }
      softmax_row(t.S + row * CHUNK, t.P + row * CHUNK, keys, first_key(s, i) - j0, end_key(s, i) - j0, key_mask_of(p, b).from(j0),
                  scale, part_m + part + r, part_l + part + r, t.rescale + row);
    }
  }

  void add_strip(Scratch& t, int64_t b, int64_t h_kv, int64_t part, int64_t j0, int64_t at, int64_t keys) const {
    static constexpr float unchanged[4] = {1.f, 1.f, 1.f, 1.f};
    const Rows value = rows_of(v, t.V, b, h_kv, j0, keys);
    const Ahead<Row> ahead = strip_after_next(v, value, b, h_kv, j0);
    for_rows([&](auto R, int64_t r) __attribute__((always_inline)) {
      const int64_t row = h_kv * rows + r;
      const Query* P = t.P + row * CHUNK + at;
      const float* rescale = at == 0 ? t.rescale + row : unchanged;
      float* O = part_out + (part + r) * depth_v;
      const auto add = [&](auto N, int64_t d) __attribute__((always_inline)) {
        add_values<R, N>(Features{}, O + d, depth_v, value.data + d, value.stride, keys, P, rescale, ahead.from(d));
      };
      int64_t d = 0;
      for (; d + 4 * VW <= depth_v; d += 4 * VW) add(std::integral_constant<int, 4>{}, d);
      for (; d + 2 * VW <= depth_v; d += 2 * VW) add(std::integral_constant<int, 2>{}, d);
      if constexpr (Features::STEP == 1)
        for (; d < depth_v; d += VW) add(std::integral_constant<int, 1>{}, d);
    });
  }

  // One split of the keys, for one group of the KV heads.
  void run(Scratch& t, int64_t b, int64_t group, int64_t split) const {
    const AttentionProblem s = sequence(b);
    const int64_t h_begin = group * p.nheads_kv / groups, h_end = (group + 1) * p.nheads_kv / groups;
    const auto part_of = [&](int64_t h_kv) { return ((b * p.nheads_kv + h_kv) * splits + split) * rows; };
    for (int64_t h_kv = h_begin; h_kv < h_end; h_kv++) {
      const int64_t part = part_of(h_kv);
      for (int64_t r = 0; r < rows; r++) {
        part_m[part + r] = NEG_INF;
        part_l[part + r] = 0.f;
      }
      memset(part_out + part * depth_v, 0, sizeof(float) * (size_t)(rows * depth_v));
    }
    const int64_t begin = first_key(s, 0), end = end_key(s, p.seqlen_q - 1);
    const int64_t split_keys = max_of(1, round_up(ceil_div(max_of(0, end - begin), splits), VW));
    const int64_t j_begin = begin + split * split_keys, j_end = min_of(end, j_begin + split_keys);
    if (j_begin >= j_end) return;
    for (int64_t h_kv = h_begin; h_kv < h_end; h_kv++) pack_queries(t.q + h_kv * rows * depth, b, h_kv);
    for (int64_t j0 = j_begin; j0 < j_end; j0 += CHUNK) {
      const int64_t keys = min_of(CHUNK, j_end - j0);
      for (int64_t at = 0; at < keys; at += strip)
        for (int64_t h_kv = h_begin; h_kv < h_end; h_kv++) score_strip(t, b, h_kv, j0 + at, at, min_of(strip, keys - at));
      for (int64_t h_kv = h_begin; h_kv < h_end; h_kv++) softmax_chunk(t, s, b, h_kv, part_of(h_kv), j0, keys);
      for (int64_t at = 0; at < keys; at += strip)
        for (int64_t h_kv = h_begin; h_kv < h_end; h_kv++) add_strip(t, b, h_kv, part_of(h_kv), j0 + at, at, min_of(strip, keys - at));
    }
  }

  // Merges the splits of one row and normalises it.
  void finish(int64_t b, int64_t h_kv, int64_t r) const {
    const int64_t group = p.nheads_q / p.nheads_kv, i = r / group, h = h_kv * group + r % group;
    const int64_t part = (b * p.nheads_kv + h_kv) * splits * rows + r;
    float m = NEG_INF, l = 0.f;
    for (int64_t s = 0; s < splits; s++) m = part_m[part + s * rows] > m ? part_m[part + s * rows] : m;
    float* sum = part_out + part * depth_v;
    for (int64_t s = 0; s < splits; s++) {
      const float part_max = part_m[part + s * rows];
      const float weight = part_max == NEG_INF ? 0.f : expf(part_max - m);
      l += weight * part_l[part + s * rows];
      const float* out = part_out + (part + s * rows) * depth_v;
      for (int64_t d = 0; d < depth_v; d += VW)
        store(sum + d, (s ? load(sum + d) : (vf){}) + (weight == 0.f ? (vf){} : load(out + d) * broadcast(weight)));
    }
    const Normalizer normal = normalizer(m, l, sink_of(p.options, h));
    const float v_scale = SPECIAL ? descale(a.v_format, b, h_kv) : 1.f;
    const float inverse = normal.inverse * v_scale;
    T* dst = (T*)a.out.data + b * a.out.stride_b + i * a.out.stride_s + h * a.out.stride_h;
    for (int64_t d = 0; d < p.head_dim_v; d++) from_float(sum[d] * inverse, dst + d);
    if (a.lse) a.lse[(b * p.nheads_q + h) * p.seqlen_q + i] = normal.lse;
  }
};

template <class Features, class T, bool SPECIAL>
int decode(const AttentionDecodeArgs& a) {
  const AttentionProblem& p = a.problem;
  Decode<Features, T, SPECIAL> d(a);
  const int64_t heads = p.batch * p.nheads_kv, pieces = p.batch * d.groups * d.splits;
  if (heads * d.rows == 0) return ONEPASS_OK;
  Workspace parts;
  d.take_parts(parts);
  if (!parts.allocate()) return ONEPASS_OUT_OF_MEMORY;
  d.take_parts(parts);
  const double work = 1.0 * heads * d.rows * d.longest * (p.head_dim + p.head_dim_v);
  const int threads = work < 5e4 ? 1 : (int)min_of(p.num_threads, pieces);
  int status = ONEPASS_OK;
  const auto work_share = [&] {
    Workspace w;
    d.take_scratch(w);
    if (!w.allocate()) {
#pragma omp atomic write
      status = ONEPASS_OUT_OF_MEMORY;
    }
#pragma omp barrier
    if (status == ONEPASS_OK) {
      auto t = d.take_scratch(w);
      const FlushDenormals flush(SPECIAL);
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t piece = 0; piece < pieces; piece++)
        d.run(t, piece / d.splits / d.groups, piece / d.splits % d.groups, piece % d.splits);
    }
#pragma omp barrier
    if (status == ONEPASS_OK) {
#pragma omp for schedule(static)
      for (int64_t row = 0; row < heads * d.rows; row++)
        d.finish(row / d.rows / p.nheads_kv, row / d.rows % p.nheads_kv, row % d.rows);
    }
  };
  in_parallel(threads, work_share);
  return status;
}

template <class Features, class T>
int decode(const AttentionDecodeArgs& a) {
  const AttentionProblem& p = a.problem;
  for (int64_t b = 0; a.cache_seqlens && b < p.batch; b++) {
    if (a.cache_seqlens[b] < 0 || a.cache_seqlens[b] > p.seqlen_k) return ONEPASS_BAD_INDEX;
    if (a.pages.table && !pages_exist(a.pages, b, a.cache_seqlens[b])) return ONEPASS_BAD_INDEX;
  }
  if (a.k_format.code == ONEPASS_INT4) return decode<Widened<float>, T, true>(a);  // both caches are
  const auto plain = [](const CacheFormat& f) { return f.code == ONEPASS_PLAIN && !f.descale; };
  const bool special = changes_tiles(p.options) || a.pages.table || !plain(a.k_format) || !plain(a.v_format);
  return special ? decode<Features, T, true>(a) : decode<Features, T, false>(a);
}

}  // namespace

extern "C" int ONEPASS_KERNEL(attention_decode)(const AttentionDecodeArgs* args) {
  switch (args->problem.dtype) {
    case ONEPASS_F32: return decode<Widened<float>, float>(*args);
    case ONEPASS_F16: return decode<Widened<f16>, f16>(*args);
#if ONEPASS_BF16_DOT
    default: return decode<Paired, bf16>(*args);
#else
    default: return decode<Widened<bf16>, bf16>(*args);
#endif
  }
}
