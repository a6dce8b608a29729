"""Drawn tokens into sparse histories, one program a row."""

from __future__ import annotations

import triton
import triton.language as tl
from fi_core.sampling import TokenHistory
from torch import Tensor

from ..launch import on_device

BLOCK = 1024


@triton.jit
def record_kernel(
    tokens_ptr,
    slots_ptr,  # int64 [rows] or None
    seen_ptr,
    entries_ptr,
    num_entries_ptr,
    num_output_ptr,
    tokens_stride,
    seen_stride,
    entries_stride,
    num_tokens,
    seen_words,
    capacity,
    BLOCK: tl.constexpr,
):
    """A row's tokens one after the other; its entries are searched a block at a time."""
    row = tl.program_id(0).to(tl.int64)
    slot = row if slots_ptr is None else tl.load(slots_ptr + row)
    if slot >= 0:
        row_entries_ptr = entries_ptr + slot * entries_stride
        held = tl.load(num_entries_ptr + slot)
        added = tl.full((), 0, tl.int32)
        for step in range(num_tokens):
            token = tl.load(tokens_ptr + row * tokens_stride + step)
            if (token >= 0) & (token < tl.cast(seen_words, tl.int64) * 32):  # a constant where it is 1
                in_use = tl.minimum(held, capacity)
                found = tl.full((), -1, tl.int32)
                for start in range(0, in_use, BLOCK):
                    entry = start + tl.arange(0, BLOCK)
                    same = tl.load(row_entries_ptr + 2 * entry, mask=entry < in_use, other=-1) == token
                    found = tl.maximum(found, tl.max(tl.where(same, entry, -1), axis=0))
                word_ptr = seen_ptr + slot * seen_stride + token // 32
                bit = tl.full((), 1, tl.int32) << (token % 32).to(tl.int32)
                tl.store(word_ptr, tl.load(word_ptr) | bit)
                if found >= 0:
                    count_ptr = row_entries_ptr + 2 * found + 1
                    tl.store(count_ptr, tl.load(count_ptr) + 1)
                else:
                    tl.store(row_entries_ptr + 2 * held, token.to(tl.int32), mask=held < capacity)
                    tl.store(row_entries_ptr + 2 * held + 1, 1, mask=held < capacity)
                    held = tl.minimum(held + 1, capacity + 1)
                added += 1
                tl.debug_barrier()  # the next token's search sees the entry
        tl.store(num_entries_ptr + slot, held)
        tl.store(num_output_ptr + slot, tl.load(num_output_ptr + slot) + added)


def record_tokens(history: TokenHistory, tokens: Tensor, slots: Tensor | None) -> None:
    """The ``RecordTokens`` protocol."""
    with on_device(tokens.device):
        record_kernel[(tokens.shape[0],)](
            tokens,
            slots,
            *history.tensors,
            tokens.stride(0),
            history.seen.stride(0),
            history.entries.stride(0),
            tokens.shape[1],
            history.seen.shape[1],
            history.entries.shape[1],
            BLOCK=BLOCK,
        )
