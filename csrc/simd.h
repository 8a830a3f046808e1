// The vector type that every kernel is written in: ONEPASS_VW floats, made of GCC/Clang vector extensions, so that
// plain operators compile to the instruction set's own arithmetic. Intrinsics appear where an instruction has no operator.
// All of it is internal to its translation unit: a weak symbol compiled for AVX-512 could be linked into the others.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "abi.h"

#define ONEPASS_CONCAT_(A, B, C) A##B##_##C
#define ONEPASS_CONCAT(A, B, C) ONEPASS_CONCAT_(A, B, C)
#define ONEPASS_KERNEL(NAME) ONEPASS_CONCAT(onepass_, NAME, ONEPASS_ISA)
#define ONEPASS_STRING_(X) #X
#define ONEPASS_STRING(X) ONEPASS_STRING_(X)
#define ONEPASS_INLINE static inline __attribute__((always_inline))
// Compiled once per source, not once per caller: for work so large that a call costs nothing.
#define ONEPASS_OUTLINED static __attribute__((noinline, unused))

constexpr int VW = ONEPASS_VW;

typedef float vf __attribute__((vector_size(VW * 4)));
typedef int32_t vi __attribute__((vector_size(VW * 4)));
typedef uint16_t vh __attribute__((vector_size(VW * 2)));  // one 16-bit float a lane, as stored
typedef float vf_unaligned __attribute__((vector_size(VW * 4), aligned(4), may_alias));
typedef uint16_t vh_unaligned __attribute__((vector_size(VW * 2), aligned(2), may_alias));

// 16-bit floats are distinct types so that overloads tell them apart.
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

constexpr float NEG_INF = -__builtin_inff();
constexpr float LOG2E = 1.4426950408889634f;

ONEPASS_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
ONEPASS_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
ONEPASS_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
ONEPASS_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

ONEPASS_INLINE vf broadcast(float x) { return x - (vf){}; }
ONEPASS_INLINE vi broadcast_int(int32_t x) { return x - (vi){}; }
ONEPASS_INLINE vf load(const float* p) { return *(const vf_unaligned*)p; }
ONEPASS_INLINE void store(float* p, vf v) { *(vf_unaligned*)p = v; }

// The larger of each lane; where either is NaN, b.
ONEPASS_INLINE vf vmax(vf a, vf b) {
#if ONEPASS_VW == 16
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif ONEPASS_VW == 8
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

// Whether any lane is set (comparisons give 0 or -1 in each).
ONEPASS_INLINE bool any(vi v) {
#if ONEPASS_VW == 16
  return _mm512_test_epi32_mask((__m512i)v, (__m512i)v);
#elif ONEPASS_VW == 8
  return _mm256_movemask_ps((__m256)v);
#else
  int32_t bits = 0;
#pragma GCC unroll 16
  for (int i = 0; i < VW; i++) bits |= v[i];
  return bits;
#endif
}

// Lane numbers 0, 1, 2, ...
ONEPASS_INLINE vi lanes() {
  vi v;
#pragma GCC unroll 16
  for (int i = 0; i < VW; i++) v[i] = i;
  return v;
}

ONEPASS_INLINE float horizontal_sum(vf v) {
#if ONEPASS_VW == 16
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s = 0;
#pragma GCC unroll 16
  for (int i = 0; i < VW; i++) s += v[i];
  return s;
#endif
}

ONEPASS_INLINE float horizontal_max(vf v) {
  float m = v[0];
#pragma GCC unroll 16
  for (int i = 1; i < VW; i++) m = v[i] > m ? v[i] : m;
  return m;
}

// ---- 16-bit floats: widening is exact; narrowing rounds to nearest even and keeps NaN.

ONEPASS_INLINE float to_float(float x) { return x; }
ONEPASS_INLINE float to_float(bf16 x) {
  uint32_t u = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
ONEPASS_INLINE float to_float(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // The exponent and mantissa moved into place, scaled by 2^112; infinities and NaN get the full exponent.
  uint32_t u = (uint32_t)(x.bits & 0x7fff) << 13;
  float f;
  memcpy(&f, &u, 4);
  f *= 0x1p112f;
  memcpy(&u, &f, 4);
  if ((x.bits & 0x7c00) == 0x7c00) u |= 0x7f800000;
  u |= (uint32_t)(x.bits & 0x8000) << 16;
  memcpy(&f, &u, 4);
  return f;
#endif
}

ONEPASS_INLINE void from_float(float x, float* p) { *p = x; }
ONEPASS_INLINE void from_float(float x, bf16* p) {
  uint32_t u;
  memcpy(&u, &x, 4);
  p->bits = (u & 0x7fffffff) > 0x7f800000 ? (uint16_t)(u >> 16 | 0x40) : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
ONEPASS_INLINE void from_float(float x, f16* p) {
#if defined(__F16C__)
  p->bits = (uint16_t)_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint32_t sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  uint32_t h;
  if (magnitude > 0x7f800000) {
    h = 0x7e00;  // NaN
  } else if (magnitude >= 0x477ff000) {
    h = 0x7c00;  // rounds past the largest finite
  } else if (magnitude < 0x38800000) {
    float f;  // subnormal: adding 0.5 lets the processor round at the right bit
    memcpy(&f, &magnitude, 4);
    f += 0.5f;
    memcpy(&h, &f, 4);
    h -= 0x3f000000;
  } else {
    h = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
  }
  p->bits = (uint16_t)(h | sign);
#endif
}

ONEPASS_INLINE vf load(const bf16* p) {
  const vh h = *(const vh_unaligned*)p;
#if ONEPASS_VW == 16
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#else
  return (vf)(__builtin_convertvector(h, vi) << 16);
#endif
}
ONEPASS_INLINE vf load(const f16* p) {
#if ONEPASS_VW == 16
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif ONEPASS_VW == 8 && defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vf v;
  for (int i = 0; i < VW; i++) v[i] = to_float(p[i]);
  return v;
#endif
}

ONEPASS_INLINE void store(bf16* p, vf v) {
#if ONEPASS_BF16_DOT
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#elif ONEPASS_VW == 16
  // As below in 6 instructions where operators take 10: masks add the tie's bit and choose NaN, one permutation takes the upper halves.
  const __m512i u = (__m512i)v, low = _mm512_set1_epi32(0x7fff);
  const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000)), nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  const __m512i even = _mm512_add_epi32(u, low), tied = _mm512_mask_sub_epi32(even, odd, even, _mm512_set1_epi32(-1));
  const __m512i rounded = _mm512_mask_or_epi32(tied, nan, u, _mm512_set1_epi32(0x400000));
  const __m512i upper = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  _mm256_storeu_si256((__m256i*)p, _mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, rounded)));
#else
  const vi u = (vi)v;
  const vi rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const vi nan = (u >> 16) | 0x40;
  const vi narrow = v == v ? rounded : nan;
  *(vh_unaligned*)p = __builtin_convertvector(narrow, vh);
#endif
}
ONEPASS_INLINE void store(f16* p, vf v) {
#if ONEPASS_VW == 16
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif ONEPASS_VW == 8 && defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < VW; i++) from_float(v[i], p + i);
#endif
}

// ---- 2^x

// The minimax polynomial of degree 5 for 2^f, in the relative error: 7.5e-8, to which rounding adds as much.
// AVX-512 splits x = floor(x) + f with f in [0, 1); the others round to nearest, f in [-0.5, 0.5].
#if ONEPASS_VW == 16
constexpr float EXP2_COEFFICIENTS[] = {0.999999925064f,  0.693153073207f,  0.240153616983f,
                                       0.0558263182317f, 0.0089893398766f, 0.00187757676566f};
#else
constexpr float EXP2_COEFFICIENTS[] = {1.00000007165f,   0.693146967065f,   0.240221197237f,
                                       0.0555071327186f, 0.00967554134312f, 0.0013276472632f};
#endif

// 2^x for x <= 127; 2^-inf is 0 and NaN stays NaN. Without AVX-512, results below 2^-126.5 are 0.
ONEPASS_INLINE vf vexp2(vf x) {
#if ONEPASS_VW == 16
  const vf f = (vf)_mm512_reduce_ps((__m512)x, 0x09);  // x - floor(x); 0 for infinities
#else
  // The sum rounds to an integer. With 127 added that stands in the low mantissa bits: moved up it is 2^(x - f).
  const vf clamped = vmax(broadcast(-127.f), x);  // NaN passes
  const vf shift = broadcast(0x1.8p23f + 127.f), shifted = clamped + shift;
  const vf f = clamped - (shifted - shift);
#endif
  vf p = broadcast(EXP2_COEFFICIENTS[5]);
#pragma GCC unroll 8
  for (int i = 4; i >= 0; i--) p = p * f + broadcast(EXP2_COEFFICIENTS[i]);
#if ONEPASS_VW == 16
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  return p * (vf)((vi)shifted << 23);
#endif
}

// e^x for x <= 88. The product by log2(e) is taken last, on differences of scores: taken on the scores themselves its rounding
// would cost as much as the scores are large.
ONEPASS_INLINE vf vexp(vf x) { return vexp2(x * broadcast(LOG2E)); }

// ---- transposition of VW x VW lanes in place, by log2(VW) rounds of interleaving

#if defined(__clang__) || __GNUC__ >= 12
#define ONEPASS_SHUFFLE(A, B, ...) __builtin_shufflevector(A, B, __VA_ARGS__)
#else
#define ONEPASS_SHUFFLE(A, B, ...) __builtin_shuffle(A, B, (vi){__VA_ARGS__})
#endif
#if ONEPASS_VW == 16
#define ONEPASS_LOW_LANES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define ONEPASS_HIGH_LANES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif ONEPASS_VW == 8
#define ONEPASS_LOW_LANES 0, 8, 1, 9, 2, 10, 3, 11
#define ONEPASS_HIGH_LANES 4, 12, 5, 13, 6, 14, 7, 15
#else
#define ONEPASS_LOW_LANES 0, 4, 1, 5
#define ONEPASS_HIGH_LANES 2, 6, 3, 7
#endif

// a0 b0 a1 b1 ... of the lower, then of the upper halves.
ONEPASS_INLINE vf interleave_low(vf a, vf b) { return ONEPASS_SHUFFLE(a, b, ONEPASS_LOW_LANES); }
ONEPASS_INLINE vf interleave_high(vf a, vf b) { return ONEPASS_SHUFFLE(a, b, ONEPASS_HIGH_LANES); }

ONEPASS_INLINE void transpose(vf (&rows)[VW]) {
#pragma GCC unroll 4
  for (int round = 1; round < VW; round *= 2) {
    vf next[VW];
#pragma GCC unroll 16
    for (int i = 0; i < VW / 2; i++) {
      next[2 * i] = interleave_low(rows[i], rows[i + VW / 2]);
      next[2 * i + 1] = interleave_high(rows[i], rows[i + VW / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < VW; i++) rows[i] = next[i];
  }
}
