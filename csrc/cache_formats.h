// Caches whose elements are one byte: int8 and the 8-bit floats of the OCP and of AMD's first ("fnuz": no infinities, no negative
// zero) formats. All of their numbers are numbers of bf16 and fp16, too.
#pragma once
#include "simd.h"

typedef uint8_t vb __attribute__((vector_size(VW)));
typedef uint8_t vb_unaligned __attribute__((vector_size(VW), aligned(1), may_alias));
typedef int8_t vsb __attribute__((vector_size(VW)));

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

// dst[d] = the number that src[d] stands for; up to whole vectors if there are `room` elements, then zeros.
template <class T>
ONEPASS_INLINE void dequantize(T* dst, int64_t room, const uint8_t* src, int64_t stride, int64_t count, int64_t format) {
  const ByteFloat f = byte_float(format);
  for (int64_t d = 0; d < room; d += VW) {
    vb bytes = {};
    if (stride == 1 && d + VW <= count)
      bytes = *(const vb_unaligned*)(src + d);
    else
      for (int64_t x = 0; x < VW && d + x < count; x++) bytes[x] = src[(d + x) * stride];
    const vf value = format == ONEPASS_INT8 ? __builtin_convertvector(__builtin_convertvector((vsb)bytes, vi), vf)
                                            : widen(__builtin_convertvector(bytes, vi), f);
    store(dst + d, value);
  }
}
