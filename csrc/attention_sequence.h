// The sequences of a call: their lengths, and where their queries and keys lie in a batch, packed one after the other, or
// in pages.
#pragma once
#include "attention_tile.h"

namespace {

// One sequence of a call.
struct Sequence {
  AttentionProblem p;  // with its own lengths, shift and key mask
  int64_t b;
  int64_t q0, k0;        // its first query and key in packed tensors
  int64_t lse_b, lse_h;  // from sequence to sequence and from head to head in lse

  template <class T>
  T* query(const Tensor4& x, int64_t h, int64_t i) const {
    return (T*)x.data + b * x.stride_b + (q0 + i) * x.stride_s + h * x.stride_h;
  }
  template <class T>
  T* key(const Tensor4& x, int64_t h_kv, int64_t j) const {
    return (T*)x.data + b * x.stride_b + (k0 + j) * x.stride_s + h_kv * x.stride_h;
  }
  int64_t row(int64_t h, int64_t i) const { return b * lse_b + h * lse_h + q0 + i; }
};

ONEPASS_INLINE int64_t keys_of(const PackedSequences& s, int64_t b) {
  return s.seqused_k ? s.seqused_k[b] : s.cu_seqlens_k[b + 1] - s.cu_seqlens_k[b];
}

ONEPASS_INLINE Sequence sequence_of(const AttentionProblem& p, const PackedSequences& packed, int64_t b) {
  Sequence s = {p, b, 0, 0, p.nheads_q * p.seqlen_q, p.seqlen_q};
  if (packed.cu_seqlens_q) {
    s.q0 = packed.cu_seqlens_q[b];
    s.k0 = packed.cu_seqlens_k ? packed.cu_seqlens_k[b] : 0;
    s.lse_b = 0;
    s.lse_h = packed.total_q;
    s.p.seqlen_q = packed.cu_seqlens_q[b + 1] - s.q0;
    s.p.seqlen_k = keys_of(packed, b);
    s.p.shift = packed.bottom_right ? s.p.seqlen_k - s.p.seqlen_q : 0;
  }
  if (p.key_mask) s.p.key_mask += b * p.key_mask_stride_b + s.k0 * p.key_mask_stride_s;
  return s;
}

// Whether the lengths rise from 0 to the total.
ONEPASS_INLINE bool rises(const int32_t* cu_seqlens, int64_t batch, int64_t total) {
  if (cu_seqlens[0] != 0 || cu_seqlens[batch] != total) return false;
  for (int64_t b = 0; b < batch; b++)
    if (cu_seqlens[b + 1] < cu_seqlens[b]) return false;
  return true;
}

// Whether every page that these keys of a sequence lie in exists.
ONEPASS_INLINE bool pages_exist(const PageTable& t, int64_t b, int64_t keys) {
  for (int64_t i = 0; i * t.page_size < keys; i++) {
    const int64_t page = t.table[b * t.stride_b + i * t.stride_p];
    if (page < 0 || page >= t.pages) return false;
  }
  return true;
}

// Packed sequences: checks lengths (which the problem's are bounds of) and pages, and sets the problem's to the longest. False: an
// index is out of range.
ONEPASS_INLINE bool take_lengths(AttentionProblem& p, const PackedSequences& packed, const PageTable& pages) {
  if (!packed.cu_seqlens_q) return true;
  if (!rises(packed.cu_seqlens_q, p.batch, packed.total_q)) return false;
  if (packed.cu_seqlens_k && !rises(packed.cu_seqlens_k, p.batch, packed.total_k)) return false;
  const int64_t most_queries = p.seqlen_q, most_keys = p.seqlen_k;
  p.seqlen_q = p.seqlen_k = 0;
  for (int64_t b = 0; b < p.batch; b++) {
    const int64_t keys = keys_of(packed, b);
    const int64_t most =
        pages.table ? pages.max_pages * pages.page_size : packed.cu_seqlens_k[b + 1] - packed.cu_seqlens_k[b];
    if (keys < 0 || keys > most || (pages.table && !pages_exist(pages, b, keys))) return false;
    p.seqlen_q = max_of(p.seqlen_q, packed.cu_seqlens_q[b + 1] - packed.cu_seqlens_q[b]);
    p.seqlen_k = max_of(p.seqlen_k, keys);
  }
  return p.seqlen_q <= most_queries && p.seqlen_k <= most_keys;
}

// Elements from a paged tensor's first to key j of sequence b, and how many keys from j on lie in one page.
struct PagePlace {
  int64_t offset, keys;
};
ONEPASS_INLINE PagePlace page_place(const PageTable& t, const Tensor4& x, int64_t b, int64_t j) {
  const int64_t within = j % t.page_size;
  return {t.table[b * t.stride_b + j / t.page_size * t.stride_p] * x.stride_b + within * x.stride_s, t.page_size - within};
}

// Rows of keys or values as T.
template <class T>
struct KeyRows {
  const T* data;
  int64_t stride_s, stride_d;
};

// Keys j0 to j0 + keys of one head, copied next to each other.
template <class T>
KeyRows<T> gather_pages(T* dst, const PageTable& t, const Tensor4& x, int64_t b, int64_t h_kv, int64_t j0, int64_t keys, int64_t depth) {
  for (int64_t j = 0; j < keys;) {
    const PagePlace place = page_place(t, x, b, j0 + j);
    const T* src = (const T*)x.data + place.offset + h_kv * x.stride_h;
    for (const int64_t end = min_of(keys, j + place.keys); j < end; j++, src += x.stride_s)
      if (x.stride_d == 1)
        memcpy(dst + j * depth, src, sizeof(T) * (size_t)depth);
      else
        for (int64_t d = 0; d < depth; d++) dst[j * depth + d] = src[d * x.stride_d];
  }
  return {dst, depth, 1};
}

}  // namespace
