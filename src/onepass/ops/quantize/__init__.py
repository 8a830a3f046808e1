"""Quantising: the formats that other operations read."""
