"""Clocks: CUDA-graph replay between events with a cold L2, and perf_counter on the CPU; calls are timed in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..contract import Cost

_WARM_UPS = 3
_CPU_SECONDS = 0.5
_MAX_SAMPLES = 50
_LEAD_CYCLES = 200_000
"""Length of the pause on the GPU, some 110 us on Hopper, during which the host queues a sample: without it short calls
would be timed with the host's launch latency in them."""

Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Median, 10th and 90th percentile in microseconds; ``mode`` is "graph" (CUDA-graph replay), "eager" (CUDA
    launches, host time included; the call cannot be captured) or "cpu"."""

    us: float
    p10: float
    p90: float
    mode: str

    @classmethod
    def of(cls, samples: Sequence[float], mode: str) -> Times:
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(statistics.median(samples), deciles[0], deciles[-1], mode)


@dataclass(frozen=True)
class ColdAndWarm:
    """A call's times with foreign lines in the caches, and right after another run of itself."""

    cold: Times
    warm: Times


class Clock(Protocol):
    """What ``measure_in_turns`` times with."""

    def prepare(self, call: Call, repeats: int) -> tuple[Call, str]:
        """A callable that runs ``call`` ``repeats`` times, warmed up, and its mode."""
        ...

    def sample(self, run: Call, cold: bool) -> Callable[[], float]:
        """Run once, ``cold`` after filling the caches with foreign lines; the result gives the microseconds and is read
        after all samples were taken."""
        ...


class CpuClock:
    """perf_counter; the caches are not touched between runs."""

    def prepare(self, call: Call, repeats: int) -> tuple[Call, str]:
        def run() -> None:
            for _ in range(repeats):
                call()

        run()
        return run, "cpu"

    def sample(self, run: Call, cold: bool) -> Callable[[], float]:
        start = time.perf_counter()
        run()
        microseconds = (time.perf_counter() - start) * 1e6
        return lambda: microseconds


class CudaClock:
    """CUDA-graph replay between events on ``device``; one object serves many calls."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # The flush reads: one that writes leaves dirty lines, whose write-back would be charged to the call.
        self._foreign = torch.ones(2 * torch.cuda.get_device_properties(device).L2_cache_size // 4, device=device)
        self._total = torch.empty((), device=device)

    def prepare(self, call: Call, repeats: int) -> tuple[Call, str]:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for _ in range(repeats):
                    call()
        except RuntimeError:
            torch.cuda.synchronize(self.device)
            return lambda: [call() for _ in range(repeats)], "eager"
        return graph.replay, "graph"

    def sample(self, run: Call, cold: bool) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_LEAD_CYCLES)
        if cold:
            torch.sum(self._foreign, dim=0, out=self._total)
        start.record()
        run()
        end.record()

        def read() -> float:
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e3

        return read


def clock_of(device: torch.device) -> Clock:
    """The clock for calls on ``device``."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def measure_in_turns(calls: Sequence[Call], clock: Clock, rounds: int, repeats: int = 1) -> list[ColdAndWarm]:
    """Times of ``calls``, run ``repeats`` in a row (the time divided by it) in each of ``rounds`` rounds.

    Every round takes one cold and then one warm sample of each call, so that clocks that move with heat move for all;
    each round begins with another call. Outputs are overwritten many times.
    """
    prepared = [clock.prepare(call, repeats) for call in calls]
    samples: list[list[tuple[Callable[[], float], Callable[[], float]]]] = [[] for _ in calls]
    for turn in range(rounds):
        for place in range(len(calls)):
            idx = (turn + place) % len(calls)
            run = prepared[idx][0]
            samples[idx].append((clock.sample(run, True), clock.sample(run, False)))
    found = []
    for (_, mode), taken in zip(prepared, samples, strict=True):
        cold, warm = ([read() / repeats for read in reads] for reads in zip(*taken, strict=True))
        found.append(ColdAndWarm(Times.of(cold, mode), Times.of(warm, mode)))
    return found


def measure(call: Call, device: torch.device) -> Times:
    """Time ``call`` alone on ``device``, cold; its outputs are overwritten many times."""
    if device.type == "cuda":
        return measure_in_turns([call], CudaClock(device), _MAX_SAMPLES)[0].cold
    clock = CpuClock()
    run, mode = clock.prepare(call, 1)
    samples: list[float] = []
    limit = time.perf_counter() + _CPU_SECONDS
    while len(samples) < 3 or (len(samples) < _MAX_SAMPLES and time.perf_counter() < limit):
        samples.append(clock.sample(run, True)())
    return Times.of(samples, mode)


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
