"""Reference of ``record_tokens``, and dense counts of a sparse history."""

from __future__ import annotations

import torch
from torch import Tensor

from ...sampling import TokenHistory


def record_tokens(history: TokenHistory, tokens: Tensor, slots: Tensor | None) -> None:
    """The ``RecordTokens`` protocol, one column of ``tokens`` at a time."""
    num_rows, words = history.seen.shape
    rows = torch.arange(num_rows, device=tokens.device) if slots is None else slots
    for column in tokens.unbind(1):
        used = ((rows >= 0) & (column >= 0) & (column < 32 * words)).nonzero().squeeze(1)
        _record(history, rows[used], column[used])


def _record(history: TokenHistory, rows: Tensor, tokens: Tensor) -> None:
    """One token int64 [n] for each of ``rows`` int64 [n], which are distinct."""
    capacity = history.entries.shape[1]
    bit = torch.ones_like(tokens, dtype=torch.int32) << (tokens % 32).to(torch.int32)
    history.seen[rows, tokens // 32] |= bit
    history.num_output[rows] += 1
    held = history.num_entries[rows]
    entries = history.entries[rows]
    same = entries[:, :, 0] == tokens.unsqueeze(1)
    same &= torch.arange(capacity, device=rows.device) < held.unsqueeze(1)
    known = same.any(dim=1)
    place = torch.where(known, same.to(torch.int32).argmax(dim=1), held.to(torch.int64))
    history.num_entries[rows] = torch.where(known, held, (held + 1).clamp(max=capacity + 1))
    fits = place < capacity
    rows, place = rows[fits], place[fits]
    before = torch.where(known[fits], history.entries[rows, place, 1], 0)
    history.entries[rows, place] = torch.stack([tokens[fits].to(torch.int32), before + 1], dim=1)


def dense_counts(history: TokenHistory, rows: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows int64 [N] of ``history``: seen bool [N, V], counts int32 [N, V], and bool [N] where output did not fit."""
    capacity = history.entries.shape[1]
    num_entries = history.num_entries[rows]
    used = torch.arange(capacity, device=rows.device) < num_entries.unsqueeze(1)
    entries = history.entries[rows].to(torch.int64)
    token, count = entries.unbind(2)
    used &= (token >= 0) & (token < vocab_size)
    counts = torch.zeros((rows.shape[0], vocab_size), dtype=torch.int64, device=rows.device)
    counts.scatter_add_(1, torch.where(used, token, 0), torch.where(used, count, 0))
    return unpacked(history.seen[rows], vocab_size), counts.to(torch.int32), num_entries > capacity


def unpacked(words: Tensor, vocab_size: int) -> Tensor:
    """bool [N, V] of a bitmask int32 [N, ceil(V / 32)]: token i is bit i % 32 of word i // 32."""
    bits = (words.unsqueeze(2) >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
    return bits.flatten(1)[:, :vocab_size] != 0
