"""Attention: softmax(q k^T) v in one pass over the keys, its backward, decoding from a cache, merging of partial results."""
