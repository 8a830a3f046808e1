// The matrix products of attention, one register tile at a time: C (M x N vectors) = A (scalars, broadcast) x B (vectors).
//
//   acc[m][n] += A[m * stride_m + k * stride_k] * B[k * ldb + n * VW]      for k in 0..K
//
// A is read in place from memory, in either orientation; B and C are rows of vectors. One broadcast feeds N products,
// so the loop is bound by the multiply-add units. The accumulators stay in registers: every loop over them is unrolled.
// A tile's sum starts at zero and is added to C at the end: sums of sums lose less than one chain over a whole sequence.
#pragma once
#include "simd.h"

#if ONEPASS_VW == 16
constexpr int TILE_M = 8;  // 8 x 3 accumulators + 3 + 1 of 32 registers
#else
constexpr int TILE_M = 4;  // 4 x 3 + 3 + 1 of 16
#endif
constexpr int TILE_N = 3;

// What happens to the tile that is already in C.
enum class Into { OVERWRITE, ADD, RESCALE_AND_ADD };

// How the products are computed: in fp32, or from pairs of bf16 summed into fp32.
// STEP is how many k one vector lane takes at a time; a B row of the bf16 kind holds (k, k + 1) pairs.
struct Fp32 {
  typedef float Elem;
  static constexpr int STEP = 1;
  typedef vf Vector;
  ONEPASS_INLINE vf load_vector(const float* p) { return load(p); }
  ONEPASS_INLINE vf broadcast_step(const float* p) { return broadcast(*p); }
  ONEPASS_INLINE vf multiply_add(vf acc, vf a, vf b) { return acc + a * b; }
};

#if ONEPASS_BF16_DOT
struct Bf16Pairs {
  typedef bf16 Elem;
  static constexpr int STEP = 2;
  typedef __m512bh Vector;
  ONEPASS_INLINE __m512bh load_vector(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  ONEPASS_INLINE __m512bh broadcast_step(const bf16* p) {
    int pair;
    memcpy(&pair, p, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  ONEPASS_INLINE vf multiply_add(vf acc, __m512bh a, __m512bh b) { return (vf)_mm512_dpbf16_ps((__m512)acc, a, b); }
};
#endif

// K counts steps; strides count elements. COLUMN_MAX: also raises running_max[n * VW...] to the tile's largest in each lane.
template <class Compute, int M, int N, Into INTO, bool COLUMN_MAX = false>
ONEPASS_INLINE void multiply_tile(int64_t K, const typename Compute::Elem* A, int64_t stride_m, int64_t stride_k,
                                  const typename Compute::Elem* B, int64_t ldb, float* C, int64_t ldc,
                                  const float* rescale = nullptr, float* running_max = nullptr) {
  vf acc[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) acc[m][n] = (vf){};
#pragma GCC unroll 2
  for (int64_t k = 0; k < K; k++) {
    typename Compute::Vector b[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) b[n] = Compute::load_vector(B + k * ldb + n * VW * Compute::STEP);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const typename Compute::Vector a = Compute::broadcast_step(A + m * stride_m + k * stride_k);
#pragma GCC unroll 16
      for (int n = 0; n < N; n++) acc[m][n] = Compute::multiply_add(acc[m][n], a, b[n]);
    }
  }
#pragma GCC unroll 16
  for (int n = 0; n < N; n++) {
    if (COLUMN_MAX) {
      vf top = load(running_max + n * VW);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) top = vmax(acc[m][n], top);
      store(running_max + n * VW, top);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      float* c = C + m * ldc + n * VW;
      if (INTO == Into::ADD) acc[m][n] += load(c);
      if (INTO == Into::RESCALE_AND_ADD) acc[m][n] += load(c) * load(rescale + n * VW);
      store(c, acc[m][n]);
    }
  }
}

// Any multiple of TILE_M rows. A single vector takes eight rows at once where it can: with four sums the multiply-add
// units would wait for each other.
template <class Compute, int N, Into INTO, bool COLUMN_MAX = false>
ONEPASS_OUTLINED void multiply_rows(int64_t rows, int64_t K, const typename Compute::Elem* A, int64_t stride_m,
                                  int64_t stride_k, const typename Compute::Elem* B, int64_t ldb, float* C, int64_t ldc,
                                  const float* rescale = nullptr, float* running_max = nullptr) {
  constexpr int TALL_M = N == 1 ? 8 : TILE_M;
  int64_t m = 0;
  for (; m + TALL_M <= rows; m += TALL_M)
    multiply_tile<Compute, TALL_M, N, INTO, COLUMN_MAX>(K, A + m * stride_m, stride_m, stride_k, B, ldb, C + m * ldc,
                                                        ldc, rescale, running_max);
  for (; TALL_M > TILE_M && m < rows; m += TILE_M)
    multiply_tile<Compute, TILE_M, N, INTO, COLUMN_MAX>(K, A + m * stride_m, stride_m, stride_k, B, ldb, C + m * ldc,
                                                        ldc, rescale, running_max);
}
