"""Reference of ``penalize_logits``."""

from __future__ import annotations

import torch
from torch import Tensor

from ...sampling import PenaltyParams
from .. import serving_dtype


def penalize_logits(
    logits: Tensor, penalties: PenaltyParams, out: Tensor, compute_dtype: torch.dtype | None = None
) -> None:
    """The ``PenalizeLogits`` protocol; the oracle passes ``compute_dtype`` float64 and a float64 ``out``."""
    values = logits.to(compute_dtype or serving_dtype(logits.dtype), copy=True)
    if penalties.allowed is not None:
        values.masked_fill_(~_unpacked(penalties.allowed, values.shape[1]), -torch.inf)
    if penalties.bias_indptr is not None and penalties.bias_tokens is not None and penalties.bias_values is not None:
        _add_bias(values, penalties.bias_indptr, penalties.bias_tokens, penalties.bias_values)
    prompt, output = (_of_rows(counts, penalties.rows) for counts in (penalties.prompt_counts, penalties.output_counts))
    if penalties.repetition is not None:
        seen = torch.zeros_like(values, dtype=torch.bool)
        for counts in (prompt, output):
            if counts is not None:
                seen |= counts != 0
        factor = penalties.repetition.to(values.dtype).unsqueeze(1)
        values = torch.where(seen, torch.where(values > 0, values / factor, values * factor), values)
    if penalties.frequency is not None and output is not None:
        values -= penalties.frequency.to(values.dtype).unsqueeze(1) * output
    if penalties.presence is not None and output is not None:
        values -= penalties.presence.to(values.dtype).unsqueeze(1) * (output > 0)
    out.copy_(values)


def _of_rows(counts: Tensor | None, rows: Tensor | None) -> Tensor | None:
    return counts if counts is None or rows is None else counts.index_select(0, rows)


def _unpacked(words: Tensor, vocab_size: int) -> Tensor:
    """bool [N, V] of a bitmask int32 [N, ceil(V / 32)]: token i is bit i % 32 of word i // 32."""
    bits = (words.unsqueeze(2) >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
    return bits.flatten(1)[:, :vocab_size] != 0


def _add_bias(values: Tensor, indptr: Tensor, tokens: Tensor, bias: Tensor) -> None:
    """Add each row's entries in place; entries past indptr[N] belong to no row."""
    entry = torch.arange(tokens.shape[0], dtype=indptr.dtype, device=tokens.device)
    row = torch.searchsorted(indptr, entry, right=True) - 1
    used = (tokens >= 0) & (tokens < values.shape[1]) & (entry < indptr[-1])
    where = (row[used], tokens[used].to(torch.int64))
    values[where] = values[where] + bias[used].to(values.dtype)
