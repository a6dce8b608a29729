"""The CUDA backend's plugin: the backend's name, the hooks of its compile pipeline, and its state for ``fi doctor``."""

from __future__ import annotations

from fi_core.errors import FiError
from fi_core.hookspecs import BackendInfo, hookimpl
from fi_core.registry import KernelRegistry

from . import __version__
from .entries import ATTENTION_ENTRIES, BACKEND, ENTRIES, SAMPLING_ENTRIES
from .hookspecs import declare


@hookimpl
def fi_backend() -> BackendInfo:
    return BackendInfo(
        BACKEND, __version__, "CUDA kernels compiled by NVRTC, for NVIDIA GPUs from sm_80 on", priority=100
    )


@hookimpl
def fi_register_kernels(registry: KernelRegistry) -> None:
    declare(registry.manager)
    for entry in (*ENTRIES, *ATTENTION_ENTRIES, *SAMPLING_ENTRIES):
        registry.add(entry)


@hookimpl
def fi_doctor() -> list[str]:
    from .compile import default_cache
    from .toolchain import find_toolchain, has_driver

    try:
        toolchain = str(find_toolchain())
    except FiError as error:
        toolchain = f"none; only kernels made ahead of time are available ({error})"
    cache = default_cache()
    state = f"{len(cache.names())} artifacts" if cache.root.is_dir() else "not made yet"
    driver = "libcuda found" if has_driver() else "libcuda not found: kernels compile here, and cannot be launched"
    return [f"compiler: {toolchain}", f"cache {cache.root}: {state}", f"driver: {driver}"]
