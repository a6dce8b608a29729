"""fi-cuda: kernels for NVIDIA Hopper in CUDA C++, compiled by NVRTC. Importing it needs no GPU, driver or compiler."""

__version__ = "0.1.0"
