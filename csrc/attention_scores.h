// What the options do to a tile of scores, for forward and backward alike: scale, softcap, ALiBi, bias, in this order (masks
// follow, attention_tile.h), and which weights dropout keeps. Each option is a pass of its own over a tile that lies in the
// first-level cache. Calls without options are compiled without any of this.
#pragma once
#include <cmath>

#include "attention_sequence.h"
#include "functions.h"
#include "philox.h"

namespace {

// The sink is no option of a tile: it enters at the end.
ONEPASS_INLINE bool changes_tiles(const ScoreOptions& o) { return o.softcap != 0 || o.dropout_p != 0 || o.alibi_slopes || o.attn_bias; }

ONEPASS_INLINE float element(const void* data, int64_t dtype, int64_t index) {
  switch (dtype) {
    case ONEPASS_F32: return ((const float*)data)[index];
    case ONEPASS_F16: return to_float(((const f16*)data)[index]);
    default: return to_float(((const bf16*)data)[index]);
  }
}

// While this lives, results below 2^-126 are 0. ALiBi, biases and sharp scores fill whole bands with such weights, and x86
// takes 100 cycles and more for each.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  explicit FlushDenormals(bool flush) : saved_(_mm_getcsr()) {
    if (flush) _mm_setcsr(saved_ | _MM_FLUSH_ZERO_ON);
  }
  ~FlushDenormals() { _mm_setcsr(saved_); }
  FlushDenormals(const FlushDenormals&) = delete;

 private:
  unsigned saved_;
#else
  explicit FlushDenormals(bool) {}
#endif
};

// The sink's logit of a head; -inf without one.
ONEPASS_INLINE float sink_of(const ScoreOptions& o, int64_t h) {
  return o.attn_sink ? element(o.attn_sink, o.sink_dtype, h * o.sink_stride) : NEG_INF;
}

// Sums of exponentials relative to m with the sink's added, as lse and the factor that normalises an output.
struct Normalizer {
  float lse, inverse;
};
ONEPASS_INLINE Normalizer normalizer(float m, float l, float sink) {
  if (sink == NEG_INF) return {m + logf(l), l == 0.f ? 0.f : 1.f / l};
  const float top = sink > m ? sink : m, seen = m == NEG_INF ? 0.f : expf(m - top);
  const float total = l * seen + expf(sink - top);
  return {top + logf(total), seen / total};
}

// A tile's place: the queries from i0 on (in the lanes) and the keys from j0 on.
struct TilePlace {
  int64_t i0, queries, j0, keys;
};

// The options on the scores of one head of one sequence.
class HeadOptions {
 public:
  HeadOptions() = default;  // none
  // scale: what is left to multiply products by. Tiles of scratch: of softcap's slope (or null) and of dropout's factors.
  HeadOptions(const Sequence& s, int64_t h, float scale, float* slope_tile, float* keep_tile)
      : scale_(scale), slope_tile_(slope_tile), keep_tile_(keep_tile) {
    const ScoreOptions& o = s.p.options;
    softcap_ = (float)o.softcap;
    shift_ = s.p.shift;
    if (o.alibi_slopes) alibi_ = o.alibi_slopes[s.b * o.alibi_stride_b + h * o.alibi_stride_h];
    bias_ = o.attn_bias;
    bias_dtype_ = o.bias_dtype;
    bias_offset_ = s.b * o.bias_stride_b + h * o.bias_stride_h;
    bias_stride_q_ = o.bias_stride_q;
    bias_stride_k_ = o.bias_stride_k;
    if (o.dropout_p != 0) {
      const uint64_t seed = (uint64_t)o.rng_state[0];
      key0_ = (uint32_t)seed;
      key1_ = (uint32_t)(seed >> 32);
      offset_ = (uint32_t)o.rng_state[o.rng_stride];
      sheet_ = (uint32_t)(s.b * s.p.nheads_q + h);
      const double threshold = ceil(o.dropout_p * 0x1p32);
      keep_factor_ = threshold < 0x1p32 ? (float)(1.0 / (1.0 - o.dropout_p)) : 0.f;
      threshold_ = keep_factor_ == 0.f ? 0 : (uint32_t)threshold;
    } else {
      keep_tile_ = nullptr;
    }
    if (softcap_ == 0.f) slope_tile_ = nullptr;
  }

  // Tiles that modify and draw have filled, their first lane the place's first query; null: nothing to multiply by.
  const float* slope() const { return slope_tile_; }
  const float* keep() const { return keep_tile_; }

  // Products to scores, before masks: N vectors of queries of these rows, the first of which is at `lane` of the tiles.
  template <int N>
  __attribute__((noinline)) void modify(float* tile, TilePlace at, TileRows rows, int64_t lane) const {
    float* S = tile + lane;
    if (softcap_ != 0.f)
      cap<N>(S, rows, lane);
    else if (scale_ != 1.f)
      for (int64_t r = rows.begin; r < rows.end; r++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) store(S + r * BLOCK_Q + n * VW, load(S + r * BLOCK_Q + n * VW) * broadcast(scale_));
    if (alibi_ != 0.f) add_alibi<N>(S, at, rows);
    if (bias_) add_bias<N>(S, at, rows);
  }

  // What dropout multiplies weights by: 0 or 1 / (1 - p). Tiles begin at a multiple of four keys, which share a counter.
  template <int N>
  __attribute__((noinline)) void draw(TilePlace at, TileRows rows, int64_t lane) const {
    const vi sign = broadcast_int(INT32_MIN), least = broadcast_int((int32_t)threshold_) ^ sign;
    for (int64_t r = rows.begin; r < rows.end; r += 4)
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) {
        const vu row = (vu)(lanes() + (int32_t)(at.i0 + n * VW));
        const Words4 random = philox(broadcast_word(offset_), broadcast_word(sheet_), row,
                                     broadcast_word((uint32_t)((at.j0 + r) / 4)), key0_, key1_);
#pragma GCC unroll 4
        for (int x = 0; x < 4; x++) {
          const vi kept = ((vi)random.word[x] ^ sign) >= least;
          store(keep_tile_ + lane + (r + x) * BLOCK_Q + n * VW, kept ? broadcast(keep_factor_) : (vf){});
        }
      }
  }

 private:
  template <int N>
  void cap(float* S, TileRows rows, int64_t lane) const {
    const vf factor = broadcast(scale_ / softcap_), top = broadcast(softcap_);
    for (int64_t r = rows.begin; r < rows.end; r++)
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) {
        const int64_t place = r * BLOCK_Q + n * VW;
        const vf t = vtanh(load(S + place) * factor);
        store(S + place, t * top);
        if (slope_tile_) store(slope_tile_ + lane + place, broadcast(1.f) - t * t);
      }
  }

  template <int N>
  void add_alibi(float* S, TilePlace at, TileRows rows) const {
    const vf slope = broadcast(alibi_);
    for (int64_t r = rows.begin; r < rows.end; r++)
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) {
        float* s = S + r * BLOCK_Q + n * VW;
        const vi behind = lanes() + (int32_t)(at.i0 + n * VW + shift_ - at.j0 - r);
        store(s, load(s) - slope * vabs(__builtin_convertvector(behind, vf)));
      }
  }

  template <int N>
  void add_bias(float* S, TilePlace at, TileRows rows) const {
    switch (bias_dtype_) {
      case ONEPASS_F32: return add_bias_of<N>(S, (const float*)bias_, at, rows);
      case ONEPASS_F16: return add_bias_of<N>(S, (const f16*)bias_, at, rows);
      default: return add_bias_of<N>(S, (const bf16*)bias_, at, rows);
    }
  }

  // Of the rows that hold keys; lanes without a query get none.
  template <int N, class T>
  void add_bias_of(float* tile, const T* bias, TilePlace at, TileRows rows) const {
    const T* src = bias + bias_offset_ + at.i0 * bias_stride_q_ + (at.j0 + rows.begin) * bias_stride_k_;
    float* S = tile + rows.begin * BLOCK_Q;
    const int64_t keys = min_of(rows.end, at.keys) - rows.begin;
    if (bias_stride_k_ == 1 && bias_stride_q_ != 0) fetch_ahead(src, at.queries);
#pragma GCC unroll 4
    for (int n = 0; n < N; n++, S += VW, src += VW * bias_stride_q_) {
      const int64_t queries = min_of(VW, at.queries - n * VW);
      const bool one = bias_stride_q_ == 0, adjacent = bias_stride_q_ == 1 && queries == VW;
      int64_t r = 0;
      if (bias_stride_k_ == 1 && !one)
        for (; r + VW <= keys; r += VW) {
          vf block[VW];
#pragma GCC unroll 16
          for (int x = 0; x < VW; x++) block[x] = x < queries ? load(src + x * bias_stride_q_ + r) : (vf){};
          transpose(block);
#pragma GCC unroll 16
          for (int x = 0; x < VW; x++) store(S + (r + x) * BLOCK_Q, load(S + (r + x) * BLOCK_Q) + block[x]);
        }
      for (; r < keys; r++) {
        const T* from = src + r * bias_stride_k_;
        vf added = {};
        if (one)
          added = broadcast(to_float(*from));
        else if (adjacent)
          added = load(from);
        else
          for (int64_t x = 0; x < queries; x++) added[x] = to_float(from[x * bias_stride_q_]);
        store(S + r * BLOCK_Q, load(S + r * BLOCK_Q) + added);
      }
    }
  }

  // The bias of the next tile of keys comes from rows far apart, which the processor does not guess.
  template <class T>
  void fetch_ahead(const T* src, int64_t queries) const {
    constexpr int LINE = 64 / (int)sizeof(T);
    for (int64_t i = 0; i < queries; i++)
#pragma GCC unroll 4
      for (int64_t j = BLOCK_K; j < 2 * BLOCK_K; j += LINE) __builtin_prefetch(src + i * bias_stride_q_ + j, 0, 2);
  }

  float scale_ = 1.f, softcap_ = 0.f, alibi_ = 0.f, keep_factor_ = 0.f;
  int64_t shift_ = 0;
  const void* bias_ = nullptr;
  int64_t bias_dtype_ = 0, bias_offset_ = 0, bias_stride_q_ = 0, bias_stride_k_ = 0;
  uint32_t key0_ = 0, key1_ = 0, offset_ = 0, sheet_ = 0, threshold_ = 0;
  float *slope_tile_ = nullptr, *keep_tile_ = nullptr;
};

}  // namespace
