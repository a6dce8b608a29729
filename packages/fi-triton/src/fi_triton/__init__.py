"""Triton kernels for every operation of fi; importing this package imports no Triton."""

__version__ = "0.1.0"
