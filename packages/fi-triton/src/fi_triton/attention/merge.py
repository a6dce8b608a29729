"""Combine the partial results of split tiles, in the order that the plan gives."""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel import store_output, store_rows
from .kv_steps import LOG2E


@triton.jit
def merge_rows(
    slots_before, num_pieces, head_slot, row, live, partial_ptr, partial_lse_ptr, sink,
    SLOT_ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, PIECES: tl.constexpr, DIM_VO: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """(output [BLOCK_ROWS, BLOCK_DV], base-2 log-sum-exp [BLOCK_ROWS]) of rows ``row`` of a split tile.

    Piece 0 lies in slot ``head_slot``, piece k in slot ``slots_before + k``. PIECES pieces at a time are added by a fixed
    tree, and these sums in ascending order: the result depends on the pieces alone.
    """
    dims = tl.arange(0, BLOCK_DV)
    top = sink
    for first in range(0, num_pieces, PIECES):
        piece = first + tl.arange(0, PIECES)
        slot_row = tl.where(piece == 0, head_slot, slots_before + piece).to(tl.int64) * SLOT_ROWS
        wanted = (piece < num_pieces)[:, None] & live[None, :]
        lse = tl.load(partial_lse_ptr + slot_row[:, None] + row[None, :], mask=wanted, other=float("-inf"))
        top = tl.maximum(top, tl.max(lse, 0))
    base = tl.where(top == float("-inf"), 0.0, top)
    mass = tl.exp2(sink - base)
    total = tl.zeros((BLOCK_ROWS, BLOCK_DV), tl.float32)
    for first in range(0, num_pieces, PIECES):
        piece = first + tl.arange(0, PIECES)
        slot_row = tl.where(piece == 0, head_slot, slots_before + piece).to(tl.int64) * SLOT_ROWS
        wanted = (piece < num_pieces)[:, None] & live[None, :]
        rows = slot_row[:, None] + row[None, :]
        weight = tl.exp2(tl.load(partial_lse_ptr + rows, mask=wanted, other=float("-inf")) - base[None, :])
        pointers = partial_ptr + rows[:, :, None] * DIM_VO + dims[None, None, :]
        part = tl.load(pointers, mask=wanted[:, :, None] & (dims < DIM_VO)[None, None, :], other=0.0)
        mass += tl.sum(weight, 0)
        total += tl.sum(weight[:, :, None] * part, 0)
    empty = mass == 0.0
    result = total / tl.where(empty, 1.0, mass)[:, None]
    return result, tl.where(empty, float("-inf"), base + tl.log2(tl.where(empty, 1.0, mass)))


@triton.jit
def merge_kernel(
    merges_ptr, num_merges_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, q_indptr_ptr, sinks_ptr,
    own_begin_ptr, state_ptr, state_lse_ptr, out_stride_token, out_stride_head, lse_stride_token, state_begin,
    ROWS: tl.constexpr, BIG_ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, PIECES: tl.constexpr, GROUP: tl.constexpr,
    DIM_VO: tl.constexpr, BLOCK_DV: tl.constexpr, SINKS: tl.constexpr, LSE: tl.constexpr,
    LEVELS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Programs (x, y) take merge records x, x + grid x, ... and of each BLOCK_ROWS rows at y, y + grid y, ...: a fixed grid
    serves any batch. Sinks join here exactly once, unless (LEVELS) the tile is a request's own part: then they do where its
    parts are merged."""
    SLOT_ROWS: tl.constexpr = BIG_ROWS if BIG_ROWS > ROWS else ROWS
    num_merges = tl.load(num_merges_ptr)
    for merge in range(tl.program_id(0), num_merges, tl.num_programs(0)):
        record = merges_ptr + merge * 8
        request = tl.load(record)
        kv_head = tl.load(record + 1)
        q_tile = tl.load(record + 2)
        kind = tl.load(record + 3)
        head_slot = tl.load(record + 4)
        tail_begin = tl.load(record + 5)
        tail_end = tl.load(record + 6)
        q_begin = tl.load(q_indptr_ptr + request)
        q_len = tl.load(q_indptr_ptr + request + 1) - q_begin
        tile_rows = tl.where(kind == 0, ROWS, BIG_ROWS)
        own_begin = 0
        if LEVELS:
            own_begin = tl.load(own_begin_ptr + request)
        used_rows = tl.minimum(tile_rows, q_len * GROUP - q_tile * tile_rows)
        for first_row in range(tl.program_id(1) * BLOCK_ROWS, used_rows, tl.num_programs(1) * BLOCK_ROWS):
            row = first_row + tl.arange(0, BLOCK_ROWS)
            live = row < used_rows
            packed = q_tile * tile_rows + row
            token = (q_begin + packed // GROUP).to(tl.int64)
            head = kv_head * GROUP + packed % GROUP
            sink = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
            if SINKS:
                if own_begin == 0:
                    sink = tl.load(sinks_ptr + head, mask=live, other=0.0) * LOG2E
            result, lse = merge_rows(
                tail_begin - 1, 1 + tail_end - tail_begin, head_slot, row, live, partial_ptr, partial_lse_ptr, sink,
                SLOT_ROWS, BLOCK_ROWS, PIECES, DIM_VO, BLOCK_DV,
            )  # fmt: skip
            if own_begin == 0:
                store_output(
                    token, head, live, result, lse, out_ptr, lse_ptr, out_stride_token, out_stride_head, lse_stride_token,
                    DIM_VO, BLOCK_DV, LSE,
                )  # fmt: skip
            else:
                state_row = (state_begin + token) * HEADS + head
                store_rows(state_row, live, result, lse, state_ptr, state_lse_ptr, DIM_VO, BLOCK_DV)
