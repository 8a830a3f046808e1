// Elementary functions beyond 2^x (simd.h), accurate to about 2 units in the last place unless a comment says otherwise.
#pragma once
#include "simd.h"

ONEPASS_INLINE vf vabs(vf x) { return (vf)((vi)x & broadcast_int(0x7fffffff)); }

// c[0] + c[1] x + ... + c[N - 1] x^(N - 1).
template <int N>
ONEPASS_INLINE vf polynomial(const float (&c)[N], vf x) {
  vf p = broadcast(c[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; i--) p = p * x + broadcast(c[i]);
  return p;
}

// e^x for x <= 88, and exactly 1 at 0: what a row's largest element gets, so that a row of one element is certain. With f = x log2(e) less the
// nearest integer, 2^f = 1 + f P(f): the minimax polynomial of that form, 9e-8 relative.
constexpr float EXP_COEFFICIENTS[] = {1.f, 0.693146978f, 0.240222421f, 0.0555073374f, 0.00967151264f, 0.00132647272f};

ONEPASS_INLINE vf vexp_one(vf x) {
#if ONEPASS_VW == 16
  const vf y = x * broadcast(LOG2E);
  const vf f = (vf)_mm512_reduce_ps((__m512)y, 0x08);  // y - round(y); 0 for infinities
  return (vf)_mm512_scalef_ps((__m512)polynomial(EXP_COEFFICIENTS, f), (__m512)(y - f));
#else
  const vf y = x * broadcast(LOG2E);
  const vf clamped = y < broadcast(-127.f) ? broadcast(-127.f) : y;  // NaN passes
  const vf shifted = clamped + broadcast(0x1.8p23f);
  const vf f = clamped - (shifted - broadcast(0x1.8p23f));
  const vf scaled = (vf)((vi)polynomial(EXP_COEFFICIENTS, f) + ((vi)shifted << 23));
  const vf flushed = y < broadcast(-126.f) ? (vf){} : scaled;
  return y == y ? flushed : y;  // the exponent added to a NaN's bits would make it a number
#endif
}

// 2^x for every x: infinity past 2^127.
ONEPASS_INLINE vf vexp2_any(vf x) {
#if ONEPASS_VW == 16
  return vexp2(x);
#else
  const vf top = broadcast(127.f);
  const vf p = vexp2(x > top ? top : x);  // NaN passes
  return x > top ? broadcast(__builtin_inff()) : p;
#endif
}

// 1 / (1 + e^-x). For x far below zero the relative error grows as |x| * 2^-24, since e^-x is then all there is.
ONEPASS_INLINE vf vsigmoid(vf x) { return broadcast(1.f) / (broadcast(1.f) + vexp2_any(x * broadcast(-LOG2E))); }

// tanh(x) = x + x u P(u) with u = x^2 for |x| < 0.63: P is the minimax polynomial, 5e-9 relative. Elsewhere
// 1 - 2 / (e^2|x| + 1), in which the error of the exponential is divided by itself.
constexpr float TANH_COEFFICIENTS[] = {-0.33333276f, 0.133312744f, -0.053725127f, 0.020589826f, -0.0056483163f};

ONEPASS_INLINE vf vtanh(vf x) {
  const vf u = x * x, a = vabs(x);
  const vf small = x + x * (u * polynomial(TANH_COEFFICIENTS, u));
  const vf large = broadcast(1.f) - broadcast(2.f) / (vexp2_any(a * broadcast(2.f * LOG2E)) + broadcast(1.f));
  const vf signed_large = (vf)((vi)large | ((vi)x & broadcast_int(INT32_MIN)));
  return a < broadcast(0.63f) ? small : signed_large;
}

// The normal distribution: its density at x times sqrt(2 pi), and the probability below x, (1 + erf(x / sqrt 2)) / 2.
// For a = |x| the probability of the tail is e^(-a^2 / 2) times a smooth function: a polynomial in t = 1 / (1 + 0.3 a),
// minimax on a < 14 (6e-8 relative), past which fp32 holds 0. Far out in the tail e^(-a^2 / 2) is off by a^2 * 2^-25.
constexpr float NORMAL_COEFFICIENTS[] = {7.16884809e-06f, 0.119487689f,  0.121920338f,  0.0946835426f, 0.142535474f,
                                         -0.0765063976f,  0.228660006f, -0.169166073f, 0.0383782811f};
struct Normal { vf bell, below; };

ONEPASS_INLINE Normal normal_distribution(vf x) {
  const vf a = vabs(x);
  const vf bell = vexp2(a * a * broadcast(-0.5f * LOG2E));
  const vf tail = bell * polynomial(NORMAL_COEFFICIENTS, broadcast(1.f) / (broadcast(1.f) + broadcast(0.3f) * a));
  return {bell, x > (vf){} ? broadcast(1.f) - tail : tail};
}
