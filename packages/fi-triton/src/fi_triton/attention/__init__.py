"""Attention over the scheduler's work list; importing this package imports no Triton."""
