"""Measures serving speed: requests batched against one after another, and decode steps per second."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

import torch
from fi_core.errors import ArgumentError
from fi_sampling import SamplingParams
from torch.profiler import ProfilerActivity, profile

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


def _start(engine: Engine, num_tokens: int) -> None:
    """Submit all prompts and run their prefills, and the first decode steps (which capture)."""
    for prompt in PROMPTS:
        engine.submit(prompt, SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True))
    for _ in range(_NUM_WARM_UP_STEPS):
        engine.step()


def _finish(engine: Engine) -> None:
    while engine.num_unfinished:
        engine.step()


def run_bench(model: Path, device: str | None, num_tokens: int, out: TextIO) -> None:
    """Print tokens per second alone and batched with their ratio, and decode steps per second of the batch; on a GPU
    also the share of a decode step's time in which no kernel runs (kernel time from the profiler, in a run of its own)."""
    if num_tokens <= 2 * _NUM_WARM_UP_STEPS:
        raise ArgumentError("num_tokens", f"more than {2 * _NUM_WARM_UP_STEPS}", num_tokens)
    config = EngineConfig(max_batch=len(PROMPTS), prefix_cache=False)
    engine = Engine.from_path(model, device=device, config=config)
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    engine.generate(PROMPTS, params)
    engine.generate(PROMPTS[:1], params)
    together = _seconds(lambda: engine.generate(PROMPTS, params))
    alone = _seconds(lambda: [engine.generate([prompt], params) for prompt in PROMPTS])
    total = len(PROMPTS) * num_tokens
    out.write(f"one after another: {total / alone:.1f} tokens/s\n")
    out.write(f"{len(PROMPTS)} batched: {total / together:.1f} tokens/s, {alone / together:.2f} times as many\n")
    _start(engine, num_tokens)
    before = engine.stats.num_steps
    seconds = _seconds(lambda: _finish(engine))
    steps = engine.stats.num_steps - before
    out.write(f"decode at batch {len(PROMPTS)}: {steps / seconds:.1f} steps/s\n")
    if engine.device.type == "cuda":
        busy = _kernel_seconds(engine, num_tokens)
        out.write(f"kernels: {1e3 * busy / steps:.3f} ms a step, {1 - busy / seconds:.0%} of the time outside them\n")


def _kernel_seconds(engine: Engine, num_tokens: int) -> float:
    """Time in which kernels ran, over the same decode steps."""
    _start(engine, num_tokens)
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        _finish(engine)
        torch.cuda.synchronize(engine.device)
    events: Sequence[object] = record.key_averages()
    return sum(float(getattr(event, "self_device_time_total", 0.0)) for event in events) * 1e-6
