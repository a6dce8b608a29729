"""Penalties as a long conversation asks for them: a prompt's and an output's tokens, some bias, a mask of nine tokens in ten."""

from __future__ import annotations

import torch
from fi_core.sampling import PenaltyParams, TokenHistory
from torch import Tensor

from .problem import generator_on

PROMPT_TOKENS, OUTPUT_TOKENS, BIASED_TOKENS, CAPACITY = 1500, 500, 20, 4096
"""Of a request; the output's are distinct, and a history has room for ``CAPACITY``."""


def penalties_of(num_rows: int, vocab_size: int, device: torch.device) -> PenaltyParams:
    """Every part of the penalties for each of ``num_rows`` requests."""
    generator = generator_on(device, 9)

    def distinct(count: int) -> Tensor:
        return torch.rand((num_rows, vocab_size), device=device, generator=generator).topk(count, dim=1).indices

    def uniform() -> Tensor:
        return torch.rand(num_rows, device=device, generator=generator)

    output = distinct(OUTPUT_TOKENS)
    history = TokenHistory.empty(num_rows, vocab_size, CAPACITY, device)
    history.entries[:, :OUTPUT_TOKENS, 0] = output.to(torch.int32)
    history.entries[:, :OUTPUT_TOKENS, 1] = 2
    history.num_entries.fill_(OUTPUT_TOKENS)
    history.num_output.fill_(2 * OUTPUT_TOKENS)
    seen = torch.zeros((num_rows, vocab_size), dtype=torch.bool, device=device).scatter_(1, output, True)
    history.seen.copy_(_packed(seen.scatter_(1, distinct(PROMPT_TOKENS), True)))
    allowed = torch.rand((num_rows, vocab_size), device=device, generator=generator) < 0.9
    return PenaltyParams(
        allowed=_packed(allowed),
        bias_indptr=torch.arange(num_rows + 1, dtype=torch.int32, device=device) * BIASED_TOKENS,
        bias_tokens=distinct(BIASED_TOKENS).to(torch.int32).flatten(),
        bias_values=torch.randn(num_rows * BIASED_TOKENS, device=device, generator=generator),
        repetition=uniform() + 0.8,
        frequency=uniform(),
        presence=uniform(),
        history=history,
    )


def _packed(bits: Tensor) -> Tensor:
    """int32 words of a bool [N, V]."""
    num_rows, vocab_size = bits.shape
    words = (vocab_size + 31) // 32
    padded = torch.zeros((num_rows, words * 32), dtype=torch.int64, device=bits.device)
    padded[:, :vocab_size] = bits
    return (padded.view(num_rows, words, 32) << torch.arange(32, device=bits.device)).sum(dim=2).to(torch.int32)
