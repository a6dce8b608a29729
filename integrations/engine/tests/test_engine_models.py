"""Logits of the model under chunked, mixed and decode steps against transformers, every architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fi_engine.checkpoint import open_checkpoint
from fi_engine.config import EngineConfig
from fi_engine.model import load_model
from fi_engine.runner import Runner, Sizes, StepInput
from torch import Tensor

TOLERANCE = 2e-5
"""Relative to the largest logit: float32 sums in another order."""


class Bench:
    """A runner whose steps are written by hand."""

    def __init__(self, path: Path) -> None:
        cpu = torch.device("cpu")
        model = load_model(open_checkpoint(path, lambda line: None), cpu, torch.float32, 512, lambda line: None)
        self.runner = Runner(model, Sizes(4, 64, 512, page_size=16, num_pages=40), EngineConfig(cuda_graphs=False))
        self.tokens = np.zeros((4, 512), dtype=np.int64)
        for cache in self.runner.caches:
            cache.k.fill_(float("nan"))
            cache.v.fill_(float("nan"))

    @torch.inference_mode()
    def step(self, *requests: tuple[int, int, int, bool]) -> Tensor:
        """Run (slot, start, count, draws) requests; the logits of those that draw."""
        tokens = np.concatenate([self.tokens[slot, start : start + count] for slot, start, count, _ in requests])
        step = StepInput(tokens, *(np.array(column) for column in zip(*requests, strict=True)))
        self.runner.stage(step, len(requests))
        return self.runner.logits(step)


def _close(actual: Tensor, expected: Tensor) -> None:
    assert float((actual - expected).abs().max() / expected.abs().max()) < TOLERANCE


@torch.inference_mode()
def test_logits_equal_transformers(tiny: tuple[Path, Any]) -> None:
    path, oracle = tiny
    bench = Bench(path)
    generator = np.random.default_rng(1)
    tokens = generator.integers(0, 320, (3, 100))
    bench.tokens[:3, :100] = tokens
    bench.runner.set_pages(0, [5, 9, 2, 7])
    bench.runner.set_pages(1, [1, 3])
    bench.runner.set_pages(2, [39, 0])
    first, second, third = (oracle(row.tolist()) for row in tokens)
    assert bench.step((0, 0, 64, False)).shape == (0, 320)
    bench.runner.set_pages(0, [5, 9, 2, 7, 30, 11, 12])
    mixed = bench.step((1, 0, 20, True), (0, 64, 30, True), (2, 0, 1, True))
    _close(mixed, torch.stack([second[19], first[93], third[0]]))
    decode = bench.step((2, 1, 1, True), (0, 94, 1, True), (1, 20, 1, True))
    _close(decode, torch.stack([third[1], first[94], second[20]]))


@pytest.mark.model
@torch.inference_mode()
def test_smollm_logits_equal_the_plain_forward(model_path: Path, smol_oracle: Any) -> None:
    bench = Bench(model_path)
    ids = list(range(1000, 1030))
    bench.tokens[0, :30] = ids
    bench.runner.set_pages(0, [7, 3])
    bench.step((0, 0, 13, False))
    _close(bench.step((0, 13, 17, True)), smol_oracle(ids)[-1:])
