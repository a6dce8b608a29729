"""fi-scheduler: work partition, page pool, prefix cache, continuous batching and CUDA graphs; no model, no kernel."""
