"""Specs and bindings of the sampling kernels, which hold a row of logits in the shared memory of a cluster of blocks."""
