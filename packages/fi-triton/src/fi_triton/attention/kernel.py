"""The attention kernel: persistent workers that consume the scheduler's work list.

Worker ``w`` runs items ``worker_indptr[w] .. worker_indptr[w + 1]``. An item is one tile of packed query rows (row = token *
group size + query head in the group, so all query heads of a KV head share its keys) over a range of KV tokens; items of
both tile kinds run in one launch. An item that covers its whole tile writes the output; a partial item writes a normalised
float32 result and its base-2 log-sum-exp into a slot, and ``merge.py`` combines the slots in the plan's order.

Sources: online softmax (Milakov and Gimelshein, 2018; Dao et al., 2022, section 3.1); paged KV (Kwon et al., 2023, section
4); ALiBi (Press et al., 2022). Logits are kept in base 2 (multiplied by log2 e), because the hardware's exponential is.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

MASK_NONE = tl.constexpr(0)
MASK_KV = tl.constexpr(1)
MASK_NEW = tl.constexpr(2)

RAGGED = tl.constexpr(0)
DENSE = tl.constexpr(1)
INDPTR = tl.constexpr(2)


@triton.jit
def pages_at(begin, lowest, stop, entries_ptr, STEP: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Page ids of the STEP positions from ``begin`` on (ragged, PAGE_SIZE 0: the positions).

    Positions outside [lowest, stop) are not looked up: their entries may lie beyond the table or hold anything.
    """
    positions = begin + tl.arange(0, STEP)
    if PAGE_SIZE == 0:
        pages = positions
    else:
        readable = (positions >= lowest) & (positions < stop)
        pages = tl.load(entries_ptr + positions // PAGE_SIZE, mask=readable, other=0)
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
def mask_bits_at(bits_ptr, bits_row, token, positions, offset, wanted, columns, MASK: tl.constexpr):
    """Whether the packed mask lets each (row, position) of ``wanted`` see; earlier keys always do in the "new" form."""
    if MASK == MASK_NEW:
        column = positions - offset
    else:
        column = positions
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
    query, pages, begin, stop, token, first_seen, last_seen, k_head_ptr, v_head_ptr,
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
        k_head_ptr, pages, positions, readable, k_stride_page, k_stride_token, PAGE_SIZE, DIM, BLOCK_D, MASKED
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
            visible = visible & mask_bits_at(bits_ptr, bits_row, token, positions, offset, visible, columns, MASK)
        logits = tl.where(visible, logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    base = new_top
    if MASKED:  # a row that has seen nothing yet: -inf - -inf would be NaN
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    fade = tl.exp2(top - base)
    weights = tl.exp2(logits - base[:, None])
    mass = mass * fade + tl.sum(weights, 1)
    values = load_rows(
        v_head_ptr, pages, positions, readable, v_stride_page, v_stride_token, PAGE_SIZE, DIM_VO, BLOCK_DV, MASKED
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
def run_item(
    item_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
    q_indptr_ptr, kv_lens_ptr, table_ptr, table_row_ptr, kv_indptr_ptr, bits_ptr, bits_indptr_ptr,
    sinks_ptr, slopes_ptr, k_scale_ptr, v_scale_ptr, scale, soft_cap, v_scale, window,
    q_stride_token, q_stride_head, k_stride_page, k_stride_token, k_stride_head, v_stride_page, v_stride_token, v_stride_head,
    out_stride_token, out_stride_head, lse_stride_token, table_stride, k_scale_stride, v_scale_stride,
    ROWS: tl.constexpr, STEP: tl.constexpr, SPLIT_EDGES: tl.constexpr, SLOT_ROWS: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, DIM_VO: tl.constexpr, BLOCK_DV: tl.constexpr,
    PAGE_SIZE: tl.constexpr, TABLE: tl.constexpr, TABLE_ROW: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    SOFT_CAP: tl.constexpr, ALIBI: tl.constexpr, SINKS: tl.constexpr, MASK: tl.constexpr, LSE: tl.constexpr,
    K_SCALE: tl.constexpr, V_SCALE: tl.constexpr,
):  # fmt: skip
    """One item of the work list with a tile of ROWS packed rows."""
    request = tl.load(item_ptr)
    kv_head = tl.load(item_ptr + 1)
    q_tile = tl.load(item_ptr + 2)
    kv_begin = tl.load(item_ptr + 4)
    kv_end = tl.load(item_ptr + 5)
    slot = tl.load(item_ptr + 6)
    q_begin = tl.load(q_indptr_ptr + request)
    q_len = tl.load(q_indptr_ptr + request + 1) - q_begin
    kv_len = tl.load(kv_lens_ptr + request)
    offset = kv_len - q_len
    row = q_tile * ROWS + tl.arange(0, ROWS)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    live = token < q_len
    dims = tl.arange(0, BLOCK_D)
    q_rows = q_ptr + (q_begin + token).to(tl.int64) * q_stride_token + head.to(tl.int64) * q_stride_head
    query = tl.load(q_rows[:, None] + dims[None, :], mask=live[:, None] & (dims < DIM)[None, :], other=0.0)

    # Which keys each row sees: positions in [first_seen, last_seen].
    if CAUSAL:
        last_seen = offset + token
    else:
        last_seen = tl.full((ROWS,), 2147483647, tl.int32)
    first_seen = offset + token - window + 1
    first_token = q_tile * ROWS // GROUP
    last_token = tl.minimum((q_tile * ROWS + ROWS - 1) // GROUP, q_len - 1)
    if WINDOWED:
        lowest = tl.maximum(offset + first_token - window + 1, 0)
    else:
        lowest = 0

    k_head_ptr = k_ptr + kv_head.to(tl.int64) * k_stride_head
    v_head_ptr = v_ptr + kv_head.to(tl.int64) * v_stride_head
    entries_ptr = table_ptr
    if TABLE == DENSE:
        table_row = request
        if TABLE_ROW:
            table_row = tl.load(table_row_ptr + request)
        entries_ptr = table_ptr + table_row.to(tl.int64) * table_stride
    elif TABLE == INDPTR:
        entries_ptr = table_ptr + tl.load(kv_indptr_ptr + request)
    else:
        first_row = tl.load(kv_indptr_ptr + request).to(tl.int64)
        k_head_ptr += first_row * k_stride_token
        v_head_ptr += first_row * v_stride_token

    logit_scale = scale
    if K_SCALE:
        logit_scale = logit_scale * tl.load(k_scale_ptr + kv_head * k_scale_stride)
    if not SOFT_CAP:
        logit_scale = logit_scale * LOG2E
    slope = tl.zeros((ROWS,), tl.float32)
    if ALIBI:
        slope = tl.load(slopes_ptr + head) * LOG2E
    bits_row = request.to(tl.int64)
    columns = kv_len
    if MASK != MASK_NONE:
        bits_row = tl.load(bits_indptr_ptr + request)
    if MASK == MASK_NEW:
        columns = q_len

    # Steps that every row sees whole need no masks; the steps left and right of them do.
    whole_begin = kv_end
    whole_end = kv_end
    if SPLIT_EDGES and MASK != MASK_KV:
        whole_begin, whole_end = whole_steps(
            kv_begin, kv_end, offset, first_token, last_token, window, STEP, CAUSAL, WINDOWED, MASK
        )
    num_left = (whole_begin - kv_begin + STEP - 1) // STEP
    num_right = tl.maximum((kv_end - whole_end + STEP - 1) // STEP, 0)

    total = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    # Page ids are looked up one step ahead, so that K and V loads of later steps do not wait for them.
    if SPLIT_EDGES and MASK != MASK_KV:
        pages = pages_at(whole_begin, lowest, kv_end, entries_ptr, STEP, PAGE_SIZE)
        for begin in tl.range(whole_begin, whole_end, STEP, num_stages=STAGES):
            next_pages = pages_at(begin + STEP, lowest, kv_end, entries_ptr, STEP, PAGE_SIZE)
            total, top, mass = attend_step(
                total, top, mass, query, pages, begin, kv_end, token, first_seen, last_seen, k_head_ptr, v_head_ptr,
                k_stride_page, k_stride_token, v_stride_page, v_stride_token,
                logit_scale, soft_cap, slope, offset, lowest, bits_ptr, bits_row, columns,
                STEP, False, PAGE_SIZE, DIM, BLOCK_D, DIM_VO, BLOCK_DV, SOFT_CAP, ALIBI, MASK, WINDOWED,
            )  # fmt: skip
            pages = next_pages
    edge_begin = tl.where(num_left > 0, kv_begin, whole_end)
    edge_pages = pages_at(edge_begin, lowest, kv_end, entries_ptr, STEP, PAGE_SIZE)
    for edge in tl.range(0, num_left + num_right, num_stages=STAGES):
        after = edge + 1
        next_begin = tl.where(after < num_left, kv_begin + after * STEP, whole_end + (after - num_left) * STEP)
        next_edge_pages = pages_at(next_begin, lowest, kv_end, entries_ptr, STEP, PAGE_SIZE)
        total, top, mass = attend_step(
            total, top, mass, query, edge_pages, edge_begin, kv_end, token, first_seen, last_seen, k_head_ptr, v_head_ptr,
            k_stride_page, k_stride_token, v_stride_page, v_stride_token,
            logit_scale, soft_cap, slope, offset, lowest, bits_ptr, bits_row, columns,
            STEP, True, PAGE_SIZE, DIM, BLOCK_D, DIM_VO, BLOCK_DV, SOFT_CAP, ALIBI, MASK, WINDOWED,
        )  # fmt: skip
        edge_pages = next_edge_pages
        edge_begin = next_begin

    if V_SCALE:
        v_scale = v_scale * tl.load(v_scale_ptr + kv_head * v_scale_stride)
    finish_item(
        total, top, mass, live, q_begin + token, head, slot, v_scale, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
        sinks_ptr, out_stride_token, out_stride_head, lse_stride_token, ROWS, SLOT_ROWS, DIM_VO, BLOCK_DV, SINKS, LSE,
    )  # fmt: skip


@triton.jit
def finish_item(
    total, top, mass, live, token, head, slot, v_scale, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
    sinks_ptr, out_stride_token, out_stride_head, lse_stride_token,
    ROWS: tl.constexpr, SLOT_ROWS: tl.constexpr, DIM_VO: tl.constexpr, BLOCK_DV: tl.constexpr, SINKS: tl.constexpr,
    LSE: tl.constexpr,
):  # fmt: skip
    """Normalise and store: to the output, or to the partial slot. Sinks join here only if the tile was not split."""
    if SINKS:
        if slot < 0:
            sink = tl.load(sinks_ptr + head, mask=live, other=0.0) * LOG2E
            new_top = tl.maximum(top, sink)
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            fade = tl.exp2(top - base)
            mass = mass * fade + tl.exp2(sink - base)
            total = total * fade[:, None]
            top = new_top
    empty = mass == 0.0
    result = total * tl.where(empty, 0.0, v_scale / tl.where(empty, 1.0, mass))[:, None]
    log_mass = tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, mass)))
    dims = tl.arange(0, BLOCK_DV)
    if slot < 0:
        rows = out_ptr + token.to(tl.int64) * out_stride_token + head.to(tl.int64) * out_stride_head
        stored = result.to(out_ptr.dtype.element_ty)
        tl.store(rows[:, None] + dims[None, :], stored, mask=live[:, None] & (dims < DIM_VO)[None, :])
        if LSE:
            tl.store(lse_ptr + token.to(tl.int64) * lse_stride_token + head, log_mass * LN2, mask=live)
    else:
        row = slot.to(tl.int64) * SLOT_ROWS + tl.arange(0, ROWS)
        tl.store(partial_ptr + row[:, None] * DIM_VO + dims[None, :], result, mask=(dims < DIM_VO)[None, :])
        tl.store(partial_lse_ptr + row, log_mass)


@triton.jit(do_not_specialize=["window"])
def attention_kernel(
    worker_indptr_ptr, items_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
    q_indptr_ptr, kv_lens_ptr, table_ptr, table_row_ptr, kv_indptr_ptr, bits_ptr, bits_indptr_ptr,
    sinks_ptr, slopes_ptr, k_scale_ptr, v_scale_ptr, scale, soft_cap, v_scale, window,
    q_stride_token, q_stride_head, k_stride_page, k_stride_token, k_stride_head, v_stride_page, v_stride_token, v_stride_head,
    out_stride_token, out_stride_head, lse_stride_token, table_stride, k_scale_stride, v_scale_stride,
    ROWS: tl.constexpr, STEP: tl.constexpr, BIG_ROWS: tl.constexpr, BIG_STEP: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, DIM_VO: tl.constexpr, BLOCK_DV: tl.constexpr,
    PAGE_SIZE: tl.constexpr, TABLE: tl.constexpr, TABLE_ROW: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    SOFT_CAP: tl.constexpr, ALIBI: tl.constexpr, SINKS: tl.constexpr, MASK: tl.constexpr, LSE: tl.constexpr,
    K_SCALE: tl.constexpr, V_SCALE: tl.constexpr,
):  # fmt: skip
    """All items of worker ``program_id(0)``. ROWS x STEP is the tile of kind 0, BIG_ROWS x BIG_STEP of kind 1 (0: no kind 1).

    Tiles of up to 32 rows are bound by memory and mask every step; larger ones have a loop without masks besides.
    """
    worker = tl.program_id(0)
    SLOT_ROWS: tl.constexpr = BIG_ROWS if BIG_ROWS > ROWS else ROWS
    begin = tl.load(worker_indptr_ptr + worker)
    end = tl.load(worker_indptr_ptr + worker + 1)
    for item in range(begin, end):
        item_ptr = items_ptr + item * 8
        kind = tl.load(item_ptr + 3)
        if kind == 0:
            run_item(
                item_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
                q_indptr_ptr, kv_lens_ptr, table_ptr, table_row_ptr, kv_indptr_ptr, bits_ptr, bits_indptr_ptr,
                sinks_ptr, slopes_ptr, k_scale_ptr, v_scale_ptr, scale, soft_cap, v_scale, window,
                q_stride_token, q_stride_head, k_stride_page, k_stride_token, k_stride_head,
                v_stride_page, v_stride_token, v_stride_head,
                out_stride_token, out_stride_head, lse_stride_token, table_stride, k_scale_stride, v_scale_stride,
                ROWS, STEP, ROWS > 32, SLOT_ROWS, STAGES, GROUP, DIM, BLOCK_D, DIM_VO, BLOCK_DV,
                PAGE_SIZE, TABLE, TABLE_ROW, CAUSAL, WINDOWED, SOFT_CAP, ALIBI, SINKS, MASK, LSE, K_SCALE, V_SCALE,
            )  # fmt: skip
        elif BIG_ROWS > 0:
            run_item(
                item_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
                q_indptr_ptr, kv_lens_ptr, table_ptr, table_row_ptr, kv_indptr_ptr, bits_ptr, bits_indptr_ptr,
                sinks_ptr, slopes_ptr, k_scale_ptr, v_scale_ptr, scale, soft_cap, v_scale, window,
                q_stride_token, q_stride_head, k_stride_page, k_stride_token, k_stride_head,
                v_stride_page, v_stride_token, v_stride_head,
                out_stride_token, out_stride_head, lse_stride_token, table_stride, k_scale_stride, v_scale_stride,
                BIG_ROWS, BIG_STEP, True, SLOT_ROWS, STAGES, GROUP, DIM, BLOCK_D, DIM_VO, BLOCK_DV,
                PAGE_SIZE, TABLE, TABLE_ROW, CAUSAL, WINDOWED, SOFT_CAP, ALIBI, SINKS, MASK, LSE, K_SCALE, V_SCALE,
            )  # fmt: skip
