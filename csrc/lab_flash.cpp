// Step 4, flash: tiles of block_q queries x block_k keys, and a softmax that never needs the whole row.
//
// The online softmax. For each query keep the maximum m of the scores so far, the sum l of exp(score - m), and the sum o of
// exp(score - m) * v. When a tile of keys brings a larger maximum m', what was summed before is too large by exp(m' - m):
//
//   alpha = exp(m - m')      p = exp(s - m')      l = alpha * l + sum(p)      o = alpha * o + p V      out = o / l at the end
//
// So a tile of scores is used up where it was made, and K and V are read once for every block of queries, not for every query.
//
// A lane is a query. The tiles are stored transposed, keys (or features) down and queries across, so each lane runs the
// softmax of its own query: no sum or maximum ever goes across lanes, and m, l and alpha are plain vectors. Both products are
// then of one kind, a scalar of K or V read in place times a vector of queries:
//
//   S^T (keys x queries) = K Q^T             O^T (features x queries) = alpha * O^T + V^T P^T
#include <cfloat>

#include "lab.h"

// The products keep TILE_ROWS x (up to) 3 vectors of sums in registers: as many as fit, 32 registers with AVX-512, else 16.
constexpr int TILE_ROWS = VW == 16 ? 8 : 4;
// Features of a score that are summed in one go: a long sum in two short levels rounds less.
constexpr int64_t FEATURES = 64;

// c (ROWS x VECTORS vectors) = alpha * c + a b, where a (ROWS x depth) has any strides and b (depth x width) has rows of width
// floats, as has c. Without alpha, c = a b. The product is summed on its own and then added to c.
template <int ROWS, int VECTORS>
ONEPASS_INLINE void tile_product(const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t depth, int64_t width,
                                 const float* alpha, float* c) {
  vf sums[ROWS][VECTORS] = {};
  for (int64_t d = 0; d < depth; d++) {
    vf bd[VECTORS];
#pragma GCC unroll 16
    for (int n = 0; n < VECTORS; n++) bd[n] = load(b + d * width + n * VW);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
      for (int n = 0; n < VECTORS; n++) sums[r][n] += a[r * a_row + d * a_depth] * bd[n];
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
    for (int n = 0; n < VECTORS; n++) {
      float* cr = c + r * width + n * VW;
      store(cr, alpha ? load(alpha + n * VW) * load(cr) + sums[r][n] : sums[r][n]);
    }
}

template <int VECTORS>
static void product_columns(int64_t rows, const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t depth,
                            int64_t width, const float* alpha, float* c) {
  int64_t r = 0;
  for (; r + TILE_ROWS <= rows; r += TILE_ROWS)
    tile_product<TILE_ROWS, VECTORS>(a + r * a_row, a_row, a_depth, b, depth, width, alpha, c + r * width);
  for (; r + 2 <= rows; r += 2)
    tile_product<2, VECTORS>(a + r * a_row, a_row, a_depth, b, depth, width, alpha, c + r * width);
  for (; r < rows; r++) tile_product<1, VECTORS>(a + r * a_row, a_row, a_depth, b, depth, width, alpha, c + r * width);
}

// The whole product: columns go three vectors at a time, and two where three would leave a single one over.
static void product(int64_t rows, const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t depth, int64_t width,
                    const float* alpha, float* c) {
  for (int64_t n = 0; n < width;) {
    const int64_t left = (width - n) / VW, vectors = left == 4 ? 2 : min_of(left, 3);
    const auto columns = vectors == 3 ? product_columns<3> : vectors == 2 ? product_columns<2> : product_columns<1>;
    columns(rows, a, a_row, a_depth, b + n, depth, width, alpha ? alpha + n : alpha, c + n);
    n += vectors * VW;
  }
}

// One tile of scores to weights in place, and m, l and alpha brought up to date: all for VW queries at once.
static void online_softmax(float* scores, int64_t keys, int64_t width, float* m, float* l, float* alpha) {
  for (int64_t n = 0; n < width; n += VW) {
    const vf before = load(m + n);
    vf highest = before, sum = {};
    for (int64_t j = 0; j < keys; j++) highest = vmax(load(scores + j * width + n), highest);
    for (int64_t j = 0; j < keys; j++) {
      const vf p = vexp2((load(scores + j * width + n) - highest) * LOG2E);
      store(scores + j * width + n, p);
      sum += p;
    }
    // Exactly 1 where the maximum stays, so that an error of exp2 cannot add up from tile to tile.
    const vf rescale = before == highest ? broadcast(1.0f) : vexp2((before - highest) * LOG2E);
    store(l + n, load(l + n) * rescale + sum);
    store(m + n, highest);
    store(alpha + n, rescale);
  }
}

// What one thread holds: `width` queries, the tile's block_q rounded up to whole vectors. The lanes past the last query carry
// zeros along, and nobody reads them.
struct Workspace {
  float *q, *scores, *out, *m, *l, *alpha, *ones;
};

static int64_t workspace_floats(const LabAttentionArgs* a, int64_t width, int64_t block_k) {
  return width * (a->head_dim + block_k + a->head_dim_v + 4);
}

static Workspace workspace_at(float* p, const LabAttentionArgs* a, int64_t width, int64_t block_k) {
  Workspace w;
  w.q = p;                                // (head_dim, width): Q^T, scaled
  w.scores = w.q + a->head_dim * width;   // (block_k, width): S^T, then P^T
  w.out = w.scores + block_k * width;     // (head_dim_v, width): O^T, not yet divided by l
  w.m = w.out + a->head_dim_v * width;    // (width,) each
  w.l = w.m + width;
  w.alpha = w.l + width;
  w.ones = w.alpha + width;
  return w;
}

// Queries [i_begin, i_end) of one head, against every key that any of them sees.
static void flash_block(const LabAttentionArgs* a, const Head& head, int64_t i_begin, int64_t i_end, int64_t width,
                        int64_t block_k, const Workspace& w) {
  const int64_t queries = i_end - i_begin;
  for (int64_t d = 0; d < a->head_dim; d++)
    for (int64_t i = 0; i < width; i++)
      w.q[d * width + i] = i < queries ? head.q[(i_begin + i) * head.q_stride + d] * (float)a->softmax_scale : 0.0f;
  memset(w.out, 0, (size_t)(a->head_dim_v * width) * sizeof(float));
  for (int64_t i = 0; i < width; i++) {
    w.m[i] = -FLT_MAX;  // finite, so that m - m' is never inf - inf
    w.l[i] = 0.0f;
    w.ones[i] = 1.0f;
  }

  const int64_t seen_by_all = visible_keys(a, i_begin), seen_by_any = visible_keys(a, i_end - 1);
  for (int64_t j = 0; j < seen_by_any; j += block_k) {
    const int64_t keys = min_of(block_k, seen_by_any - j);
    for (int64_t d = 0; d < a->head_dim; d += FEATURES)
      product(keys, head.k + j * head.k_stride + d, head.k_stride, 1, w.q + d * width, min_of(FEATURES, a->head_dim - d), width,
              d == 0 ? nullptr : w.ones, w.scores);
    if (j + keys > seen_by_all)  // the tile crosses the causal diagonal
      for (int64_t i = 0; i < queries; i++)
        for (int64_t jj = max_of(0, visible_keys(a, i_begin + i) - j); jj < keys; jj++) w.scores[jj * width + i] = NEG_INF;
    online_softmax(w.scores, keys, width, w.m, w.l, w.alpha);
    product(a->head_dim_v, head.v + j * head.v_stride, 1, head.v_stride, w.scores, keys, width, w.alpha, w.out);
  }

  for (int64_t i = 0; i < queries; i++) {
    float* out = head.out + (i_begin + i) * head.out_stride;
    const float inverse = w.l[i] == 0.0f ? 0.0f : 1.0f / w.l[i];  // a query without keys gives 0
    for (int64_t d = 0; d < a->head_dim_v; d++) out[d] = w.out[d * width + i] * inverse;
  }
}

extern "C" int ONEPASS_KERNEL(lab_flash)(const LabAttentionArgs* a) {
  const int64_t heads = a->batch * a->nheads_q;
  const int64_t block_q = min_of(a->block_q, max_of(1, a->seqlen_q)), block_k = min_of(a->block_k, a->seqlen_k);
  const int64_t tiles_q = ceil_div(a->seqlen_q, block_q), width = round_up(block_q, VW);
  const int threads = team_size(a, heads * tiles_q);
  const int64_t thread_floats = workspace_floats(a, width, block_k);
  float* memory = allocate(a, threads * thread_floats);
  if (!memory) return ONEPASS_OUT_OF_MEMORY;

#pragma omp parallel num_threads(threads)
  {
    const Workspace w = workspace_at(memory + omp_get_thread_num() * thread_floats, a, width, block_k);
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t tile = tiles_q - 1; tile >= 0; tile--)  // with the causal mask the last tiles have the most to do
      for (int64_t h = 0; h < heads; h++)
        flash_block(a, head_of(a, h), tile * block_q, min_of((tile + 1) * block_q, a->seqlen_q), width, block_k, w);
  }
  free(memory);
  return ONEPASS_OK;
}
