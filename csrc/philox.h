// Philox4x32-10 (Salmon et al. 2011), one counter a lane: random numbers that depend on their place alone, so that a mask
// drawn in the forward is drawn again in the backward, in any order and by any number of threads.
#pragma once
#include "simd.h"

typedef uint32_t vu __attribute__((vector_size(VW * 4)));
typedef uint64_t vu64 __attribute__((vector_size(VW * 4)));  // half as many lanes

ONEPASS_INLINE vu broadcast_word(uint32_t x) { return x - (vu){}; }

// The 64-bit products of the even lanes.
ONEPASS_INLINE vu64 multiply_even(vu a, vu b) {
#if ONEPASS_VW == 16
  return (vu64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif ONEPASS_VW == 8
  return (vu64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (vu64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return ((vu64)a & 0xffffffffu) * ((vu64)b & 0xffffffffu);  // lanes are little-endian
#endif
}

struct Product { vu high, low; };

ONEPASS_INLINE Product multiply_words(vu a, uint32_t b) {
  const vu factor = broadcast_word(b);
  const vu64 even = multiply_even(a, factor), odd = multiply_even((vu)((vu64)a >> 32), factor);
  const vu64 upper = (vu64){} + 0xffffffff00000000u;
  return {(vu)((even >> 32) | (odd & upper)), a * factor};
}

struct Words4 { vu word[4]; };

ONEPASS_INLINE Words4 philox(vu c0, vu c1, vu c2, vu c3, uint32_t key0, uint32_t key1) {
#pragma GCC unroll 10
  for (int round = 0; round < 10; round++) {
    const Product first = multiply_words(c0, 0xD2511F53u), second = multiply_words(c2, 0xCD9E8D57u);
    c0 = second.high ^ c1 ^ broadcast_word(key0);
    c2 = first.high ^ c3 ^ broadcast_word(key1);
    c1 = second.low;
    c3 = first.low;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}
