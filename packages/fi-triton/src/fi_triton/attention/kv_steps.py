"""The loop of the attention kernels over KV steps: gather K and V rows through the table, mask, and the online softmax.

Sources: online softmax (Milakov and Gimelshein, 2018; Dao et al., 2022, section 3.1); paged KV (Kwon et al., 2023, section
4); ALiBi (Press et al., 2022). Logits are kept in base 2 (multiplied by log2 e), because the hardware's exponential is.

Positions count from ``shift`` on: 0, or where the part of the keys begins that a tile attends to (see levels.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

MASK_NONE = tl.constexpr(0)
MASK_KV = tl.constexpr(1)
MASK_NEW = tl.constexpr(2)


@triton.jit
def pages_at(begin, lowest, stop, shift, entries_ptr, STEP: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Page ids of the STEP positions from ``begin`` on (ragged, PAGE_SIZE 0: the positions).

    Positions outside [lowest, stop) are not looked up: their entries may lie beyond the table or hold anything.
    """
    positions = begin + tl.arange(0, STEP)
    if PAGE_SIZE == 0:
        pages = positions
    else:
        readable = (positions >= lowest) & (positions < stop)
        pages = tl.load(entries_ptr + (positions + shift) // PAGE_SIZE, mask=readable, other=0)
    return pages


@triton.jit
def load_rows(
    head_ptr, pages, positions, readable, stride_page, stride_token,
    PAGE_SIZE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A tile [positions, BLOCK] of K or V rows of one head; zeros where unreadable and beyond DIM. Ragged rows stand
    ``stride_token`` apart from ``head_ptr`` on."""
    dims = tl.arange(0, BLOCK)
    if PAGE_SIZE == 0:
        rows = positions.to(tl.int64) * stride_token
    else:
        rows = pages.to(tl.int64) * stride_page + (positions % PAGE_SIZE).to(tl.int64) * stride_token
    pointers = head_ptr + rows[:, None] + dims[None, :]
    if MASKED:
        if DIM == BLOCK:
            tile = tl.load(pointers, mask=readable[:, None], other=0.0)
        else:
            tile = tl.load(pointers, mask=readable[:, None] & (dims < DIM)[None, :], other=0.0)
    else:
        if DIM == BLOCK:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(dims < DIM)[None, :], other=0.0)
    return tile


@triton.jit
def soften(logits, soft_cap):
    """soft_cap * tanh(logits / soft_cap), with tanh(x) = 1 - 2 / (1 + e^2x): exact at both infinities."""
    return soft_cap * (1.0 - 2.0 / (1.0 + tl.exp2(logits * (2.0 * LOG2E / soft_cap))))


@triton.jit
def mask_bits_at(bits_ptr, bits_row, token, positions, shift, offset, wanted, columns, MASK: tl.constexpr):
    """Whether the packed mask lets each (row, position) of ``wanted`` see; earlier keys always do in the "new" form."""
    if MASK == MASK_NEW:
        column = positions - offset
    else:
        column = positions + shift
    inside = wanted & (column >= 0)[None, :] & (column < columns)[None, :]
    row_bytes = (columns + 7) // 8
    pointers = bits_ptr + (bits_row + token.to(tl.int64) * row_bytes)[:, None] + (column >> 3)[None, :]
    byte = tl.load(pointers, mask=inside, other=0).to(tl.int32)
    seen = ((byte >> (column & 7)[None, :]) & 1) != 0
    if MASK == MASK_NEW:
        seen = seen | (column < 0)[None, :]
    return seen


@triton.jit
def attend_step(
    total, top, mass,  # [ROWS, BLOCK_DV], [ROWS], [ROWS] float32: sum of weighted values, largest logit, sum of weights
    query, pages, begin, stop, shift, token, first_seen, last_seen, k_head_ptr, v_head_ptr,
    k_stride_page, k_stride_token, v_stride_page, v_stride_token,
    logit_scale, soft_cap, slope, offset, lowest, bits_ptr, bits_row, columns,
    STEP: tl.constexpr, MASKED: tl.constexpr, PAGE_SIZE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    DIM_VO: tl.constexpr, BLOCK_DV: tl.constexpr, SOFT_CAP: tl.constexpr, ALIBI: tl.constexpr, MASK: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """One KV step: positions [begin, begin + STEP), of which those in [lowest, stop) are readable. Without MASKED every row
    sees all of them."""
    positions = begin + tl.arange(0, STEP)
    readable = (positions >= lowest) & (positions < stop)
    keys = load_rows(
        k_head_ptr, pages, positions + shift, readable, k_stride_page, k_stride_token, PAGE_SIZE, DIM, BLOCK_D, MASKED
    )
    logits = tl.dot(query, tl.trans(keys.to(query.dtype)), input_precision="ieee") * logit_scale
    if SOFT_CAP:
        logits = soften(logits, soft_cap) * LOG2E
    if ALIBI:
        logits += slope[:, None] * (positions[None, :] - (offset + token)[:, None]).to(tl.float32)
    if MASKED:
        visible = readable[None, :] & (positions[None, :] <= last_seen[:, None])
        if WINDOWED:
            visible = visible & (positions[None, :] >= first_seen[:, None])
        if MASK != MASK_NONE:
            visible = visible & mask_bits_at(
                bits_ptr, bits_row, token, positions, shift, offset, visible, columns, MASK
            )
        logits = tl.where(visible, logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    base = new_top
    if MASKED:  # a row that has seen nothing yet: -inf - -inf would be NaN
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    fade = tl.exp2(top - base)
    weights = tl.exp2(logits - base[:, None])
    mass = mass * fade + tl.sum(weights, 1)
    values = load_rows(
        v_head_ptr,
        pages,
        positions + shift,
        readable,
        v_stride_page,
        v_stride_token,
        PAGE_SIZE,
        DIM_VO,
        BLOCK_DV,
        MASKED,
    )
    total = tl.dot(weights.to(query.dtype), values.to(query.dtype), total * fade[:, None], input_precision="ieee")
    return total, new_top, mass


@triton.jit
def whole_steps(
    kv_begin, kv_end, offset, first_token, last_token, window,
    STEP: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """[begin, end), multiples of STEP: the steps inside [kv_begin, kv_end) that all rows of the tile see whole."""
    begin = kv_begin
    end = kv_end
    if WINDOWED:
        seen_by_all = tl.maximum(offset + last_token - window + 1, 0)
        begin = tl.maximum(begin, (seen_by_all + STEP - 1) // STEP * STEP)
    if CAUSAL:
        end = tl.minimum(end, offset + first_token + 1)
    if MASK == MASK_NEW:
        end = tl.minimum(end, offset)
    begin = tl.minimum(begin, (kv_end + STEP - 1) // STEP * STEP)
    return begin, tl.maximum(tl.maximum(end, 0) // STEP * STEP, begin)


@triton.jit
def attend_range(
    query, kv_begin, kv_end, whole_begin, whole_end, lowest, shift, token, first_seen, last_seen, offset,
    entries_ptr, k_head_ptr, v_head_ptr, k_stride_page, k_stride_token, v_stride_page, v_stride_token,
    logit_scale, soft_cap, slope, bits_ptr, bits_row, columns,
    ROWS: tl.constexpr, STEP: tl.constexpr, SPLIT_EDGES: tl.constexpr, STAGES: tl.constexpr, PAGE_SIZE: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, DIM_VO: tl.constexpr, BLOCK_DV: tl.constexpr,
    SOFT_CAP: tl.constexpr, ALIBI: tl.constexpr, MASK: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """(sum of weighted values [ROWS, BLOCK_DV], largest logit [ROWS], sum of weights [ROWS]) of the keys [kv_begin, kv_end).

    With SPLIT_EDGES every row sees the steps [whole_begin, whole_end) whole, and they need no masks; the steps left and right of
    them do. Page ids are looked up one step ahead, so that K and V loads of later steps do not wait for them.
    """
    num_left = (whole_begin - kv_begin + STEP - 1) // STEP
    num_right = tl.maximum((kv_end - whole_end + STEP - 1) // STEP, 0)
    total = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    if SPLIT_EDGES:
        pages = pages_at(whole_begin, lowest, kv_end, shift, entries_ptr, STEP, PAGE_SIZE)
        for begin in tl.range(whole_begin, whole_end, STEP, num_stages=STAGES):
            next_pages = pages_at(begin + STEP, lowest, kv_end, shift, entries_ptr, STEP, PAGE_SIZE)
            total, top, mass = attend_step(
                total, top, mass, query, pages, begin, kv_end, shift, token, first_seen, last_seen, k_head_ptr, v_head_ptr,
                k_stride_page, k_stride_token, v_stride_page, v_stride_token,
                logit_scale, soft_cap, slope, offset, lowest, bits_ptr, bits_row, columns,
                STEP, False, PAGE_SIZE, DIM, BLOCK_D, DIM_VO, BLOCK_DV, SOFT_CAP, ALIBI, MASK, WINDOWED,
            )  # fmt: skip
            pages = next_pages
    edge_begin = tl.where(num_left > 0, kv_begin, whole_end)
    edge_pages = pages_at(edge_begin, lowest, kv_end, shift, entries_ptr, STEP, PAGE_SIZE)
    for edge in tl.range(0, num_left + num_right, num_stages=STAGES):
        after = edge + 1
        next_begin = tl.where(after < num_left, kv_begin + after * STEP, whole_end + (after - num_left) * STEP)
        next_edge_pages = pages_at(next_begin, lowest, kv_end, shift, entries_ptr, STEP, PAGE_SIZE)
        total, top, mass = attend_step(
            total, top, mass, query, edge_pages, edge_begin, kv_end, shift, token, first_seen, last_seen, k_head_ptr, v_head_ptr,
            k_stride_page, k_stride_token, v_stride_page, v_stride_token,
            logit_scale, soft_cap, slope, offset, lowest, bits_ptr, bits_row, columns,
            STEP, True, PAGE_SIZE, DIM, BLOCK_D, DIM_VO, BLOCK_DV, SOFT_CAP, ALIBI, MASK, WINDOWED,
        )  # fmt: skip
        edge_pages = next_edge_pages
        edge_begin = next_begin
    return total, top, mass
