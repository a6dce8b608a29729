"""Measures the time to the first token of one long prompt, read in one step or in chunks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TextIO

import fi_core as fi
import torch
from fi_core.errors import ArgumentError
from fi_sampling import SamplingParams

from .checkpoint import Progress
from .config import EngineConfig
from .engine import Engine
from .model import Model

_ROUNDS = 3


@dataclass(frozen=True)
class Prompt:
    """``length`` random tokens, read in steps of at most ``chunk`` (None: in one)."""

    length: int
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ArgumentError("length", "at least 1", self.length)
        if self.chunk is not None and self.chunk < 1:
            raise ArgumentError("chunk", "at least 1", self.chunk)

    @property
    def num_steps(self) -> int:
        return -(-self.length // (self.chunk or self.length))


def seconds_to_first_token(model: Model, prompt: Prompt, backend: str | None) -> float:
    """From submitting the prompt to its first token on the host, alone on an engine: the median of a few, each with other
    tokens, after one that compiles. ``backend`` None: the one preferred for each operation."""
    pages = -(-(prompt.length + 1) // EngineConfig.page_size)
    step_tokens = prompt.chunk or prompt.length
    config = EngineConfig(1, step_tokens, prompt.length + 1, num_pages=pages, prefix_cache=False)
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    generator = torch.Generator().manual_seed(0)
    found: list[float] = []
    with nullcontext() if backend is None else fi.use(backend=backend):
        engine = Engine(model, None, config)
        for _ in range(1 + _ROUNDS):
            tokens = torch.randint(0, model.config.vocab_size, (prompt.length,), generator=generator).tolist()
            started = time.perf_counter()
            handle = engine.submit(tokens, params)
            while not handle.token_ids:
                engine.step()
            found.append(time.perf_counter() - started)
            while engine.num_unfinished:
                engine.step()
    return statistics.median(found[1:])


def run_prompt_bench(
    model: Model, prompts: Sequence[Prompt], backends: Sequence[str], out: TextIO, progress: Progress
) -> dict[str, float]:
    """Print a line for each of ``prompts`` on each of ``backends`` ("default": what is preferred for each operation);
    returns milliseconds by name of both."""
    found: dict[str, float] = {}
    for prompt in prompts:
        how = "in one step" if prompt.num_steps == 1 else f"in {prompt.num_steps} steps of {prompt.chunk}"
        for backend in backends:
            progress(f"{prompt.length} tokens on {backend}")
            seconds = seconds_to_first_token(model, prompt, None if backend == "default" else backend)
            progress("")
            name = f"{backend}, {prompt.length} tokens {how}"
            found[name] = 1e3 * seconds
            out.write(f"{name}: {found[name]:.1f} ms to the first token\n")
            out.flush()
    return found
