"""vLLM's sampling parameters as fi's records; no vLLM is imported here."""

from __future__ import annotations

from collections.abc import Mapping

import fi_core as fi
import torch
from torch import Tensor


def filters_of(top_k: Tensor | None, top_p: Tensor | None) -> fi.FilterParams:
    """top-k, then top-p on what is left, as vLLM applies them; a row's k of the vocabulary's size or p of 1 is off."""
    return fi.FilterParams(
        top_k=None if top_k is None else top_k.to(torch.int32),
        top_p=None if top_p is None else top_p.to(torch.float32),
    )


def keys_of(num_rows: int, generators: Mapping[int, torch.Generator], device: torch.device) -> fi.DrawKeys:
    """A fresh key for each row: from the generator of its request where it has one, so that a seeded request draws the
    same tokens in any batch, else from torch's default generator of the device. Nothing waits for the device."""
    seed = torch.empty(num_rows, dtype=torch.int64, device=device)
    if len(generators) < num_rows:
        seed.random_()
    for row, generator in generators.items():
        seed[row].random_(generator=generator)
    zeros = torch.zeros(num_rows, dtype=torch.int64, device=device)
    return fi.DrawKeys(seed, zeros.to(torch.int32), zeros)


def draw(
    logits: Tensor, generators: Mapping[int, torch.Generator], top_k: Tensor | None, top_p: Tensor | None
) -> Tensor:
    """Tokens int64 [N] from float32 logits [N, V], whose temperature is applied.

    A row that cannot be drawn from (NaN, or nothing finite) gives token 0, an id that the next step's embedding can look up;
    vLLM counts such rows where VLLM_COMPUTE_NANS_IN_LOGITS asks for it.
    """
    keys = keys_of(logits.shape[0], generators, logits.device)
    return fi.sample(logits, filters_of(top_k, top_p), keys).clamp_(min=0)
