"""The attention kernel: persistent workers that consume the scheduler's work list.

Worker ``w`` runs items ``worker_indptr[w] .. worker_indptr[w + 1]``. An item is one tile of packed query rows (row = token *
group size + query head in the group, so all query heads of a KV head share its keys) over a range of KV tokens; items of
both tile kinds run in one launch. An item that covers its whole tile writes the output; a partial item writes a normalised
float32 result and its base-2 log-sum-exp into a slot, and ``merge.py`` combines the slots in the plan's order.

With LEVELS a request that shares a prefix attends to its own part of the keys alone, and the result is a partial one of the
whole: see ``levels.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kv_steps import LN2, LOG2E, MASK_KV, MASK_NEW, MASK_NONE, attend_range, whole_steps

RAGGED = tl.constexpr(0)
DENSE = tl.constexpr(1)
INDPTR = tl.constexpr(2)


@triton.jit
def entries_of(
    request, table_ptr, table_row_ptr, indptr_ptr, table_stride, TABLE: tl.constexpr, TABLE_ROW: tl.constexpr
):  # fmt: skip
    """Where the table's entries of a request begin."""
    if TABLE == DENSE:
        table_row = request
        if TABLE_ROW:
            table_row = tl.load(table_row_ptr + request)
        entries_ptr = table_ptr + table_row.to(tl.int64) * table_stride
    else:
        entries_ptr = table_ptr + tl.load(indptr_ptr + request)
    return entries_ptr


@triton.jit
def logit_scale_of(scale, k_scale_ptr, K_SCALE: tl.constexpr, SOFT_CAP: tl.constexpr):
    """What a product of a query and a key is multiplied by: in base 2, unless it is capped first."""
    if K_SCALE:
        scale = scale * tl.load(k_scale_ptr)
    if not SOFT_CAP:
        scale = scale * LOG2E
    return scale


@triton.jit
def load_queries(
    q_ptr, token, head, live, q_stride_token, q_stride_head, DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """A tile's rows of Q; those that are not ``live`` are 0."""
    dims = tl.arange(0, BLOCK_D)
    rows = q_ptr + token.to(tl.int64) * q_stride_token + head.to(tl.int64) * q_stride_head
    return tl.load(rows[:, None] + dims[None, :], mask=live[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit
def slopes_of(slopes_ptr, head, ROWS: tl.constexpr, ALIBI: tl.constexpr):
    """Each row's ALiBi slope, in base 2."""
    slope = tl.zeros((ROWS,), tl.float32)
    if ALIBI:
        slope = tl.load(slopes_ptr + head) * LOG2E
    return slope


@triton.jit
def run_item(
    item_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
    q_indptr_ptr, kv_lens_ptr, table_ptr, table_row_ptr, kv_indptr_ptr, bits_ptr, bits_indptr_ptr,
    sinks_ptr, slopes_ptr, k_scale_ptr, v_scale_ptr, own_begin_ptr, state_ptr, state_lse_ptr,
    scale, soft_cap, v_scale, window, state_begin,
    q_stride_token, q_stride_head, k_stride_page, k_stride_token, k_stride_head, v_stride_page, v_stride_token, v_stride_head,
    out_stride_token, out_stride_head, lse_stride_token, table_stride, k_scale_stride, v_scale_stride,
    ROWS: tl.constexpr, STEP: tl.constexpr, SPLIT_EDGES: tl.constexpr, SLOT_ROWS: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, DIM_VO: tl.constexpr, BLOCK_DV: tl.constexpr,
    PAGE_SIZE: tl.constexpr, TABLE: tl.constexpr, TABLE_ROW: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    SOFT_CAP: tl.constexpr, ALIBI: tl.constexpr, SINKS: tl.constexpr, MASK: tl.constexpr, LSE: tl.constexpr,
    K_SCALE: tl.constexpr, V_SCALE: tl.constexpr, LEVELS: tl.constexpr, HEADS: tl.constexpr,
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
    shift = 0
    if LEVELS:  # positions count from where the request's own keys begin
        shift = tl.load(own_begin_ptr + request)
        kv_len -= shift
    offset = kv_len - q_len
    row = q_tile * ROWS + tl.arange(0, ROWS)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    live = token < q_len
    query = load_queries(q_ptr, q_begin + token, head, live, q_stride_token, q_stride_head, DIM, BLOCK_D)

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
    if TABLE == RAGGED:
        entries_ptr = table_ptr
        first_row = tl.load(kv_indptr_ptr + request).to(tl.int64)
        k_head_ptr += first_row * k_stride_token
        v_head_ptr += first_row * v_stride_token
    else:
        entries_ptr = entries_of(request, table_ptr, table_row_ptr, kv_indptr_ptr, table_stride, TABLE, TABLE_ROW)
    logit_scale = logit_scale_of(scale, k_scale_ptr + kv_head * k_scale_stride, K_SCALE, SOFT_CAP)
    slope = slopes_of(slopes_ptr, head, ROWS, ALIBI)
    bits_row = request.to(tl.int64)
    columns = kv_len + shift
    if MASK != MASK_NONE:
        bits_row = tl.load(bits_indptr_ptr + request)
    if MASK == MASK_NEW:
        columns = q_len

    whole_begin = kv_end
    whole_end = kv_end
    if SPLIT_EDGES and MASK != MASK_KV:
        whole_begin, whole_end = whole_steps(
            kv_begin, kv_end, offset, first_token, last_token, window, STEP, CAUSAL, WINDOWED, MASK
        )
    total, top, mass = attend_range(
        query, kv_begin, kv_end, whole_begin, whole_end, lowest, shift, token, first_seen, last_seen, offset,
        entries_ptr, k_head_ptr, v_head_ptr, k_stride_page, k_stride_token, v_stride_page, v_stride_token,
        logit_scale, soft_cap, slope, bits_ptr, bits_row, columns, ROWS, STEP, SPLIT_EDGES and MASK != MASK_KV, STAGES,
        PAGE_SIZE, DIM, BLOCK_D, DIM_VO, BLOCK_DV, SOFT_CAP, ALIBI, MASK, WINDOWED,
    )  # fmt: skip
    if V_SCALE:
        v_scale = v_scale * tl.load(v_scale_ptr + kv_head * v_scale_stride)
    finish_item(
        total, top, mass, live, q_begin + token, head, slot, v_scale, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
        sinks_ptr, state_ptr, state_lse_ptr, state_begin, shift > 0, out_stride_token, out_stride_head, lse_stride_token,
        ROWS, SLOT_ROWS, DIM_VO, BLOCK_DV, SINKS, LSE, LEVELS, HEADS,
    )  # fmt: skip


@triton.jit
def normalised(total, top, mass, v_scale):
    """(result, base-2 log-sum-exp) of the sums of a tile; 0 and -inf where nothing was seen."""
    empty = mass == 0.0
    result = total * tl.where(empty, 0.0, v_scale / tl.where(empty, 1.0, mass))[:, None]
    return result, tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, mass)))


@triton.jit
def store_rows(rows, live, result, log_mass, ptr, lse_ptr, DIM_VO: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Store partial results into the contiguous ``rows`` int64 of float32 [rows, DIM_VO] and [rows]."""
    dims = tl.arange(0, BLOCK_DV)
    tl.store(ptr + rows[:, None] * DIM_VO + dims[None, :], result, mask=live[:, None] & (dims < DIM_VO)[None, :])
    tl.store(lse_ptr + rows, log_mass, mask=live)


@triton.jit
def store_output(
    token, head, live, result, log_mass, out_ptr, lse_ptr, out_stride_token, out_stride_head, lse_stride_token,
    DIM_VO: tl.constexpr, BLOCK_DV: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Store rows of the output, and of its log-sum-exp in natural units."""
    dims = tl.arange(0, BLOCK_DV)
    rows = out_ptr + token.to(tl.int64) * out_stride_token + head.to(tl.int64) * out_stride_head
    stored = result.to(out_ptr.dtype.element_ty)
    tl.store(rows[:, None] + dims[None, :], stored, mask=live[:, None] & (dims < DIM_VO)[None, :])
    if LSE:
        tl.store(lse_ptr + token.to(tl.int64) * lse_stride_token + head, log_mass * LN2, mask=live)


@triton.jit
def finish_item(
    total, top, mass, live, token, head, slot, v_scale, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
    sinks_ptr, state_ptr, state_lse_ptr, state_begin, is_part, out_stride_token, out_stride_head, lse_stride_token,
    ROWS: tl.constexpr, SLOT_ROWS: tl.constexpr, DIM_VO: tl.constexpr, BLOCK_DV: tl.constexpr, SINKS: tl.constexpr,
    LSE: tl.constexpr, LEVELS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Normalise and store: to the output, to the partial slot, or (LEVELS) to the rows of a request's own part. Sinks join here
    only if the result is the whole one."""
    is_whole = slot < 0
    if LEVELS:
        is_whole = is_whole & (not is_part)
    if SINKS:
        if is_whole:
            sink = tl.load(sinks_ptr + head, mask=live, other=0.0) * LOG2E
            new_top = tl.maximum(top, sink)
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            fade = tl.exp2(top - base)
            mass = mass * fade + tl.exp2(sink - base)
            total = total * fade[:, None]
            top = new_top
    result, log_mass = normalised(total, top, mass, v_scale)
    if is_whole:
        store_output(
            token, head, live, result, log_mass, out_ptr, lse_ptr, out_stride_token, out_stride_head, lse_stride_token,
            DIM_VO, BLOCK_DV, LSE,
        )  # fmt: skip
    elif slot >= 0:
        row = slot.to(tl.int64) * SLOT_ROWS + tl.arange(0, ROWS)
        store_rows(row, row >= 0, result, log_mass, partial_ptr, partial_lse_ptr, DIM_VO, BLOCK_DV)
    elif LEVELS:
        row = (state_begin + token).to(tl.int64) * HEADS + head
        store_rows(row, live, result, log_mass, state_ptr, state_lse_ptr, DIM_VO, BLOCK_DV)


@triton.jit(do_not_specialize=["window"])
def attention_kernel(
    worker_indptr_ptr, items_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
    q_indptr_ptr, kv_lens_ptr, table_ptr, table_row_ptr, kv_indptr_ptr, bits_ptr, bits_indptr_ptr,
    sinks_ptr, slopes_ptr, k_scale_ptr, v_scale_ptr, own_begin_ptr, state_ptr, state_lse_ptr,
    scale, soft_cap, v_scale, window, state_begin,
    q_stride_token, q_stride_head, k_stride_page, k_stride_token, k_stride_head, v_stride_page, v_stride_token, v_stride_head,
    out_stride_token, out_stride_head, lse_stride_token, table_stride, k_scale_stride, v_scale_stride,
    ROWS: tl.constexpr, STEP: tl.constexpr, BIG_ROWS: tl.constexpr, BIG_STEP: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, DIM_VO: tl.constexpr, BLOCK_DV: tl.constexpr,
    PAGE_SIZE: tl.constexpr, TABLE: tl.constexpr, TABLE_ROW: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    SOFT_CAP: tl.constexpr, ALIBI: tl.constexpr, SINKS: tl.constexpr, MASK: tl.constexpr, LSE: tl.constexpr,
    K_SCALE: tl.constexpr, V_SCALE: tl.constexpr, LEVELS: tl.constexpr, HEADS: tl.constexpr,
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
                sinks_ptr, slopes_ptr, k_scale_ptr, v_scale_ptr, own_begin_ptr, state_ptr, state_lse_ptr,
    scale, soft_cap, v_scale, window, state_begin,
                q_stride_token, q_stride_head, k_stride_page, k_stride_token, k_stride_head,
                v_stride_page, v_stride_token, v_stride_head,
                out_stride_token, out_stride_head, lse_stride_token, table_stride, k_scale_stride, v_scale_stride,
                ROWS, STEP, ROWS > 32, SLOT_ROWS, STAGES, GROUP, DIM, BLOCK_D, DIM_VO, BLOCK_DV,
                PAGE_SIZE, TABLE, TABLE_ROW, CAUSAL, WINDOWED, SOFT_CAP, ALIBI, SINKS, MASK, LSE, K_SCALE, V_SCALE,
                LEVELS, HEADS,
            )  # fmt: skip
        elif BIG_ROWS > 0:
            run_item(
                item_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
                q_indptr_ptr, kv_lens_ptr, table_ptr, table_row_ptr, kv_indptr_ptr, bits_ptr, bits_indptr_ptr,
                sinks_ptr, slopes_ptr, k_scale_ptr, v_scale_ptr, own_begin_ptr, state_ptr, state_lse_ptr,
    scale, soft_cap, v_scale, window, state_begin,
                q_stride_token, q_stride_head, k_stride_page, k_stride_token, k_stride_head,
                v_stride_page, v_stride_token, v_stride_head,
                out_stride_token, out_stride_head, lse_stride_token, table_stride, k_scale_stride, v_scale_stride,
                BIG_ROWS, BIG_STEP, True, SLOT_ROWS, STAGES, GROUP, DIM, BLOCK_D, DIM_VO, BLOCK_DV,
                PAGE_SIZE, TABLE, TABLE_ROW, CAUSAL, WINDOWED, SOFT_CAP, ALIBI, SINKS, MASK, LSE, K_SCALE, V_SCALE,
                LEVELS, HEADS,
            )  # fmt: skip
