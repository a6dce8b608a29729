"""Keys for an engine's draws, and drawn tokens that its next step can look up."""

from __future__ import annotations

from collections.abc import Mapping

import fi_core as fi
import torch
from torch import Tensor

NO_GENERATORS: Mapping[int, torch.Generator] = {}


def fresh_keys(
    num_rows: int, device: torch.device, generators: Mapping[int, torch.Generator] = NO_GENERATORS
) -> fi.DrawKeys:
    """A key for each row that was not used before: from the row's generator where it has one, so that a seeded request draws
    the same tokens in any batch, else from torch's default generator of the device. Nothing waits for the device.

    One number is drawn from a generator. On CUDA that takes 4 of its offset, as any small draw does: what vLLM takes back when
    it throws a token away.
    """
    seed = torch.empty(num_rows, dtype=torch.int64, device=device)
    if len(generators) < num_rows:
        seed.random_()
    for row, generator in generators.items():
        seed[row].random_(generator=generator)
    return seeded_keys(seed, torch.zeros_like(seed))


def seeded_keys(seed: Tensor, position: Tensor) -> fi.DrawKeys:
    """Keys of requests with a seed: ``seed`` and ``position`` [N] of any integer type, the position of the drawn token."""
    seed = seed.to(torch.int64)
    return fi.DrawKeys(seed, torch.zeros_like(seed, dtype=torch.int32), position.to(torch.int64))


def draw(logits: Tensor, filters: fi.FilterParams, keys: fi.DrawKeys) -> Tensor:
    """``fi_core.sample``, tokens int64 [N], but token 0 for a row that cannot be drawn from (NaN, or nothing finite): an id
    that the next step's embedding can look up. The engines count such rows themselves where they are asked to."""
    return fi.sample(logits, filters, keys).clamp_(min=0)
