// Rotary position embedding of q and k: features (x1, x2) become (x1 cos - x2 sin, x2 cos + x1 sin); the inverse turns back.
// A token's cosines and sines are spread over one head's features once, and serve all its heads.
#include "rows.h"

namespace {

// Neighbouring lanes exchanged.
ONEPASS_INLINE vf swap_pairs(vf v) {
#if ONEPASS_VW == 16
  return (vf)_mm512_permute_ps((__m512)v, 0xb1);
#elif ONEPASS_VW == 8
  return (vf)_mm256_permute_ps((__m256)v, 0xb1);
#elif defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(v, v, 1, 0, 3, 2);
#else
  return __builtin_shuffle(v, (vi){1, 0, 3, 2});
#endif
}

struct Turn { float *cos, *sin; };  // of one token

ONEPASS_INLINE void spread(const RopeArgs& a, int64_t b, int64_t s, Turn t) {
  int64_t row_b = b, row_s = s;
  if (a.position_ids) {  // a table without a batch dimension has stride_cos_b 0
    row_b = 0;
    row_s = a.position_ids[b * a.stride_position_b + s * a.stride_position_s];
  }
  const float* cos = a.cos + row_b * a.stride_cos_b + row_s * a.stride_cos_s;
  const float* sin = a.sin + row_b * a.stride_sin_b + row_s * a.stride_sin_s;
  const float sign = a.inverse ? -1.f : 1.f;
  for (int64_t i = 0; i < a.rotary_dim / 2; i++) {
    if (a.interleaved) {
      t.cos[2 * i] = t.cos[2 * i + 1] = cos[i];
      t.sin[2 * i] = -sign * sin[i];
      t.sin[2 * i + 1] = sign * sin[i];
    } else {
      t.cos[i] = cos[i];
      t.sin[i] = sign * sin[i];
    }
  }
}

template <class T>
ONEPASS_INLINE void turn_head(const RopeArgs& a, const T* x, const Output<T>& out, int64_t at, Turn t) {
  const int64_t half = a.rotary_dim / 2;
  if (a.interleaved)
    for_vectors<2>(0, a.rotary_dim, [&](int64_t i, int, auto lane) __attribute__((always_inline)) {
      const vf v = load(x + i, lane);
      out.put(at + i, v * load(t.cos + i, lane) + swap_pairs(v) * load(t.sin + i, lane), lane);
    });
  else
    for_vectors<2>(0, half, [&](int64_t i, int, auto lane) __attribute__((always_inline)) {
      const vf x1 = load(x + i, lane), x2 = load(x + half + i, lane), cos = load(t.cos + i, lane), sin = load(t.sin + i, lane);
      out.put(at + i, x1 * cos - x2 * sin, lane);
      out.put(at + half + i, x2 * cos + x1 * sin, lane);
    });
  for_vectors<2>(a.rotary_dim, a.head_dim, [&](int64_t i, int, auto lane) __attribute__((always_inline)) {
    out.put(at + i, load(x + i, lane), lane);
  });
}

template <class T>
ONEPASS_INLINE void turn_heads(const RopeArgs& a, const Tensor4& x, int64_t nheads, const Output<T>& out, int64_t b, int64_t s, Turn t, T* gathered) {
  for (int64_t h = 0; h < nheads; h++) {
    const T* head = (const T*)x.data + b * x.stride_b + s * x.stride_s + h * x.stride_h;
    if (x.stride_d != 1) {
      for (int64_t d = 0; d < a.head_dim; d++) gathered[d] = head[d * x.stride_d];
      head = gathered;
    }
    turn_head<T>(a, head, out, ((b * a.seqlen + s) * nheads + h) * a.head_dim, t);
  }
}

template <class T>
int rope(const RopeArgs& a) {
  // Stores past the caches start at multiples of a vector: at 0, half and rotary_dim of each head.
  const int64_t tokens = a.batch * a.seqlen;
  Output<T> q_out(a.q_out, tokens * a.nheads_q, a.head_dim), k_out(a.k_out, tokens * a.nheads_kv, a.head_dim);
  if (a.rotary_dim / 2 % VW) q_out.past_caches = k_out.past_caches = false;
  const int threads = threads_for(tokens * (a.nheads_q + a.nheads_kv) * a.head_dim, a.num_threads);
  int status = ONEPASS_OK;
  in_parallel(threads, [&] {
    Workspace w;
    Turn t;
    T* gathered;
    for (int pass = 0; pass < 2; pass++) {
      t = {w.take<float>(a.rotary_dim), w.take<float>(a.rotary_dim)};
      gathered = w.take<T>(a.head_dim);
      if (pass == 0 && !w.allocate()) {
#pragma omp atomic write
        status = ONEPASS_OUT_OF_MEMORY;
        break;
      }
    }
#pragma omp for schedule(static) nowait
    for (int64_t token = 0; token < tokens; token++) {
      if (!gathered) continue;
      const int64_t b = token / a.seqlen, s = token % a.seqlen;
      spread(a, b, s, t);
      turn_heads<T>(a, a.q, a.nheads_q, q_out, b, s, t, gathered);
      turn_heads<T>(a, a.k, a.nheads_kv, k_out, b, s, t, gathered);
    }
    finish_stores();
  });
  return status;
}

bool positions_in_range(const RopeArgs& a) {
  for (int64_t b = 0; b < a.batch; b++)
    for (int64_t s = 0; s < a.seqlen; s++) {
      const int64_t position = a.position_ids[b * a.stride_position_b + s * a.stride_position_s];
      if (position < 0 || position >= a.table_rows) return false;
    }
  return true;
}

}  // namespace

extern "C" int ONEPASS_KERNEL(rope)(const RopeArgs* args) {
  if (args->position_ids && !positions_in_range(*args)) return ONEPASS_BAD_INDEX;
#define ROPE(T) rope<T>(*args)
  ONEPASS_BY_DTYPE(args->dtype, ROPE)
}
