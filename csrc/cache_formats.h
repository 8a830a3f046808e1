// Caches of quantized numbers. One byte each: int8 and the 8-bit floats of the OCP and of AMD's first ("fnuz": no infinities, no
// negative zero) formats, all of whose numbers are numbers of bf16 and fp16, too. Two in a byte: int4.
#pragma once
#include "simd.h"

// Bytes, one a lane.
ONEPASS_INLINE vi load_bytes(const uint8_t* p) {
#if ONEPASS_VW == 16
  return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif ONEPASS_VW == 8
  return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  vi v;
  for (int i = 0; i < VW; i++) v[i] = p[i];
  return v;
#endif
}

// A sign, an exponent and a mantissa, which moved up by `shift` bits lie where fp32 has them.
struct ByteFloat {
  int shift;
  int32_t exponent;   // what is added to fp32's exponent, in place
  int32_t infinity;   // magnitudes from here on are infinity and NaN
  int32_t not_a_number;  // one more NaN
};

ONEPASS_INLINE ByteFloat byte_float(int64_t format) {
  switch (format) {
    case ONEPASS_E4M3FN: return {20, (127 - 7) << 23, 0x7f, -1};
    case ONEPASS_E5M2: return {21, (127 - 15) << 23, 0x7c, -1};
    case ONEPASS_E4M3FNUZ: return {20, (127 - 8) << 23, 0x80, 0x80};
    default: return {21, (127 - 16) << 23, 0x80, 0x80};
  }
}

ONEPASS_INLINE vf widen(vi byte, ByteFloat f) {
  const vi magnitude = byte & 0x7f, bits = magnitude << f.shift;
  // Without an implicit leading one: as if it had one, one exponent up, and then taken off.
  const vf lead = (vf)broadcast_int(f.exponent + (1 << 23));
  const vf subnormal = (vf)(bits + f.exponent + (1 << 23)) - lead, normal = (vf)(bits + f.exponent);
  vf value = magnitude < (1 << (23 - f.shift)) ? subnormal : normal;
  value = magnitude >= f.infinity ? (vf)(bits | 0x7f800000) : value;
  value = (vf)((vi)value | ((byte & 0x80) << 24));
  return byte == f.not_a_number ? broadcast(__builtin_nanf("")) : value;
}

// Stores numbers that need no rounding.
template <class T>
ONEPASS_INLINE void store_exact(T* p, vf v) { store(p, v); }
#if ONEPASS_VW == 16
ONEPASS_INLINE void store_exact(bf16* p, vf v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)v, 16)));
}
#endif

// dst[d] = the number that src[d] stands for; up to whole vectors if there are `room` elements, then zeros.
template <class T>
ONEPASS_INLINE void dequantize(T* dst, int64_t room, const uint8_t* src, int64_t stride, int64_t count, int64_t format) {
  const ByteFloat f = byte_float(format);
  for (int64_t d = 0; d < room; d += VW) {
    uint8_t last[VW] = {};
    const bool whole = stride == 1 && d + VW <= count;
    for (int64_t x = 0; !whole && x < VW && d + x < count; x++) last[x] = src[(d + x) * stride];
    const vi bytes = load_bytes(whole ? src + d : last);
    const vf value = format == ONEPASS_INT8 ? __builtin_convertvector(bytes << 24 >> 24, vf) : widen(bytes, f);
    store_exact(dst + d, value);
  }
}

// The numbers 0 to 15 of VW / 2 bytes, low nibbles first.
ONEPASS_INLINE vi load_nibbles(const uint8_t* p) {
#if ONEPASS_VW == 16
  const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)p));
  return (vi)_mm512_and_si512(_mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28)), _mm512_set1_epi32(15));
#elif ONEPASS_VW == 8
  int32_t four;
  memcpy(&four, p, sizeof(four));
  const __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
  return (vi)_mm256_and_si256(_mm256_or_si256(bytes, _mm256_slli_epi64(bytes, 28)), _mm256_set1_epi32(15));
#else
  vi v;
  for (int i = 0; i < VW; i++) v[i] = p[i / 2] >> i % 2 * 4 & 15;
  return v;
#endif
}

// dst[d] = nibble d * scale + shift of its group, the pairs of groups stride_g apart; zeros from `count` to `room`.
ONEPASS_INLINE void dequantize_int4(float* dst, int64_t room, const uint8_t* src, int64_t stride, int64_t count, const f16* pairs,
                                    int64_t stride_g, int64_t groups) {
  for (int64_t g = 0; g < groups; g++) {
    const float scale = to_float(pairs[g * stride_g]), shift = to_float(pairs[g * stride_g + 1]);
    const int64_t end = (g + 1) * count / groups;  // an even number, as groups are whole bytes
    int64_t d = g * count / groups;
    for (; stride == 1 && d + VW <= end; d += VW)
      store(dst + d, __builtin_convertvector(load_nibbles(src + d / 2), vf) * broadcast(scale) + broadcast(shift));
    for (; d < end; d++) dst[d] = (float)(src[d / 2 * stride] >> d % 2 * 4 & 15) * scale + shift;
  }
  for (int64_t d = count; d < room; d++) dst[d] = 0;
}
