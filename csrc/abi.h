// The arguments of every kernel, as Python packs them: 8-byte fields only (int64_t, double, pointer), so no padding.
// Strides count elements, not bytes. Null pointers mean "absent".
#pragma once
#include <cstdint>

enum OnepassDtype : int64_t { ONEPASS_F32 = 0, ONEPASS_BF16 = 1, ONEPASS_F16 = 2 };

// How a cache's elements are stored: in q's dtype, in one byte, or two in a byte, the first in its low nibble.
enum OnepassCacheFormat : int64_t {
  ONEPASS_PLAIN = 0,
  ONEPASS_INT8 = 1,
  ONEPASS_E4M3FN = 2,
  ONEPASS_E5M2 = 3,
  ONEPASS_E4M3FNUZ = 4,
  ONEPASS_E5M2FNUZ = 5,
  ONEPASS_INT4 = 6
};

// What a kernel returns.
// BAD_INDEX: an index or a length in a tensor points outside its array; nothing was read there.
enum OnepassStatus : int { ONEPASS_OK = 0, ONEPASS_OUT_OF_MEMORY = 1, ONEPASS_BAD_INDEX = 2 };

// A (batch, seqlen, nheads, head_dim) tensor of any strides.
struct Tensor4 {
  void* data;
  int64_t stride_b, stride_s, stride_h, stride_d;
};

// What changes the scores beyond scale and masks, in this order: softcap, ALiBi, bias; then the sink and dropout.
struct ScoreOptions {
  double softcap;    // 0 = none
  double dropout_p;  // 0 = none
  const float* alibi_slopes;
  int64_t alibi_stride_b, alibi_stride_h;
  const void* attn_bias;  // fp32 or of q's dtype; strides are 0 in broadcast dimensions
  int64_t bias_dtype, bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k;
  const void* attn_sink;  // (nheads_q,), fp32 or of q's dtype
  int64_t sink_dtype, sink_stride;
  const int64_t* rng_state;  // seed and offset of dropout
  int64_t rng_stride;
};

// Packed sequences: q is (total_q, nheads_q, head_dim) with stride_b 0, and so are k, v and the key mask; lse is (nheads_q, total_q).
// The problem's seqlen_q and seqlen_k are then bounds of the sequences' lengths, and its shift is found from here.
struct PackedSequences {
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // (batch + 1,) contiguous, or null: one sequence a batch entry
  const int32_t* seqused_k;                    // (batch,) contiguous: how many of a sequence's keys count; or null: all
  int64_t total_q, total_k, bottom_right;
};

// Keys and values in pages (pages, page_size, nheads_kv, head_dim); stride_b of k and v is a page's.
struct PageTable {
  const int32_t* table;  // (batch, max_pages), or null: not paged
  int64_t stride_b, stride_p, max_pages, pages, page_size;
};

// What forward and backward share: the problem and the options on its scores.
struct AttentionProblem {
  int64_t dtype, num_threads;
  int64_t batch, seqlen_q, seqlen_k, nheads_q, nheads_kv, head_dim, head_dim_v;
  // Query i sees keys i + shift - window_left <= j <= i + shift + window_right; -1 = unlimited on that side.
  int64_t shift, window_left, window_right;
  double softmax_scale;
  const uint8_t* key_mask;  // (batch, seqlen_k), nonzero = seen
  int64_t key_mask_stride_b, key_mask_stride_s;
  ScoreOptions options;
};

struct AttentionFwdArgs {
  AttentionProblem problem;
  Tensor4 q, k, v, out;  // out contiguous
  float* lse;            // (batch, nheads_q, seqlen_q) contiguous, natural log; or null
  PackedSequences packed;
  PageTable pages;  // only with packed sequences; cu_seqlens_k is then null
};

struct AttentionBwdArgs {
  AttentionProblem problem;
  Tensor4 q, k, v, out, dout;
  const float* lse;   // (batch, nheads_q, seqlen_q) contiguous
  const float* dlse;  // the same, or null
  Tensor4 dq, dk, dv;  // contiguous; data null where not needed
  void* dbias;         // of the bias's dtype, contiguous and zero, (1 or batch, 1 or nheads_q, 1 or rows, 1 or columns); or null
  int64_t dbias_batch, dbias_heads, dbias_rows, dbias_columns;
  void* dsink;  // (nheads_q,) contiguous, of the sink's dtype; or null
  PackedSequences packed;
};

struct CacheFormat {
  int64_t code;  // of OnepassCacheFormat
  // What elements of a byte are multiplied by, (batch, nheads_kv) with any strides; or null: 1.
  const float* descale;
  int64_t descale_stride_b, descale_stride_h;
  // Of ONEPASS_INT4, which both caches have or neither: for each of `groups` of a row's features, stride_d apart, an fp16 scale and
  // its shift beside it.
  Tensor4 pairs;
  int64_t groups;
};

struct AttentionDecodeArgs {
  AttentionProblem problem;  // seqlen_k is the caches' capacity; the shift follows from cache_seqlens
  Tensor4 q, k, v, out;
  float* lse;                    // as in forward, or null
  const int32_t* cache_seqlens;  // (batch,), or null: the caches are full
  int64_t num_splits;            // parts the keys are cut into; 0 = chosen from heads, keys and threads
  PageTable pages;
  CacheFormat k_format, v_format;
};

struct MergeArgs {
  int64_t dtype, num_threads, parts, batch, seqlen, nheads, head_dim;
  const void* outs;   // (parts, batch, seqlen, nheads, head_dim) contiguous
  const float* lses;  // (parts, batch, nheads, seqlen) contiguous
  void* out;
  float* lse;
};

struct MergeBwdArgs {
  MergeArgs merge;  // out and lse: the forward's results
  const void* dout;
  const float* dlse;  // null: no gradient
  void* douts;
  float* dlses;
};

struct FmaPeakArgs {
  int64_t dtype, num_threads;
  double seconds;
  double* gflops;
};

// A tensor of rows with adjacent columns.
struct Rows {
  void* data;
  int64_t stride;  // between rows
};

struct NormArgs {
  int64_t dtype, residual_dtype, weight_dtype, bias_dtype;  // residual_dtype: also of residual_out; dtype where there is none
  int64_t num_threads, rows, columns;
  int64_t center;  // 1 = layer_norm, which subtracts the mean; 0 = rms_norm
  double eps, offset;
  Rows x, residual;             // residual: data null without
  const void *weight, *bias;    // (columns,) contiguous, or null
  void *y, *residual_out;       // contiguous
  float *mean, *rstd;           // (rows,), or null
};

struct NormBwdArgs {
  int64_t dtype, dy_dtype, weight_dtype, bias_dtype;  // dtype: of x, dresidual and dx
  int64_t num_threads, rows, columns, center;
  double offset;
  Rows dy, dresidual, x;        // dresidual: data null without
  const void* weight;           // (columns,) contiguous, or null
  const float *mean, *rstd;     // (rows,)
  void *dx, *dweight, *dbias;   // contiguous; null where not needed
};

struct SoftmaxArgs {
  int64_t dtype, num_threads, rows, columns;
  Rows x;
  void* y;  // contiguous
};

struct SoftmaxBwdArgs {
  int64_t dtype, num_threads, rows, columns;
  Rows dy, y;
  void* dx;  // contiguous
};

enum OnepassActivation : int64_t { ONEPASS_SILU = 0, ONEPASS_GELU = 1, ONEPASS_GELU_TANH = 2 };

struct GluArgs {
  int64_t dtype, num_threads, rows, columns, activation;
  Rows gate, up;
  void* out;  // contiguous
};

struct GluBwdArgs {
  int64_t dtype, num_threads, rows, columns, activation;
  Rows dout, gate, up;
  void *dgate, *dup;  // contiguous; null where not needed
};

struct CrossEntropyArgs {
  int64_t dtype, num_threads, rows, columns, ignore_index;
  double label_smoothing, z_loss, softcap;
  Rows logits;
  const int64_t* target;  // (rows,)
  float *loss, *lse;      // (rows,); lse is read in the backward
};

struct CrossEntropyBwdArgs {
  CrossEntropyArgs forward;
  const float *dloss, *dlse;  // (rows,); dlse null: no gradient
  int64_t stride_dloss, stride_dlse;
  int64_t first_class, classes;  // the logits are columns first_class, first_class + 1, ... of `classes`
  Rows dlogits;                  // may be the logits themselves
};

struct RopeArgs {
  int64_t dtype, num_threads, batch, seqlen, nheads_q, nheads_kv, head_dim, rotary_dim;
  int64_t interleaved, inverse;
  Tensor4 q, k;
  void *q_out, *k_out;     // contiguous
  const float *cos, *sin;  // rows of rotary_dim / 2
  int64_t stride_cos_b, stride_cos_s, stride_sin_b, stride_sin_s;
  const int64_t* position_ids;  // (batch, seqlen): rows of cos and sin, of which there are table_rows; or null
  int64_t stride_position_b, stride_position_s, table_rows;
};

struct RepeatKvArgs {
  int64_t dtype, num_threads, batch, seqlen, nheads_kv, head_dim, n_rep;
  Tensor4 x;  // what is repeated; in the backward the gradient of the repeated heads
  void* out;  // contiguous
};

struct AppendKvArgs {
  int64_t dtype, num_threads, format, batch, seqlen, nheads_kv, head_dim;
  int64_t pages, page_size, groups;  // without a page table the cache's batch and capacity
  Tensor4 x;                         // the new keys or values
  Tensor4 cache;                     // (pages, page_size, nheads_kv, head_dim), int4: head_dim / 2
  const int32_t* cache_seqlens;      // (batch,), keys stored before
  const int32_t* page_table;         // (batch, max_pages) contiguous, or null
  int64_t max_pages;
  const float* descale;  // int8
  int64_t descale_stride_b, descale_stride_h;
  void* pairs;  // int4: fp16 (pages, page_size, nheads_kv, groups, 2)
  int64_t pairs_stride_b, pairs_stride_s, pairs_stride_h, pairs_stride_g, pairs_stride_p;
};

enum OnepassMemoryAccess : int64_t { ONEPASS_READ = 0, ONEPASS_COPY = 1, ONEPASS_STREAM = 2 };  // stream: a copy past the caches

struct BandwidthArgs {
  int64_t num_threads, access, bytes, block_bytes;  // bytes: read in all
  double seconds;
  double* gigabytes_per_second;  // read and written
};

// One of the four steps of attention in onepass.lab: fp32, every tensor's stride_d is 1.
struct LabAttentionArgs {
  int64_t num_threads;
  int64_t batch, seqlen_q, seqlen_k, nheads_q, nheads_kv, head_dim, head_dim_v;
  int64_t causal;            // 1 = query i sees keys j <= i + seqlen_k - seqlen_q
  int64_t block_q, block_k;  // at least 1
  double softmax_scale;
  Tensor4 q, k, v, out;
  int64_t* working_memory;  // receives the bytes taken beyond inputs and output, or null
};
