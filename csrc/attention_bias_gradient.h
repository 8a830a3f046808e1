// The gradient of the bias: dS of every tile, summed over the dimensions in which the bias was broadcast. Sums are kept as
// tiles, keys by queries as the scores are, and written in the bias's layout and dtype at the end. A bias that is broadcast
// nowhere needs no sums: each of its tiles is written where it arises.
//
// Every sum has one owner (the piece of work that adds to it, in order), so that results repeat bit for bit: sequences or heads
// that share a bias are one piece, queries that share it are in the same piece anyway, and over ranges of keys the sums are apart.
#pragma once
#include "attention_scores.h"
#include "workspace.h"

namespace {

// Pieces of work that share no sum: by sequence unless the bias is one for all, and by KV head unless the same.
struct Owners {
  int64_t batches, heads;  // owners along each dimension
  int64_t batch, nheads_kv;

  int64_t count() const { return batches * heads; }
  int64_t first_b(int64_t owner) const { return batches == batch ? owner / heads : 0; }
  int64_t end_b(int64_t owner) const { return batches == batch ? owner / heads + 1 : batch; }
  int64_t first_h(int64_t owner) const { return heads == nheads_kv ? owner % heads : 0; }
  int64_t end_h(int64_t owner) const { return heads == nheads_kv ? owner % heads + 1 : nheads_kv; }
};

ONEPASS_INLINE Owners owners_of(const AttentionBwdArgs& a) {
  const AttentionProblem& p = a.problem;
  const bool one_b = a.dbias && a.dbias_batch == 1, one_h = a.dbias && a.dbias_heads == 1;
  return {one_b ? 1 : p.batch, one_h ? 1 : p.nheads_kv, p.batch, p.nheads_kv};
}

struct BiasTile {
  float* data = nullptr;  // its first row
  int64_t stride = 0;     // 0: all keys are summed
};

class BiasGradient {
 public:
  BiasGradient(const AttentionBwdArgs& a, const AttentionProblem& p, int64_t ranges, int64_t range_keys)
      : dbias_(a.dbias), dtype_(p.options.bias_dtype), batch_(a.dbias_batch), heads_(a.dbias_heads), rows_(a.dbias_rows),
        columns_(a.dbias_columns), range_keys_(range_keys) {
    if (!dbias_) return;
    direct_ = batch_ == p.batch && heads_ == p.nheads_q && rows_ >= p.seqlen_q && columns_ >= p.seqlen_k;
    query_blocks_ = rows_ == 1 ? 1 : ceil_div(p.seqlen_q, BLOCK_Q);
    key_blocks_ = columns_ == 1 ? ranges : ceil_div(p.seqlen_k, BLOCK_K);
    stride_ = columns_ == 1 ? 0 : BLOCK_Q;
    tile_size_ = columns_ == 1 ? BLOCK_Q : BLOCK_K * BLOCK_Q;
    seqlen_q_ = p.seqlen_q;
    seqlen_k_ = p.seqlen_k;
  }

  void take(Workspace& w) { sums_ = tiles() ? w.take<float>(tiles() * tile_size_) : nullptr; }

  // Tiles of sums, to be cleared first; the parts that are written at the end.
  int64_t tiles() const { return dbias_ && !direct_ ? batch_ * heads_ * query_blocks_ * key_blocks_ : 0; }
  int64_t parts() const { return dbias_ && !direct_ ? batch_ * heads_ * query_blocks_ : 0; }
  void clear(int64_t tile) const { memset(sums_ + tile * tile_size_, 0, sizeof(float) * (size_t)tile_size_); }

  // Where the dS of a tile is added; its data is null where nobody wants it.
  BiasTile tile(int64_t b, int64_t h, int64_t i0, int64_t j0, int64_t j_begin, float* scratch) const {
    if (!dbias_) return {};
    if (direct_) {
      memset(scratch, 0, sizeof(float) * BLOCK_K * BLOCK_Q);
      return {scratch, BLOCK_Q};
    }
    const int64_t sheet = (batch_ == 1 ? 0 : b) * heads_ + (heads_ == 1 ? 0 : h);
    const int64_t query_block = rows_ == 1 ? 0 : i0 / BLOCK_Q, key_block = columns_ == 1 ? j_begin / range_keys_ : j0 / BLOCK_K;
    return {sums_ + ((sheet * query_blocks_ + query_block) * key_blocks_ + key_block) * tile_size_, stride_};
  }

  // A tile that needs no sums is written.
  void store(int64_t b, int64_t h, TilePlace at, BiasTile tile) const {
    if (dbias_ && direct_) write(tile.data, b * heads_ + h, at.i0, at.queries, at.j0, at.keys);
  }

  // Writes the tiles of one block of queries, summed once more where one row or column stands for all.
  void finish(int64_t part) const {
    const int64_t sheet = part / query_blocks_, i0 = part % query_blocks_ * BLOCK_Q;
    const int64_t queries = rows_ == 1 ? 1 : min_of(BLOCK_Q, seqlen_q_ - i0);
    float* tiles = sums_ + part * key_blocks_ * tile_size_;
    for (int64_t block = 1; columns_ == 1 && block < key_blocks_; block++)
      for (int64_t i = 0; i < BLOCK_Q; i++) tiles[i] += tiles[block * BLOCK_Q + i];
    for (int64_t block = 0; block < (columns_ == 1 ? 1 : key_blocks_); block++) {
      float* tile = tiles + block * tile_size_;
      const int64_t j0 = block * BLOCK_K, keys = columns_ == 1 ? 1 : min_of(BLOCK_K, seqlen_k_ - j0);
      for (int64_t r = 0; rows_ == 1 && r < keys; r++) {
        float sum = 0.f;
        for (int64_t i = 0; i < BLOCK_Q; i++) sum += tile[r * BLOCK_Q + i];
        tile[r * BLOCK_Q] = sum;
      }
      write(tile, sheet, i0, queries, j0, keys);
    }
  }

 private:
  void write(const float* tile, int64_t sheet, int64_t i0, int64_t queries, int64_t j0, int64_t keys) const {
    const int64_t offset = (sheet * rows_ + i0) * columns_ + j0;
    switch (dtype_) {
      case ONEPASS_F32: return write_as((float*)dbias_ + offset, tile, queries, keys);
      case ONEPASS_F16: return write_as((f16*)dbias_ + offset, tile, queries, keys);
      default: return write_as((bf16*)dbias_ + offset, tile, queries, keys);
    }
  }
  template <class T>
  void write_as(T* dst, const float* tile, int64_t queries, int64_t keys) const {
    float ones[BLOCK_Q];
    for (float& one : ones) one = 1.f;
    store_transposed(dst, columns_, tile, ones, queries, keys);
  }

  void* dbias_;
  int64_t dtype_, batch_, heads_, rows_, columns_, range_keys_;
  bool direct_ = false;
  int64_t query_blocks_ = 0, key_blocks_ = 0, stride_ = 0, tile_size_ = 0, seqlen_q_ = 0, seqlen_k_ = 0;
  float* sums_ = nullptr;
};

// dsink = its parts, added in the order of the sequences. A sequence without keys has none yet: there the sink takes all of dlse.
ONEPASS_INLINE void finish_sink_gradient(const AttentionBwdArgs& a, const AttentionProblem& p, const double* parts) {
  for (int64_t h = 0; h < p.nheads_q; h++) {
    double sum = 0;
    for (int64_t b = 0; b < p.batch; b++) {
      const Sequence s = sequence_of(p, a.packed, b);
      sum += parts[b * p.nheads_q + h];
      for (int64_t i = 0; s.p.seqlen_k == 0 && a.dlse && i < s.p.seqlen_q; i++)
        if (a.lse[s.row(h, i)] != NEG_INF) sum += a.dlse[s.row(h, i)];
    }
    switch (p.options.sink_dtype) {
      case ONEPASS_F32: from_float((float)sum, (float*)a.dsink + h); break;
      case ONEPASS_F16: from_float((float)sum, (f16*)a.dsink + h); break;
      default: from_float((float)sum, (bf16*)a.dsink + h);
    }
  }
}

}  // namespace
