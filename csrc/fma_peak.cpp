// What this many threads can do at most, measured. Every thread runs independent multiply-add chains in registers and touches no memory;
// the sum over the threads of flops / seconds is the roof that benchmarks divide by. bf16 uses the bf16 dot where the ISA has it, else the fp32 chains.

#include <time.h>

#include "simd.h"

// Forces the chain to stay in a register and to be computed, without costing an instruction.
#if defined(__x86_64__)
#define KEEP_IN_REGISTER(x) asm volatile("" : "+v"(x))
#elif defined(__aarch64__)
#define KEEP_IN_REGISTER(x) asm volatile("" : "+w"(x))
#else
#define KEEP_IN_REGISTER(x) asm volatile("" : "+m"(x))
#endif

constexpr int CHAINS = 12, ROUNDS = 4096;  // 12 chains hide a latency of 4 cycles at 2 (and up to 3) instructions a cycle and fit 16 registers

ONEPASS_INLINE double seconds_now() {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// ROUNDS rounds of chain = a * chain + b; the values converge to b / (1 - a) = 1, so nothing overflows or becomes denormal.
ONEPASS_INLINE void fp32_rounds(vf* state) {
  vf chain[CHAINS];
#pragma GCC unroll 16
  for (int c = 0; c < CHAINS; c++) chain[c] = state[c];
  vf a = broadcast(0.5f), b = broadcast(0.5f);
  KEEP_IN_REGISTER(a);
  KEEP_IN_REGISTER(b);
  for (int round = 0; round < ROUNDS; round++) {
#pragma GCC unroll 16
    for (int c = 0; c < CHAINS; c++) {
      chain[c] = a * chain[c] + b;
      KEEP_IN_REGISTER(chain[c]);
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < CHAINS; c++) state[c] = chain[c];
}

#if ONEPASS_BF16_DOT
ONEPASS_INLINE void bf16_rounds(vf* state) {
  __m512 chain[CHAINS];
#pragma GCC unroll 16
  for (int c = 0; c < CHAINS; c++) chain[c] = (__m512)state[c];
  __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);  // two bf16 ones
  for (int round = 0; round < ROUNDS; round++) {
#pragma GCC unroll 16
    for (int c = 0; c < CHAINS; c++) {
      chain[c] = _mm512_dpbf16_ps(chain[c], ones, ones);
      KEEP_IN_REGISTER(chain[c]);
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < CHAINS; c++) state[c] = (vf)chain[c];
}
#endif

extern "C" int ONEPASS_KERNEL(fma_peak)(const FmaPeakArgs* args) {
  double total = 0.0;
#pragma omp parallel num_threads((int)args->num_threads) reduction(+ : total)
  {
    vf state[CHAINS];
    for (int c = 0; c < CHAINS; c++) state[c] = broadcast((float)c);
    double flops_per_round = 2.0 * CHAINS * ONEPASS_VW;
#if ONEPASS_BF16_DOT
    bool dot = args->dtype == ONEPASS_BF16;
    if (dot) flops_per_round *= 2.0;
#endif
    const double start = seconds_now();
    double elapsed = 0.0, rounds = 0.0;
    do {
#if ONEPASS_BF16_DOT
      if (dot)
        bf16_rounds(state);
      else
#endif
        fp32_rounds(state);
      rounds += ROUNDS;
      elapsed = seconds_now() - start;
    } while (elapsed < args->seconds);
    for (int c = 0; c < CHAINS; c++) KEEP_IN_REGISTER(state[c]);
    total += flops_per_round * rounds / elapsed;
  }
  *args->gflops = 1e-9 * total;
  return ONEPASS_OK;
}
