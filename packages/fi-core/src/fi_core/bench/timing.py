"""Clocks: CUDA-graph replay between events with a cold L2, and perf_counter on the CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..contract import Cost

_WARM_UPS = 3
_CPU_SECONDS = 0.5
_MAX_SAMPLES = 50


@dataclass(frozen=True)
class Times:
    """Median, 10th and 90th percentile in microseconds; ``mode`` is "graph" (CUDA-graph replay), "eager" (CUDA
    launches, host time included; the call cannot be captured) or "cpu"."""

    us: float
    p10: float
    p90: float
    mode: str


def _times(samples: Sequence[float], mode: str) -> Times:
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return Times(statistics.median(samples), deciles[0], deciles[-1], mode)


def measure(call: Callable[[], object], device: torch.device) -> Times:
    """Time ``call`` on ``device``; its outputs are overwritten many times."""
    return _measure_cuda(call, device) if device.type == "cuda" else _measure_cpu(call)


def _measure_cpu(call: Callable[[], object]) -> Times:
    call()
    samples: list[float] = []
    limit = time.perf_counter() + _CPU_SECONDS
    while len(samples) < 3 or (len(samples) < _MAX_SAMPLES and time.perf_counter() < limit):
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e6)
    return _times(samples, "cpu")


def _measure_cuda(call: Callable[[], object], device: torch.device) -> Times:
    replay, mode = _captured(call, device)
    # The flush reads: one that writes leaves dirty lines, whose write-back would be charged to the call.
    foreign = torch.ones(2 * torch.cuda.get_device_properties(device).L2_cache_size // 4, device=device)
    total = torch.empty((), device=device)
    events = [(_event(), _event()) for _ in range(_MAX_SAMPLES)]
    for start, end in events:
        torch.sum(foreign, dim=0, out=total)
        start.record()
        replay()
        end.record()
    torch.cuda.synchronize(device)
    return _times([start.elapsed_time(end) * 1e3 for start, end in events], mode)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _captured(call: Callable[[], object], device: torch.device) -> tuple[Callable[[], object], str]:
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize(device)
        return call, "eager"
    return graph.replay, "graph"


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches in this run: bytes a second of a large copy, operations a second of a large matmul."""

    bytes_per_second: float
    flops_per_second: float

    @classmethod
    def of(cls, device: torch.device) -> Ceilings:
        """Measure ``device`` with torch's own kernels."""
        on_gpu = device.type == "cuda"
        source = torch.ones(2**28 if on_gpu else 2**24, dtype=torch.float32, device=device)
        target = torch.empty_like(source)
        copy = measure(lambda: target.copy_(source), device)
        size, dtype = (8192, torch.bfloat16) if on_gpu else (768, torch.float32)
        left = torch.randn(size, size, device=device).to(dtype)
        product = torch.empty_like(left)
        matmul = measure(lambda: torch.mm(left, left, out=product), device)
        return cls(2 * source.numel() * 4 / copy.us * 1e6, 2 * size**3 / matmul.us * 1e6)

    def share(self, cost: Cost, us: float) -> float:
        """The shortest time that the ceilings allow for ``cost``, as a share of ``us``."""
        floor = max(cost.num_bytes / self.bytes_per_second, cost.num_flops / self.flops_per_second)
        return floor * 1e6 / us
