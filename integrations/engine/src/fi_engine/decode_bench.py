"""Measures steady decode: many requests of mixed lengths that each gain a token a step, and what their steps consist of."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TextIO

import fi_core as fi
import torch
from fi_core.errors import ArgumentError
from fi_sampling import SamplingParams
from torch.profiler import ProfilerActivity, profile

from .checkpoint import Progress
from .config import EngineConfig
from .engine import Engine
from .model import Model
from .request import RequestHandle

_WARM_UP_STEPS = 8
_PROFILED_STEPS = 8
_STEP_TOKENS = 2048
_ATTENTION = re.compile(r"^fi_attention|^(attention|merge|request|cut|emit)_kernel$")
"""Names of the kernels that attend or plan attention, in CUDA and in Triton."""


@dataclass(frozen=True)
class Workload:
    """``num_requests`` at once, with prompts of ``shortest`` to ``longest`` tokens, evenly spread."""

    num_requests: int
    shortest: int
    longest: int

    def __post_init__(self) -> None:
        for name in ("num_requests", "shortest", "longest"):
            if getattr(self, name) < 1:
                raise ArgumentError(name, "at least 1", getattr(self, name))
        if self.shortest > self.longest:
            raise ArgumentError("shortest", f"at most longest={self.longest}", self.shortest)

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Random tokens, the same every time; their lengths in random order."""
        generator = torch.Generator().manual_seed(0)
        lengths = torch.linspace(self.shortest, self.longest, self.num_requests).int()
        shuffled = lengths[torch.randperm(self.num_requests, generator=generator)].tolist()
        return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in shuffled]


@dataclass(frozen=True)
class SteadySpeed:
    """Of decode steps with all requests: ``step_times``, seconds each, and ``kernels``, seconds a step in those of each name
    (None on a CPU). A kernel that overlaps the one before counts its wait for it."""

    num_requests: int
    step_times: Sequence[float]
    kernels: Mapping[str, float] | None

    @property
    def step_seconds(self) -> float:
        """Mean of the steps."""
        return sum(self.step_times) / len(self.step_times)

    @property
    def tokens_per_second(self) -> float:
        return self.num_requests / self.step_seconds

    @property
    def kernel_seconds(self) -> float | None:
        """In kernels, a step."""
        return None if self.kernels is None else sum(self.kernels.values())

    @property
    def attention_seconds(self) -> float | None:
        """In kernels of attention, a step."""
        if self.kernels is None:
            return None
        return sum(seconds for name, seconds in self.kernels.items() if _ATTENTION.search(name))


def steady_speed(model: Model, workload: Workload, num_steps: int, backend: str | None) -> SteadySpeed:
    """Time ``num_steps`` decode steps on ``backend`` (None: the one preferred for each operation), and profile a few more."""
    with nullcontext() if backend is None else fi.use(backend=backend):
        total = _WARM_UP_STEPS + num_steps + _PROFILED_STEPS
        engine, handles = _decoding(model, workload, total)
        for _ in range(_WARM_UP_STEPS):
            engine.step()
        times = [time.perf_counter()]
        for _ in range(num_steps):
            engine.step()  # ends with its tokens on the host
            times.append(time.perf_counter())
        kernels = _kernel_seconds(engine) if engine.device.type == "cuda" else None
        for handle in handles:
            engine.abort(handle)
    return SteadySpeed(workload.num_requests, [end - start for start, end in itertools.pairwise(times)], kernels)


def _decoding(model: Model, workload: Workload, num_steps: int) -> tuple[Engine, list[RequestHandle]]:
    """An engine whose requests have all had a token and have room for ``num_steps`` more."""
    prompts = workload.prompts(model.config.vocab_size)
    step_tokens = max(_STEP_TOKENS, workload.num_requests)
    # While the last prompts are read, the first requests already decode.
    reading = -(-sum(map(len, prompts)) // max(step_tokens - workload.num_requests, 1)) + 1
    length = workload.longest + num_steps + reading + 1
    pages = sum(-(-(len(prompt) + num_steps + reading + 1) // EngineConfig.page_size) for prompt in prompts)
    config = EngineConfig(workload.num_requests, step_tokens, length, num_pages=pages, prefix_cache=False)
    engine = Engine(model, None, config)
    params = SamplingParams(temperature=0.0, max_tokens=num_steps + reading, ignore_eos=True)
    handles = [engine.submit(prompt, params) for prompt in prompts]
    while not all(handle.token_ids for handle in handles):
        engine.step()
    return engine, handles


def _kernel_seconds(engine: Engine) -> dict[str, float]:
    """Seconds a step in kernels by name."""
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for _ in range(_PROFILED_STEPS):
            engine.step()
        torch.cuda.synchronize(engine.device)
    events = ((event.key, float(getattr(event, "self_device_time_total", 0.0))) for event in record.key_averages())
    return {name: microseconds * 1e-6 / _PROFILED_STEPS for name, microseconds in events if microseconds > 0.0}


def run_decode_bench(
    model: Model, workload: Workload, num_steps: int, backends: Sequence[str], out: TextIO, progress: Progress
) -> dict[str, SteadySpeed]:
    """Print a line for each of ``backends`` ("default": what is preferred for each operation); returns their speeds."""
    found: dict[str, SteadySpeed] = {}
    for name in backends:
        progress(f"{workload.num_requests} requests on {name}")
        speed = found[name] = steady_speed(model, workload, num_steps, None if name == "default" else name)
        progress("")
        line = f"{name}: {speed.tokens_per_second:.0f} tokens/s, {1e3 * speed.step_seconds:.2f} ms a step"
        if speed.kernel_seconds is not None and speed.attention_seconds is not None:
            share = speed.attention_seconds / speed.kernel_seconds
            line += f"; kernels {1e3 * speed.kernel_seconds:.2f} ms, attention {share:.0%} of them"
        out.write(f"{line}\n")
        out.flush()
    return found
