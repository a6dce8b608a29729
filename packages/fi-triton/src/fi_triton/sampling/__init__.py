"""Triton kernels of the sampling operations."""
