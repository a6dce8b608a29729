"""vLLM's CPU platform, made to accept a backend of its registry; what it would load natively is not needed."""

import torch
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import DeviceCapability

# The native ops that are named on a CPU: the worker binds threads to cores; GELU's are looked up and not called.
_library = torch.library.Library("_C", "FRAGMENT")
_library.define("init_cpu_memory_env(int[] nodes) -> ()")
_library.impl("init_cpu_memory_env", lambda nodes: None, "CompositeExplicitAutograd")
for _name in ("gelu_and_mul", "gelu_tanh_and_mul"):
    _library.define(f"{_name}(Tensor(a!) out, Tensor input) -> ()")


class TestPlatform(CpuPlatform):
    __test__ = False

    @classmethod
    def import_kernels(cls):
        """There are none."""

    @classmethod
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None):
        """As the CUDA platform does it: the backend says whether it serves the layer."""
        asked = attn_selector_config._asdict()
        reasons = selected_backend.get_class().validate_configuration(device_capability=DeviceCapability(9, 0), **asked)
        if reasons:
            raise ValueError(f"{selected_backend.name}: {reasons}")
        return selected_backend.get_path()

    @classmethod
    def check_and_update_config(cls, vllm_config):
        super().check_and_update_config(vllm_config)
        vllm_config.cache_config.block_size = 16
        vllm_config.parallel_config.distributed_executor_backend = "uni"
        vllm_config.parallel_config.worker_cls = "fi_vllm_cpu.worker.TestWorker"
