"""For tests: a platform on which vLLM runs on a CPU without its native libraries, with any attention backend."""


def platform() -> str:
    """The entry point of ``vllm.platform_plugins``."""
    return "fi_vllm_cpu.platform.TestPlatform"
