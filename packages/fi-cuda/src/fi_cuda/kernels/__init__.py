"""The CUDA kernels: a module for each stem, holding its spec, its tuning and the binding to fi-core's protocol."""
