"""The k largest logits of each row: narrowing, exact selection, then a sort of the k found; one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import on_device
from .candidates import coarse_sums, narrow
from .rows import load_block, order_key, scan_row
from .select import find_prefix, open_limits

MAX_K = 2048
"""Most values a row: they are sorted in the registers of one program."""

MAX_CANDIDATES = 16384
BLOCK = 1024
NUM_WARPS = 16


@triton.jit
def _write_chosen(row, key, cut, list_ptr, BLOCK: tl.constexpr):
    """Write the tokens above (key, cut) to ``list_ptr`` in index order."""
    count = tl.full((), 0, tl.int32)
    for start in range(0, row[3], BLOCK):
        token, scaled = load_block(row, start, BLOCK)
        own = order_key(scaled)
        inside = start + tl.arange(0, BLOCK) < row[3]
        taken = (inside & ((own > key) | ((own == key) & (token <= cut)))).to(tl.int32)
        place = count + tl.cumsum(taken, axis=0) - taken
        tl.store(list_ptr + place, token.to(tl.int64), mask=taken == 1)
        count += tl.sum(taken, axis=0)
    tl.debug_barrier()  # other threads of the program read the list


@triton.jit
def top_k_kernel(
    logits_ptr,
    values_ptr,
    indices_ptr,
    candidates_ptr,  # int32 [N, capacity]
    logits_stride,
    values_stride,
    indices_stride,
    vocab_size,
    capacity,
    k,
    K: tl.constexpr,  # power of 2, at least k
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + index * logits_stride
    list_ptr = candidates_ptr + index * capacity
    largest, _, _ = scan_row(row_ptr, vocab_size, 4 * BLOCK)
    row = (
        row_ptr,
        list_ptr,
        tl.full((), 0, tl.int32),
        tl.cast(vocab_size, tl.int32),
        tl.full((), 1.0, tl.float32),
        largest,
    )
    bounds, counts, _ = coarse_sums(row, BLOCK)
    lane = tl.arange(0, 16)
    bound_idx = tl.min(tl.where(counts >= k, lane, 15), axis=0)
    few = narrow(row, bound_idx, bounds, counts, tl.max(counts, axis=0) >= k, capacity, BLOCK)
    limits = open_limits()
    key, cut = find_prefix(few, limits, limits[3], tl.cast(k, tl.int64), True, False, BLOCK)
    chosen_ptr = indices_ptr + index * indices_stride
    _write_chosen(few, key, cut, chosen_ptr, BLOCK)
    place = tl.arange(0, K)
    token = tl.load(chosen_ptr + place, mask=place < k, other=0)
    tl.debug_barrier()  # all have read the unsorted list before it is overwritten
    logit = tl.load(row_ptr + token, mask=place < k, other=0.0).to(tl.float32)
    value = tl.where(logit == logit, logit, float("-inf"))
    rank = tl.where(place < k, (order_key(value).to(tl.int64) << 31) | (0x7FFFFFFF - token), -1)
    token = 0x7FFFFFFF - (tl.sort(rank, descending=True) & 0x7FFFFFFF)
    logit = tl.load(row_ptr + token, mask=place < k, other=0.0).to(tl.float32)
    value = tl.where(logit == logit, logit, float("-inf"))
    tl.store(values_ptr + index * values_stride + place, value, mask=place < k)
    tl.store(chosen_ptr + place, token, mask=place < k)


def top_k(logits: Tensor, values: Tensor, indices: Tensor) -> None:
    """The ``TopK`` protocol, k up to MAX_K. Takes N * min(V, 16384) int32 of scratch memory."""
    num_rows, vocab_size = logits.shape
    capacity = min(vocab_size, MAX_CANDIDATES)
    k = values.shape[1]
    with on_device(logits.device):
        top_k_kernel[(num_rows,)](
            logits,
            values,
            indices,
            torch.empty((num_rows, capacity), dtype=torch.int32, device=logits.device),
            logits.stride(0),
            values.stride(0),
            indices.stride(0),
            vocab_size,
            capacity,
            k,
            K=triton.next_power_of_2(k),
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
