"""Attention in one pass over the keys, its backward, decoding from a cache, merging of partial results."""
