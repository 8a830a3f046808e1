// The arguments of every kernel, as Python packs them: 8-byte fields only (int64_t, double, pointer), so no padding.
// Strides count elements, not bytes. Null pointers mean "absent".
#pragma once
#include <cstdint>

enum OnepassDtype : int64_t { ONEPASS_F32 = 0, ONEPASS_BF16 = 1, ONEPASS_F16 = 2 };

// What a kernel returns.
// BAD_INDEX: an index or a length in a tensor points outside its array; nothing was read there.
enum OnepassStatus : int { ONEPASS_OK = 0, ONEPASS_OUT_OF_MEMORY = 1, ONEPASS_BAD_INDEX = 2 };

// A (batch, seqlen, nheads, head_dim) tensor of any strides.
struct Tensor4 {
  void* data;
  int64_t stride_b, stride_s, stride_h, stride_d;
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
};

struct AttentionFwdArgs {
  AttentionProblem problem;
  Tensor4 q, k, v, out;  // out contiguous
  float* lse;            // (batch, nheads_q, seqlen_q) contiguous, natural log; or null
};

struct AttentionBwdArgs {
  AttentionProblem problem;
  Tensor4 q, k, v, out, dout;
  const float* lse;   // (batch, nheads_q, seqlen_q) contiguous
  const float* dlse;  // the same, or null
  Tensor4 dq, dk, dv;  // contiguous; data null where not needed
};

struct AttentionDecodeArgs {
  AttentionProblem problem;  // seqlen_k is the caches' capacity; the shift follows from cache_seqlens
  Tensor4 q, k, v, out;
  float* lse;                    // as in forward, or null
  const int32_t* cache_seqlens;  // (batch,), or null: the caches are full
  int64_t num_splits;            // parts the keys are cut into; 0 = chosen from heads, keys and threads
};

// Attention on PyTorch's own tensors (csrc/direct.cpp): what is left to say.
struct DirectAttentionArgs {
  int64_t num_threads, window_left, window_right;
  int64_t decode;  // 1 = attention_decode, 0 = attention
  int64_t bottom_right, num_splits;
  double softmax_scale;
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
