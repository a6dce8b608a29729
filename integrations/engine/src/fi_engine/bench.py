"""Measures serving speed: requests batched against one after another, and decode steps per second."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from fi_core.errors import ArgumentError
from fi_sampling import SamplingParams
from torch.profiler import ProfilerActivity, profile

from .checkpoint import Progress
from .config import EngineConfig
from .engine import Engine

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "1, 2, 3, 4,",
    "The sky is blue because",
    "My favourite food is",
    "In the year 2020 the people of",
    "Dear Sir or Madam,",
)

_NUM_WARM_UP_STEPS = 8


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


@dataclass(frozen=True)
class DecodeSpeed:
    """Of steps in which every request decodes. ``kernel_seconds``: time in kernels a step; None on a CPU."""

    steps_per_second: float
    tokens_per_second: float
    kernel_seconds: float | None

    @property
    def share_outside_kernels(self) -> float | None:
        """Of a step's time."""
        return None if self.kernel_seconds is None else 1 - self.kernel_seconds * self.steps_per_second


def decode_speed(engine: Engine, num_requests: int, num_tokens: int) -> DecodeSpeed:
    """Speed of greedy decode steps of ``num_requests`` requests (at most as many as PROMPTS) to ``num_tokens`` each.

    A whole run goes before the timed one, because graphs are captured when a batch size first occurs, also near the end.
    Prefills and the first decode steps are not counted. Kernel times come from the profiler, in a run of their own that
    does not slow the timed one.
    """
    _start(engine, num_requests, num_tokens)
    _finish(engine)
    _start(engine, num_requests, num_tokens)
    before = engine.stats.num_steps
    seconds = _seconds(lambda: _finish(engine))
    steps = engine.stats.num_steps - before
    busy = None
    if engine.device.type == "cuda":
        _start(engine, num_requests, num_tokens)
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            _finish(engine)
            torch.cuda.synchronize(engine.device)
        events: Sequence[object] = record.key_averages()
        busy = sum(float(getattr(event, "self_device_time_total", 0.0)) for event in events) * 1e-6 / steps
    return DecodeSpeed(steps / seconds, num_requests * steps / seconds, busy)


def _start(engine: Engine, num_requests: int, num_tokens: int) -> None:
    for prompt in PROMPTS[:num_requests]:
        engine.submit(prompt, SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True))
    for _ in range(_NUM_WARM_UP_STEPS):
        engine.step()


def _finish(engine: Engine) -> None:
    while engine.num_unfinished:
        engine.step()


def run_bench(model: Path, device: str | None, num_tokens: int, out: TextIO, progress: Progress) -> None:
    """Print tokens per second alone and batched with their ratio, and decode steps per second of the batch; on a GPU
    also the share of a decode step's time in which no kernel runs."""
    if num_tokens <= 2 * _NUM_WARM_UP_STEPS:
        raise ArgumentError("num_tokens", f"more than {2 * _NUM_WARM_UP_STEPS}", num_tokens)
    config = EngineConfig(max_batch=len(PROMPTS), prefix_cache=False)
    engine = Engine.from_path(model, device=device, config=config, progress=progress)
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    progress("warming up")
    engine.generate(PROMPTS, params)
    engine.generate(PROMPTS[:1], params)
    progress(f"{len(PROMPTS)} requests at once, then one after another")
    together = _seconds(lambda: engine.generate(PROMPTS, params))
    alone = _seconds(lambda: [engine.generate([prompt], params) for prompt in PROMPTS])
    progress("decode steps")
    speed = decode_speed(engine, len(PROMPTS), num_tokens)
    progress("")
    total = len(PROMPTS) * num_tokens
    out.write(f"one after another: {total / alone:.1f} tokens/s\n")
    out.write(f"{len(PROMPTS)} batched: {total / together:.1f} tokens/s, {alone / together:.2f} times as many\n")
    out.write(f"decode at batch {len(PROMPTS)}: {speed.steps_per_second:.1f} steps/s\n")
    if speed.kernel_seconds is not None:
        share = speed.share_outside_kernels
        out.write(f"kernels: {1e3 * speed.kernel_seconds:.3f} ms a step, {share:.0%} of the time outside them\n")
