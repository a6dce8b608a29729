"""The Triton backend's plugin: who it is, and every kernel it has."""

from __future__ import annotations

from fi_core.hookspecs import BackendInfo, hookimpl
from fi_core.registry import KernelRegistry

from . import __version__
from .cache_entries import ENTRIES as CACHE_ENTRIES
from .elementwise_entries import ENTRIES as ELEMENTWISE_ENTRIES
from .interpreter import interpreting
from .names import BACKEND
from .sampling_entries import ENTRIES as SAMPLING_ENTRIES

_PRIORITY = 50
_INTERPRETED_PRIORITY = -10


@hookimpl
def fi_backend() -> BackendInfo:
    """With TRITON_INTERPRET=1 the kernels also serve CPU tensors, thousands of times slower than the reference: the
    backend then ranks below it and is used only when asked for by name."""
    if interpreting():
        summary = "Triton kernels in Triton's interpreter (TRITON_INTERPRET), on CPU tensors too; only when asked for"
        return BackendInfo(BACKEND, __version__, summary, _INTERPRETED_PRIORITY)
    return BackendInfo(BACKEND, __version__, "Triton kernels for CUDA GPUs from sm_80 on", _PRIORITY)


@hookimpl
def fi_register_kernels(registry: KernelRegistry) -> None:
    for entry in (*CACHE_ENTRIES, *ELEMENTWISE_ENTRIES, *SAMPLING_ENTRIES):
        registry.add(entry)
