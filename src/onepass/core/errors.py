"""Exceptions that are onepass's own; shapes and options raise ValueError, dtypes TypeError."""


class UnsupportedError(NotImplementedError):
    """No kernel can do this call. The message lists every backend's reasons."""
