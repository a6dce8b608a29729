"""Conformance cases shared among processes: compilers and kernels of different cases then run side by side."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from typing import Any

import torch

from ..errors import FiError
from .kit import BoundCase, bound_cases
from .report import CaseResult

_selection: tuple[Any, ...] = ()
"""In a new process: what ``bound_cases`` is asked for."""


def results_of_processes(selection: tuple[Any, ...], jobs: int) -> list[CaseResult]:
    """The results of ``bound_cases(*selection)``, in its order, run by ``jobs`` new processes.

    They are spawned, so a script that calls this needs the usual ``if __name__ == "__main__"``, and they find the
    installed plugins themselves: one registered by hand is unknown to them. A process that dies (a crash inside a
    kernel) fails the case it ran and those not yet run. On a CPU the processes share this one's threads evenly.
    """
    found = list(bound_cases(*selection))
    num_threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _start, (selection, num_threads)) as pool:
        pending = {
            index: pool.submit(_result, index, item.name)
            for index, item in enumerate(found)
            if isinstance(item, BoundCase)
        }
        return [
            item if isinstance(item, CaseResult) else _finished(item, pending[index])
            for index, item in enumerate(found)
        ]


def _finished(item: BoundCase, future: Future[CaseResult]) -> CaseResult:
    try:
        return future.result()
    except (BrokenProcessPool, FiError) as error:
        return item.failed(f"{type(error).__name__}: {error}")


def _start(selection: tuple[Any, ...], num_threads: int) -> None:
    global _selection
    _selection = selection
    torch.set_num_threads(num_threads)


@lru_cache(maxsize=1)
def _cases() -> list[BoundCase | CaseResult]:
    """The same cases in the same order as in the process that asks."""
    return list(bound_cases(*_selection))


def _result(index: int, name: str) -> CaseResult:
    item = _cases()[index] if index < len(_cases()) else None
    if not isinstance(item, BoundCase) or item.name != name:
        raise FiError(f"{name}: a new process has other cases; are all plugins installed, not registered by hand?")
    result = item.result()
    if item.device.type == "cuda":
        # The processes share one device's memory.
        torch.cuda.empty_cache()
    return result
