"""Benchmarks: one registry that finds every operation's `bench.py`, one runner, and pictures drawn only from the JSON
it writes.
"""
