"""Temperature, filters and the draw in one launch, one program a row; ``fi_core.sample`` defines the result.

A row is read three times (largest logit; coarse sums; compaction) and its few candidates about twenty times. One program
a row keeps the GPU full from about one row a multiprocessor on; for fewer rows the time is that of a single program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fi_core.sampling import NO_PENALTIES, DrawKeys, FilterParams, PenaltyParams
from torch import Tensor

from ..launch import on_device
from .candidates import bound_of_filters, coarse_sums, narrow
from .philox import random_bits, scale_bits
from .rows import scan_row
from .select import filter_row, kept_block, kept_total, open_limits, valid_filters

MAX_CANDIDATES = 16384
"""Longest list of candidates a row; a row with more (a nearly flat distribution) is searched in place."""

BLOCK = 1024
NUM_WARPS = 16


@triton.jit
def locate(row, limits, target, BY_DISTANCE: tl.constexpr, BLOCK: tl.constexpr):
    """The first kept token, in index order, whose inclusive cumulative mass exceeds ``target`` (below the kept total)."""
    found = tl.full((), -1, tl.int32)
    carry = tl.full((), 0, tl.int64)
    start = tl.full((), 0, tl.int32)
    while (found < 0) & (start < row[3]):
        token, mass = kept_block(row, start, limits, BY_DISTANCE, BLOCK)
        total = tl.sum(mass, axis=0)
        if carry + total > target:
            cumulative = carry + tl.cumsum(mass, axis=0)
            crossed = (cumulative > target) & (
                mass > 0
            )  # places past a list's end have small token numbers and no mass
            found = tl.min(tl.where(crossed, token, 0x7FFFFFFF), axis=0)
        carry += total
        start += BLOCK
    return found


@triton.jit
def sample_kernel(
    logits_ptr,
    rows_ptr,  # int32 or int64 [N], or None
    slots_ptr,  # int64 [N], or None
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    typical_p_ptr,
    seed_ptr,
    sample_ptr,
    position_ptr,
    tokens_ptr,
    candidates_ptr,  # int32 [N, capacity]
    logits_stride,
    vocab_size,
    capacity,
    JOINT: tl.constexpr,
    FILTERED: tl.constexpr,  # whether any of the four filters is given
    BLOCK: tl.constexpr,
):
    output = tl.program_id(0).to(tl.int64)
    source = output if rows_ptr is None else tl.load(rows_ptr + output).to(tl.int64)
    row_ptr = logits_ptr + source * logits_stride
    largest, first, no_nan = scan_row(row_ptr, vocab_size, 4 * BLOCK)
    slot = output if slots_ptr is None else tl.load(slots_ptr + output)
    place = tl.maximum(slot, 0)
    temperature = tl.full((), 1.0, tl.float32) if temperature_ptr is None else tl.load(temperature_ptr + place)
    k_ptr = None if top_k_ptr is None else top_k_ptr + place
    p_ptr = None if top_p_ptr is None else top_p_ptr + place
    m_ptr = None if min_p_ptr is None else min_p_ptr + place
    t_ptr = None if typical_p_ptr is None else typical_p_ptr + place
    valid = (slot >= 0) & valid_filters(temperature, k_ptr, p_ptr, m_ptr, t_ptr)
    greedy = temperature <= 0.0
    temperature = tl.where(greedy, 1.0, temperature)
    peak = tl.div_rn(largest, temperature)
    usable = (tl.abs(peak) < float("inf")) & no_nan & valid
    token = tl.where(usable, first, -1)
    if usable & ~greedy:
        list_ptr = candidates_ptr + output * capacity
        row = (row_ptr, list_ptr, tl.full((), 0, tl.int32), tl.cast(vocab_size, tl.int32), temperature, peak)
        if FILTERED:
            bounds, counts, masses = coarse_sums(row, BLOCK)
            bound_idx = bound_of_filters(bounds, counts, masses, peak, vocab_size, k_ptr, p_ptr, m_ptr, t_ptr, JOINT)
            few = narrow(row, bound_idx, bounds, counts, usable, capacity, BLOCK)
            total = tl.max(masses, axis=0)
            limits, kept = filter_row(few, total, vocab_size, k_ptr, p_ptr, m_ptr, t_ptr, JOINT, BLOCK)
        else:
            few = row
            limits = open_limits()
            kept = kept_total(few, limits, False, BLOCK)
        seed, position = tl.load(seed_ptr + place), tl.load(position_ptr + output)
        hi, lo = random_bits(seed, position, tl.load(sample_ptr + place), 0)
        token = locate(few, limits, scale_bits(hi, lo, kept), typical_p_ptr is not None, BLOCK)
    tl.store(tokens_ptr + output, token.to(tl.int64))


def sample(
    logits: Tensor,
    filters: FilterParams,
    keys: DrawKeys,
    rows: Tensor | None,
    tokens: Tensor,
    penalties: PenaltyParams = NO_PENALTIES,
    slots: Tensor | None = None,
) -> None:
    """The ``Sample`` protocol; its entry admits no penalties. Takes N * min(V, 16384) int32 of scratch memory when a filter
    is active."""
    num_outputs, vocab_size = tokens.shape[0], logits.shape[1]
    filtered = bool(filters.active)
    capacity = min(vocab_size, MAX_CANDIDATES) if filtered else 1
    candidates = torch.empty((num_outputs, capacity), dtype=torch.int32, device=logits.device)
    with on_device(logits.device):
        sample_kernel[(num_outputs,)](
            logits,
            rows,
            slots,
            filters.temperature,
            filters.top_k,
            filters.top_p,
            filters.min_p,
            filters.typical_p,
            keys.seed,
            keys.sample,
            keys.position,
            tokens,
            candidates,
            logits.stride(0),
            vocab_size,
            capacity,
            JOINT=filters.order == "joint",
            FILTERED=filtered,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
