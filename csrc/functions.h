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
