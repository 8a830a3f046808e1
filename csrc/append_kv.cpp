// New keys or values written into their cache, as they are or quantised; see docs/kernels/append_kv.md.
#include <cmath>

#include "rows.h"

namespace {

// Where the cache keeps token s of sequence b: the first coordinate and the second. False where there is no such place.
struct Place { int64_t row, position; };

bool place_of(const AppendKvArgs& a, int64_t b, int64_t s, Place* place) {
  const int64_t position = (int64_t)a.cache_seqlens[b] + s;
  if (position < 0) return false;
  if (!a.page_table) {
    *place = {b, position};
    return position < a.page_size;
  }
  if (a.page_size < 1 || position / a.page_size >= a.max_pages) return false;
  *place = {a.page_table[b * a.max_pages + position / a.page_size], position % a.page_size};
  return place->row >= 0 && place->row < a.pages;
}

template <class T>
void copy_row(const T* x, int64_t stride_x, T* cache, int64_t stride, int64_t count) {
  if (stride_x == 1 && stride == 1)
    memcpy(cache, x, sizeof(T) * (size_t)count);
  else
    for (int64_t d = 0; d < count; d++) cache[d * stride] = x[d * stride_x];
}

// The nearest integer, half to even, between the two; NaN becomes `low`.
ONEPASS_INLINE float step(float x, float low, float high) {
  const float rounded = rintf(x);
  return rounded > low ? (rounded < high ? rounded : high) : low;
}

template <class T>
void quantize_int8(const T* x, int64_t stride_x, int8_t* cache, int64_t stride, int64_t count, float descale) {
  for (int64_t d = 0; d < count; d++) cache[d * stride] = (int8_t)step(to_float(x[d * stride_x]) / descale, -127.f, 127.f);
}

constexpr float FP16_LARGEST = 65504.f;

ONEPASS_INLINE float as_fp16(float x, f16* p) {
  from_float(x < -FP16_LARGEST ? -FP16_LARGEST : x > FP16_LARGEST ? FP16_LARGEST : x, p);
  return to_float(*p);
}

// One group of features, `count` of them, into count / 2 bytes and its pair.
template <class T>
void quantize_int4(const T* x, int64_t stride_x, uint8_t* cache, int64_t stride, int64_t count, f16* pair, int64_t stride_pair) {
  float low = to_float(x[0]), high = low;
  for (int64_t d = 1; d < count; d++) {
    const float value = to_float(x[d * stride_x]);
    low = value < low ? value : low;
    high = value > high ? value : high;
  }
  const float shift = as_fp16(low, pair + stride_pair);
  const float range = (high - shift) / 15.f;
  const float scale = as_fp16(range < 0.f ? 0.f : range, pair);
  const auto nibble = [&](int64_t d) {
    return scale == 0.f ? 0u : (unsigned)step((to_float(x[d * stride_x]) - shift) / scale, 0.f, 15.f);
  };
  for (int64_t d = 0; d < count / 2; d++) cache[d * stride] = (uint8_t)(nibble(2 * d) | nibble(2 * d + 1) << 4);
}

template <class T>
int append(const AppendKvArgs& a) {
  Place place;
  for (int64_t b = 0; b < a.batch; b++)
    for (int64_t s = 0; s < a.seqlen; s++)
      if (!place_of(a, b, s, &place)) return ONEPASS_BAD_INDEX;
  in_parallel(threads_for(a.batch * a.seqlen * a.nheads_kv * a.head_dim, a.num_threads), [&] {
#pragma omp for schedule(static) nowait
    for (int64_t token = 0; token < a.batch * a.seqlen; token++) {
      const int64_t b = token / a.seqlen, s = token % a.seqlen;
      Place at;
      place_of(a, b, s, &at);
      for (int64_t h = 0; h < a.nheads_kv; h++) {
        const T* x = (const T*)a.x.data + b * a.x.stride_b + s * a.x.stride_s + h * a.x.stride_h;
        const int64_t to = at.row * a.cache.stride_b + at.position * a.cache.stride_s + h * a.cache.stride_h;
        if (a.format == ONEPASS_PLAIN) {
          copy_row(x, a.x.stride_d, (T*)a.cache.data + to, a.cache.stride_d, a.head_dim);
        } else if (a.format == ONEPASS_INT8) {
          const float descale = a.descale[b * a.descale_stride_b + h * a.descale_stride_h];
          quantize_int8(x, a.x.stride_d, (int8_t*)a.cache.data + to, a.cache.stride_d, a.head_dim, descale);
        } else {
          const int64_t size = a.head_dim / a.groups;
          f16* pairs = (f16*)a.pairs + at.row * a.pairs_stride_b + at.position * a.pairs_stride_s + h * a.pairs_stride_h;
          for (int64_t g = 0; g < a.groups; g++)
            quantize_int4(x + g * size * a.x.stride_d, a.x.stride_d, (uint8_t*)a.cache.data + to + g * size / 2 * a.cache.stride_d,
                          a.cache.stride_d, size, pairs + g * a.pairs_stride_g, a.pairs_stride_p);
        }
      }
    }
  });
  return ONEPASS_OK;
}

}  // namespace

extern "C" int ONEPASS_KERNEL(append_kv)(const AppendKvArgs* args) {
#define APPEND(T) append<T>(*args)
  ONEPASS_BY_DTYPE(args->dtype, APPEND)
}
