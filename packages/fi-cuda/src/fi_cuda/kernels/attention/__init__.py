"""Attention: planning on the GPU, workspace and tuning, and the kernels with their plan states."""
