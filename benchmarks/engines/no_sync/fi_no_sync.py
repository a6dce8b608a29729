"""A plugin for vLLM and SGLang: while the adapters' code of a step runs, torch raises at every synchronisation that it knows of.

Put this folder on PYTHONPATH. Each process prints, now and then and when it ends, how many calls of which methods ran guarded.
The first calls of each method are let through, because they compile and allocate.
"""

from __future__ import annotations

import atexit
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

LET_THROUGH = 64
REPORT_EVERY = 256
"""Calls of a method from one report to the next: SGLang ends its processes by a signal, which runs no ``atexit``."""
calls: Counter[str] = Counter()


def _guarded(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(*arguments: Any, **named: Any) -> Any:
        calls[name] += 1
        if calls[name] % REPORT_EVERY == 0:
            _report()
        if calls[name] <= LET_THROUGH or not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
            return method(*arguments, **named)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return method(*arguments, **named)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    return run


def _guard(owner: type, *names: str) -> None:
    for name in names:
        method = getattr(owner, name)
        if not hasattr(method, "__wrapped__"):
            setattr(owner, name, _guarded(f"{owner.__name__}.{name}", method))


def _report() -> None:
    guarded = {name: max(0, num - LET_THROUGH) for name, num in calls.items()}
    if guarded and torch.cuda.is_available():
        print("fi_no_sync: guarded calls without a synchronisation:", guarded, flush=True)


def guard_vllm() -> None:
    """The entry point of vLLM."""
    from fi_vllm.impl import FiImpl
    from fi_vllm.metadata import FiMetadataBuilder
    from fi_vllm.sampler import FiTopKTopPSampler

    _guard(FiMetadataBuilder, "build")
    _guard(FiImpl, "forward")
    _guard(FiTopKTopPSampler, "forward")
    atexit.register(_report)


def guard_sglang() -> None:
    """The entry point of SGLang."""
    from fi_sglang.backend import FiAttnBackend

    _guard(FiAttnBackend, "init_forward_metadata_out_graph", "init_forward_metadata_in_graph", "forward_extend")
    FiAttnBackend.forward_decode = FiAttnBackend.forward_extend
    atexit.register(_report)
